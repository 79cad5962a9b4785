//! Integration components, against the host's.

use std::sync::Arc;

use abi::hyperv::ring::kind::IN_BAND;
use abi::hyperv::vmbus::guid;
use abi::hyperv::{ic, kvp};
use dialects::hyperv::ic::{Facts, FileSystems, Heartbeat, Kvp, Pulse, Shutdown, TimeSync, Vss};
use dialects::store::testing::MapStore;
use dialects::store::{Client, Store as _};
use pvbus::net::{Address, Nic};
use pvbus::{Event, GuestInfo, Hal, Kind, News, StoreError, Tree};
use zerocopy::little_endian::U16;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::liar::{self, packet};
use super::{Rig, SECOND};
use crate::machine::EPOCH;

/// How often the host asks for the guest's keys, and somewhat more.
const KVP_PERIOD: u64 = 6 * SECOND;

fn bell() -> Arc<dyn Fn() + Send + Sync> {
    Arc::new(|| {})
}

/// A machine with key/value pairs.
fn with_kvp() -> (Rig, Arc<MapStore>) {
    let rig = Rig::new();
    let store = Arc::new(MapStore::default());
    store.write(Client::Host, "vm-data/greeting", "grüß dich".as_bytes()).unwrap();
    let facts = Facts(vec![("VirtualMachineName", "machine".into())]);
    rig.plug(Kvp::new(store.clone(), facts, bell()).device(&rig.machine.timers, bell()));
    (rig, store)
}

fn guest(hostname: &str) -> News {
    let address = |ip: &str, prefix| Address { ip: ip.parse().unwrap(), prefix };
    let nic = Nic { mac: [2, 0, 0, 0, 0, 1], addresses: vec![address("10.0.2.15", 24), address("fe80::1", 64)] };
    let (hostname, os_name_full, os_version) = (hostname.into(), "pvbus 1".into(), "1.2.3".into());
    News::Guest(GuestInfo { hostname, os_name_full, os_version, nics: vec![nic], ..GuestInfo::default() })
}

impl Rig {
    /// Polls after so much time.
    fn poll_after(&self, tree: &mut Tree<'_>, nanos: u64) -> Vec<Event> {
        self.machine.wait_until(self.machine.now() + nanos);
        self.poll(tree)
    }
}

#[test]
fn components_are_listed_as_openbsd_lists_them() {
    let (rig, _store) = with_kvp();
    let timers = &rig.machine.timers;
    rig.plug(Vss::new(bell()).device(timers));
    rig.plug(Shutdown::new(bell()).device(timers));
    rig.plug(TimeSync::new(timers, bell()).device());
    rig.plug(Heartbeat::default().device(timers, bell()));
    assert_eq!(Tree::attach(&rig.machine).dmesg()[2], "hyperv0: heartbeat, kvp, shutdown, timesync, vss");
}

#[test]
fn heart_beats() {
    let rig = Rig::new();
    let heartbeat = Heartbeat::default();
    rig.plug(heartbeat.device(&rig.machine.timers, bell()));
    let mut tree = Tree::attach(&rig.machine);
    assert!(matches!(heartbeat.pulse(rig.machine.now()), Pulse::None));
    rig.poll(&mut tree);
    assert!(matches!(heartbeat.pulse(rig.machine.now()), Pulse::Beating));
    assert_eq!(rig.poll_after(&mut tree, 3600 * SECOND), []);
    assert!(matches!(heartbeat.pulse(rig.machine.now()), Pulse::Beating));
}

#[test]
fn host_s_wish_to_go_down_or_to_come_up_again_is_an_event() {
    for (reboot, event) in [(false, Event::Shutdown(Kind::HyperV)), (true, Event::Reboot(Kind::HyperV))] {
        let rig = Rig::new();
        let shutdown = Shutdown::new(bell());
        rig.plug(shutdown.device(&rig.machine.timers));
        let mut tree = Tree::attach(&rig.machine);
        assert_eq!(rig.poll(&mut tree), []);
        shutdown.request(reboot).unwrap();
        assert_eq!(rig.poll(&mut tree), [event]);
    }
}

#[test]
fn time_is_told_with_when_it_was_so() {
    let rig = Rig::new();
    let time = TimeSync::new(&rig.machine.timers, bell());
    rig.plug(time.device());
    let mut tree = Tree::attach(&rig.machine);
    rig.poll(&mut tree);
    assert!(time.request(), "the guest has the driver");
    let told = rig.poll(&mut tree).into_iter().find_map(|event| if let Event::Time(time) = event { Some(time) } else { None });
    let told = told.expect("a time of day");
    assert_eq!((told.source, told.set), (Kind::HyperV, true));
    let epoch = EPOCH.as_nanos() as u64 + told.read_at;
    let difference = (told.seconds * SECOND + u64::from(told.nanoseconds)).abs_diff(epoch);
    assert!(difference < 1000, "{difference} ns; the protocol counts in 100");
}

#[test]
fn file_systems_come_to_rest_and_go_on() {
    let rig = Rig::new();
    let vss = Vss::new(bell());
    rig.plug(vss.device(&rig.machine.timers));
    let mut tree = Tree::attach(&rig.machine);
    rig.poll(&mut tree);
    vss.freeze().unwrap();
    assert_eq!(rig.poll(&mut tree), [Event::Freeze(Kind::HyperV)]);
    assert!(matches!(vss.file_systems(), FileSystems::Freezing), "{:?}", vss.file_systems());
    tree.tell(&News::Frozen(true), rig.machine.now());
    assert_eq!(rig.poll(&mut tree), []);
    assert!(matches!(vss.file_systems(), FileSystems::Frozen), "{:?}", vss.file_systems());
    vss.thaw().unwrap();
    assert_eq!(rig.poll(&mut tree), [Event::Thaw(Kind::HyperV)]);
    assert!(matches!(vss.file_systems(), FileSystems::Working), "{:?}", vss.file_systems());
}

#[test]
fn host_s_keys_are_in_its_pools_and_follow_it() {
    let (rig, store) = with_kvp();
    let mut tree = Tree::attach(&rig.machine);
    rig.poll(&mut tree);
    let keys = tree.stores().store(Kind::HyperV).unwrap();
    assert_eq!(keys.read(b"External/greeting").unwrap(), "grüß dich".as_bytes());
    assert_eq!(keys.read(b"guest/parameters/VirtualMachineName").unwrap(), b"machine");
    assert_eq!(keys.list(b"").unwrap(), [b"External".as_slice(), b"Guest", b"Auto", b"Guest/Parameters"]);
    for key in [b"External/greeting".as_slice(), b"Guest/Parameters/x"] {
        assert_eq!(keys.write(key, b"mine"), Err(StoreError::Denied));
        assert_eq!(keys.remove(key), Err(StoreError::Denied));
    }
    store.write(Client::Host, "vm-data/greeting", b"bye").unwrap();
    store.write(Client::Host, "vm-data/more", b"1").unwrap();
    rig.poll_after(&mut tree, KVP_PERIOD);
    let keys = tree.stores().store(Kind::HyperV).unwrap();
    assert_eq!(keys.read_or_list(b"External/").unwrap(), b"greeting\nmore");
    assert_eq!(keys.read(b"External/greeting").unwrap(), b"bye");
    store.remove(Client::Host, "vm-data/greeting").unwrap();
    rig.poll_after(&mut tree, KVP_PERIOD);
    assert_eq!(tree.stores().store(Kind::HyperV).unwrap().read(b"External/greeting"), Err(StoreError::NotFound));
}

#[test]
fn guest_s_keys_get_to_the_host_are_replaced_and_removed() {
    let (rig, store) = with_kvp();
    let mut tree = Tree::attach(&rig.machine);
    let at_host = |key: &str| store.read(Client::Host, &format!("data/hyperv/Guest/{key}")).ok();
    for value in ["1", "zwei ✓", &"v".repeat(1023)] {
        tree.stores().store(Kind::HyperV).unwrap().write(b"Guest/said", value.as_bytes()).unwrap();
        rig.poll_after(&mut tree, KVP_PERIOD);
        assert_eq!(at_host("said").as_deref(), Some(value.as_bytes()));
    }
    let keys = tree.stores().store(Kind::HyperV).unwrap();
    assert_eq!(keys.write(b"Guest/said", "v".repeat(1024).as_bytes()), Err(StoreError::TooLong));
    assert_eq!(keys.write(b"Guest/", b"a list is not made by writing"), Err(StoreError::BadKey));
    keys.remove(b"Guest/said").unwrap();
    rig.poll_after(&mut tree, KVP_PERIOD);
    assert_eq!(at_host("said"), None);
}

#[test]
fn what_the_kernel_tells_is_in_the_auto_pool_and_stays_true() {
    let (rig, store) = with_kvp();
    let mut tree = Tree::attach(&rig.machine);
    tree.tell(&guest("puffy"), rig.machine.now());
    rig.poll_after(&mut tree, KVP_PERIOD);
    let at_host = |key: &str| String::from_utf8(store.read(Client::Host, &format!("data/hyperv/Auto/{key}")).unwrap()).unwrap();
    assert_eq!(at_host("FullyQualifiedDomainName"), "puffy");
    let version = ["OSVersion", "OSMajorVersion", "OSMinorVersion", "OSBuildNumber"].map(at_host);
    assert_eq!(version, ["1.2.3", "1", "2", "1.2.3"]);
    assert_eq!((at_host("NetworkAddressIPv4"), at_host("NetworkAddressIPv6")), ("10.0.2.15".into(), "fe80::1".into()));
    let keys = tree.stores().store(Kind::HyperV).unwrap();
    assert_eq!(keys.write(b"Auto/Nothing", b"1"), Err(StoreError::NotFound), "only keys that there are");
    keys.write(b"Auto/OSName", b"mine").unwrap();
    tree.tell(&guest("renamed"), rig.machine.now());
    rig.poll_after(&mut tree, KVP_PERIOD);
    assert_eq!((at_host("FullyQualifiedDomainName"), at_host("OSName")), ("renamed".into(), "mine".into()));
}

#[test]
fn addresses_of_a_card_are_told_to_who_names_it() {
    let (rig, liar) = Rig::with_liar(guid::KVP);
    let mut tree = Tree::attach(&rig.machine);
    tree.tell(&guest("puffy"), rig.machine.now());
    rig.poll(&mut tree);
    let text =
        |field: &[U16]| String::from_utf16_lossy(&field.iter().map(|unit| unit.get()).take_while(|unit| *unit != 0).collect::<Vec<_>>());
    for (mac, status) in [("02:00:00:00:00:01", 0), ("02:00:00:00:00:02", ic::status::FAIL)] {
        let mut body = kvp::Addresses::new_zeroed();
        body.operation = kvp::operation::GET_IP_INFO;
        body.adapter.iter_mut().zip(mac.encode_utf16()).for_each(|(to, unit)| *to = unit.into());
        liar.put(IN_BAND, 1, &[], &packet(ic::kind::KVP, body.as_bytes()));
        rig.poll(&mut tree);
        let answer = liar.take().unwrap().1;
        assert_eq!(liar::status(&answer), status);
        let (told, _) = kvp::Addresses::read_from_prefix(&answer[ic::HEADER_BYTES..]).unwrap();
        if status == 0 {
            assert_eq!((text(&told.addresses), text(&told.masks)), ("10.0.2.15;fe80::1".into(), "255.255.255.0;/64".into()));
            assert_eq!(told.family, kvp::family::IPV4 | kvp::family::IPV6);
        }
    }
}
