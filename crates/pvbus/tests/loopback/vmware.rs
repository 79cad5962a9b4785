//! vmt and the information store against VMware's host half.

use std::sync::Arc;

use abi::hypervisor::FIRST_BASE;
use dialects::store::testing::MapStore;
use dialects::store::{Client, Store as _};
use dialects::vmware::{Platform, PowerRequest, Progress, REPORTS, Vmware};
use pvbus::hal::Gate;
use pvbus::net::{Address, Nic};
use pvbus::vmware::{Backdoor, Guestinfo, Rpci};
use pvbus::{Event, GuestInfo, Hal, Kind, News, Store, StoreError, Tree};

use crate::machine::{EPOCH, Machine};

const SECOND: u64 = 1_000_000_000;

struct Setup {
    machine: Machine,
    vmware: Arc<Vmware>,
    store: Arc<MapStore>,
}

/// The dialect for a machine, and the store behind it.
pub fn dialect(machine: &Machine) -> (Arc<Vmware>, Arc<MapStore>) {
    let store = Arc::new(MapStore::default());
    let platform = Platform { tsc_hz: SECOND, bus_hz: 66_000_000, memory: 64 << 20, uuid: [7; 16] };
    let mut cookie = 0x1234_5678_9abc_def0_u64;
    let random = move || {
        cookie = cookie.rotate_left(7);
        cookie
    };
    (Arc::new(Vmware::new(platform, machine.clock.clone(), store.clone(), Box::new(random))), store)
}

fn setup() -> Setup {
    let machine = Machine::new();
    let (vmware, store) = dialect(&machine);
    Setup { machine: machine.with(FIRST_BASE, vmware.clone()), vmware, store }
}

/// Runs the machine as its kernel does, until `end`.
fn run(tree: &mut Tree<'_>, machine: &Machine, end: u64) -> Vec<Event> {
    let mut events = Vec::new();
    loop {
        let polled = tree.poll(machine.now());
        events.extend(polled.events);
        match polled.next {
            Some(next) if next <= end => machine.wait_until(next),
            _ => break,
        }
    }
    machine.wait_until(end);
    events
}

fn guest() -> GuestInfo {
    let addresses = vec![Address { ip: "192.0.2.7".parse().unwrap(), prefix: 24 }];
    GuestInfo {
        hostname: "puffy".into(),
        os_name_full: "Unikernel 1.0".into(),
        os_name: "Unikernel".into(),
        os_version: "1.0".into(),
        started: 0,
        nics: vec![Nic { mac: [2, 0, 0, 0, 0, 1], addresses }],
    }
}

#[test]
fn keys_of_the_host_are_read_and_those_of_the_guest_arrive() {
    for gate in [Gate::In, Gate::Out, Gate::Vmcall] {
        let Setup { machine, store: host, .. } = setup();
        host.write(Client::Host, "vm-data/hostname", b"puffy.example").unwrap();
        let mut store = Guestinfo::new(Rpci::new(Backdoor::through(&machine, gate).unwrap()));
        assert_eq!(store.read(b"guestinfo.hostname").unwrap(), b"puffy.example", "{gate:?}");
        store.write(b"guestinfo.answer", b"forty two").unwrap();
        assert_eq!(host.read(Client::Host, "vm-data/answer").unwrap(), b"forty two");
        assert_eq!(store.read(b"guestinfo.none"), Err(StoreError::NotFound));
    }
}

#[test]
fn values_of_all_lengths_go_both_ways() {
    let Setup { machine, store: host, .. } = setup();
    let mut store = Guestinfo::new(Rpci::new(Backdoor::through(&machine, Gate::In).unwrap()));
    for length in [1, 2, 3, 4, 5, 7, 8, 255, 4095, 4096, 4097, 60_000] {
        let value: Vec<u8> = (0..length).map(|at| 1 + (at % 255) as u8).collect();
        store.write(b"guestinfo.v", &value).unwrap();
        assert_eq!(host.read(Client::Host, "vm-data/v").unwrap(), value);
        assert_eq!(store.read(b"guestinfo.v").unwrap(), value);
    }
    let large = vec![b'x'; 1 << 20];
    host.write(Client::Host, "vm-data/large", &large).unwrap();
    assert_eq!(store.length(b"guestinfo.large").unwrap(), large.len());
}

#[test]
fn watch_sees_what_the_host_changes() {
    let Setup { machine, store: host, .. } = setup();
    let mut store = Guestinfo::new(Rpci::new(Backdoor::through(&machine, Gate::In).unwrap()));
    let mut watch = store.watch(b"guestinfo.k").unwrap();
    host.write(Client::Host, "vm-data/k", b"1").unwrap();
    assert_eq!(store.changed(&mut watch), Ok(Some(Some(b"1".to_vec()))));
    host.remove(Client::Host, "vm-data/k").unwrap();
    assert_eq!(store.changed(&mut watch), Ok(Some(None)));
}

#[test]
fn requests_survive_a_reset_of_the_host_between_them() {
    use dialects::Dialect;
    let Setup { machine, vmware, store: host } = setup();
    host.write(Client::Host, "vm-data/k", b"1").unwrap();
    let mut store = Guestinfo::new(Rpci::new(Backdoor::through(&machine, Gate::In).unwrap()));
    assert!(store.read(b"guestinfo.k").is_ok());
    vmware.reset();
    assert!(store.read(b"guestinfo.k").is_ok());
}

#[test]
fn tools_greet_the_host_and_report_the_guest() {
    let Setup { machine, vmware, store } = setup();
    let mut tree = Tree::attach(&machine);
    assert_eq!(tree.dmesg(), ["pvbus0 at mainbus0: VMware", "vmt0 at pvbus0"]);
    tree.tell(&News::Guest(guest()), machine.now());
    run(&mut tree, &machine, 20 * SECOND);
    let tools = vmware.tools();
    assert!(tools.are_running && tools.take_power_requests, "{tools:?}");
    assert!(tools.last_heard.unwrap() >= 18 * SECOND, "they ask once a second: {tools:?}");
    let report = |name: &str| store.read(Client::Host, &format!("{REPORTS}/{name}")).unwrap();
    assert_eq!(report("dns-name"), b"puffy");
    assert_eq!(report("os-name-full"), b"Unikernel 1.0");
    assert_eq!(report("os-name"), b"Unikernel");
    assert_eq!(report("tools-version"), b"2147483647");
    assert_eq!(report("uptime"), b"1500");
    assert!(report("nics-v3").starts_with(&[0, 0, 0, 3, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 17]));
    assert_eq!(store.read(Client::Host, "vm-data/ip").unwrap(), b"192.0.2.7");
}

#[test]
fn power_requests_come_through_and_are_acknowledged() {
    for (request, event) in [(PowerRequest::Halt, Event::Shutdown(Kind::Vmware)), (PowerRequest::Reboot, Event::Reboot(Kind::Vmware))] {
        let Setup { machine, vmware, .. } = setup();
        let mut tree = Tree::attach(&machine);
        run(&mut tree, &machine, 3 * SECOND);
        vmware.request(request).unwrap();
        let events = run(&mut tree, &machine, 5 * SECOND);
        assert!(events.contains(&event), "{events:?}");
        assert_eq!(vmware.tools().power.unwrap().progress, Progress::Done);
        tree.tell(&News::GoingDown { reboot: false }, machine.now());
        assert!(!vmware.tools().are_running);
    }
}

#[test]
fn time_of_day_is_the_hosts() {
    let Setup { machine, .. } = setup();
    let mut tree = Tree::attach(&machine);
    let events = run(&mut tree, &machine, 16 * SECOND);
    let times: Vec<(bool, u64, u32)> = events
        .iter()
        .filter_map(|event| match event {
            Event::Time(time) => Some((time.set, time.seconds, time.nanoseconds)),
            _ => None,
        })
        .collect();
    let (seconds, nanoseconds) = (EPOCH.as_secs(), EPOCH.subsec_micros() * 1000);
    assert_eq!(times, [(true, seconds, nanoseconds), (false, seconds + 15, nanoseconds)]);
}

#[test]
fn ioctls_reach_the_hosts_store() {
    use abi::pvbus::{KVREAD, KVTYPE, KVWRITE, PvbusReq};
    use pvbus::{BadAddress, Errno, UserMemory};

    /// Key at 0, value at 100.
    struct Process([u8; 200]);
    impl UserMemory for Process {
        fn read(&mut self, address: u64, bytes: &mut [u8]) -> Result<(), BadAddress> {
            let from = self.0.get(address as usize..).and_then(|from| from.get(..bytes.len())).ok_or(BadAddress)?;
            bytes.copy_from_slice(from);
            Ok(())
        }
        fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), BadAddress> {
            let to = self.0.get_mut(address as usize..).and_then(|to| to.get_mut(..bytes.len())).ok_or(BadAddress)?;
            to.copy_from_slice(bytes);
            Ok(())
        }
    }

    let Setup { machine, store: host, .. } = setup();
    host.write(Client::Host, "vm-data/a", b"value").unwrap();
    let mut tree = Tree::attach(&machine);
    let mut process = Process([0; 200]);
    let request = PvbusReq { keylen: 100.into(), key: 0.into(), valuelen: 100.into(), value: 100.into() };
    process.write(0, b"guestinfo.a\0").unwrap();
    tree.stores().ioctl(0, KVREAD, false, &request, &mut process).unwrap();
    assert!(process.0[100..].starts_with(b"value\0"));
    process.write(100, b"new\0").unwrap();
    tree.stores().ioctl(0, KVWRITE, true, &request, &mut process).unwrap();
    assert_eq!(host.read(Client::Host, "vm-data/a").unwrap(), b"new");
    process.write(0, b"guestinfo.none\0").unwrap();
    assert_eq!(tree.stores().ioctl(0, KVREAD, false, &request, &mut process), Err(Errno::ENOENT));
    tree.stores().ioctl(0, KVTYPE, false, &request, &mut process).unwrap();
    assert!(process.0.starts_with(b"VMware\0"));
}
