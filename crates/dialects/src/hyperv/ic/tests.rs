//! Components against a guest that is none, and answers as Linux or OpenBSD do, or as no guest does.

use std::time::Duration;

use abi::hyperv::ic::{
    Heartbeat as Beat, SHUTDOWN_TEXT, Shutdown as ShutdownBody, TimeSync as Time, TimeSync3, Vss as VssBody, shutdown, timesync, version,
    vss,
};
use abi::hyperv::kvp as pairs;
use abi::hyperv::ring::kind::IN_BAND;
use vmm::time::StepClock;

use super::super::connections::Connections;
use super::super::vmbus::Attached;
use super::super::vmbus::testing::{Guest, GuestChannel};
use super::*;
use crate::store::testing::MapStore;
use crate::store::{Client, Store};

const SECOND: u64 = 1_000_000_000;
const EPOCH: Duration = Duration::from_secs(1_704_067_200);

/// A guest with one component on its bus, and its end of the channel.
struct Bench<S: Service> {
    guest: Guest,
    timers: Arc<Timers>,
    component: Attached<Component<S>>,
    channel: GuestChannel,
}

/// A request as the guest has it.
struct Asked {
    transaction: u64,
    message: Message,
    body: Vec<u8>,
}

fn timers() -> Arc<Timers> {
    Timers::new(Arc::new(StepClock::new(EPOCH)))
}

fn no_bell() -> Peer {
    Arc::new(|| {})
}

impl<S: Service> Bench<S> {
    /// A guest that has opened the component's channel.
    fn open(timers: &Arc<Timers>, component: Component<S>) -> Bench<S> {
        let mut guest = Guest::new();
        let mut component = guest.bus.attach(component, no_bell());
        let offer = guest.connect()[0];
        assert_eq!((offer.class, offer.flags.get()), (S::IDENTITY.class, offer_flags::NAMED_PIPE_MODE));
        assert_eq!(offer.user_defined[..4], PIPE_MODE_MESSAGE.to_le_bytes());
        let channel = guest.open(offer.relid.get(), 5);
        component.work();
        Bench { guest, timers: Arc::clone(timers), component, channel }
    }

    /// The same, that has chosen the newest versions.
    fn ready(timers: &Arc<Timers>, component: Component<S>) -> Bench<S> {
        let mut bench = Bench::open(timers, component);
        bench.choose(*S::IDENTITY.versions.last().unwrap());
        bench
    }

    /// Answers the first request.
    fn choose(&mut self, version: Version) {
        let asked = self.asked().expect("the host begins");
        assert_eq!(asked.message.kind.get(), kind::NEGOTIATE);
        let counts = Negotiate { framework_count: 1.into(), message_count: 1.into(), reserved: 0.into() };
        let body = [counts.as_bytes(), Version::new(3, 0).as_bytes(), version.as_bytes()].concat();
        self.answer(&asked, status::OK, &body);
    }

    /// What the host asks.
    fn asked(&mut self) -> Option<Asked> {
        let packet = self.channel.receive()?;
        assert_eq!((packet.kind, packet.flags), (IN_BAND, 0));
        let (header, body) = packet.payload.split_at(HEADER_BYTES);
        let (pipe, message) = Pipe::read_from_prefix(header).unwrap();
        let message = Message::read_from_bytes(message).unwrap();
        assert_eq!(pipe.length.get() as usize, size_of::<Message>() + usize::from(message.size.get()));
        assert_eq!(message.flags, flags::TRANSACTION | flags::REQUEST);
        Some(Asked { transaction: packet.transaction, message, body: body[..message.size.get().into()].to_vec() })
    }

    /// Answers as the guest does: with the request's header. The host then does what follows.
    fn answer(&mut self, asked: &Asked, status: u32, body: &[u8]) {
        let message = Message { status: status.into(), flags: flags::TRANSACTION | flags::RESPONSE, ..asked.message };
        let pipe = Pipe { flags: PIPE_DATA.into(), length: ((size_of::<Message>() + body.len()) as u32).into() };
        let payload = [pipe.as_bytes(), message.as_bytes(), body].concat();
        self.channel.send(IN_BAND, 0, asked.transaction, &[], &payload);
        self.component.work();
    }

    /// Time goes on.
    fn wait(&mut self, nanoseconds: u64) {
        let clock = self.timers.clock();
        clock.advance_to(clock.now() + nanoseconds);
        self.component.work();
    }
}

#[test]
fn guest_chooses_among_our_versions() {
    let timers = timers();
    let mut bench = Bench::open(&timers, Heartbeat::default().device(&timers, no_bell()));
    let asked = bench.asked().unwrap();
    let (counts, versions) = Negotiate::read_from_prefix(&asked.body).unwrap();
    assert_eq!((counts.framework_count.get(), counts.message_count.get()), (2, 2));
    assert_eq!(versions, [version::FRAMEWORK, version::HEARTBEAT].concat().as_bytes());
    assert!(bench.asked().is_none(), "nothing more before the answer");
}

#[test]
fn guest_without_a_version_of_ours_is_left_alone() {
    let timers = timers();
    for (counts, version) in [((0, 0), Version::default()), ((1, 1), Version::new(9, 9)), ((2, 1), Version::new(3, 0))] {
        let heartbeat = Heartbeat::default();
        let mut bench = Bench::open(&timers, heartbeat.device(&timers, no_bell()));
        let asked = bench.asked().unwrap();
        let counts = Negotiate { framework_count: counts.0.into(), message_count: counts.1.into(), reserved: 0.into() };
        bench.answer(&asked, status::OK, &[counts.as_bytes(), Version::new(3, 0).as_bytes(), version.as_bytes()].concat());
        bench.wait(100 * SECOND);
        assert!(bench.asked().is_none());
        assert_eq!(heartbeat.pulse(0), Pulse::None);
    }
}

#[test]
fn heart_beats_every_two_seconds_and_is_lost_when_it_does_not() {
    let timers = timers();
    let heartbeat = Heartbeat::default();
    let mut bench = Bench::ready(&timers, heartbeat.device(&timers, no_bell()));
    for beat in 1..4 {
        let asked = bench.asked().unwrap();
        assert_eq!(Beat::read_from_bytes(&asked.body).unwrap().sequence.get(), beat);
        bench.answer(&asked, status::OK, &asked.body);
        assert!(bench.asked().is_none());
        bench.wait(2 * SECOND);
        assert_eq!(heartbeat.pulse(timers.clock().now()), Pulse::Beating);
    }
    bench.wait(9 * SECOND);
    assert_eq!(heartbeat.pulse(timers.clock().now()), Pulse::Lost(11 * SECOND));
    let asked = bench.asked().unwrap();
    assert!(bench.asked().is_none(), "one question is enough");
    bench.answer(&asked, status::OK, &asked.body);
    assert_eq!(heartbeat.pulse(timers.clock().now()), Pulse::Beating);
}

#[test]
fn heartbeat_ends_with_the_channel_and_begins_with_the_next() {
    let timers = timers();
    let heartbeat = Heartbeat::default();
    let mut bench = Bench::ready(&timers, heartbeat.device(&timers, no_bell()));
    // As by kexec.
    bench.guest.bus.reset();
    bench.component.work();
    assert_eq!(heartbeat.pulse(0), Pulse::None);
    let offer = bench.guest.connect()[0];
    bench.channel = bench.guest.open(offer.relid.get(), 5);
    bench.component.work();
    bench.choose(Version::new(3, 0));
    assert_eq!(heartbeat.pulse(0), Pulse::Beating);
}

#[test]
fn answers_that_nobody_asked_for_are_ignored() {
    let timers = timers();
    let heartbeat = Heartbeat::default();
    let mut bench = Bench::ready(&timers, heartbeat.device(&timers, no_bell()));
    let asked = bench.asked().unwrap();
    let wrong = [
        Asked { transaction: asked.transaction + 1, message: asked.message, body: Vec::new() },
        Asked { transaction: asked.transaction, message: Message { kind: kind::SHUTDOWN.into(), ..asked.message }, body: Vec::new() },
    ];
    bench.wait(20 * SECOND);
    for wrong in wrong {
        bench.answer(&wrong, status::OK, &[]);
    }
    bench.channel.send(IN_BAND, 0, asked.transaction, &[], b"short");
    bench.component.work();
    assert!(matches!(heartbeat.pulse(timers.clock().now()), Pulse::Lost(_)));
    for _ in 0..3 {
        bench.answer(&asked, status::OK, &[]);
    }
    assert_eq!(heartbeat.pulse(timers.clock().now()), Pulse::Beating);
    assert!(bench.asked().is_some());
    assert!(bench.asked().is_none());
}

#[test]
fn guest_is_asked_to_power_off_or_to_reboot() {
    let timers = timers();
    let component = Shutdown::new(no_bell());
    assert_eq!(component.request(false), Err(ShutdownError::NoDriver));
    let mut bench = Bench::ready(&timers, component.device(&timers));
    assert!(bench.asked().is_none());
    for (reboot, flags) in [(false, shutdown::POWER_OFF), (true, shutdown::REBOOT)] {
        assert_eq!(component.request(reboot), Ok(()));
        assert_eq!(component.request(reboot), Err(ShutdownError::Busy));
        bench.component.work();
        let asked = bench.asked().unwrap();
        let body = ShutdownBody::read_from_bytes(&asked.body).unwrap();
        assert_eq!((body.flags.get(), body.message), (flags, [0; SHUTDOWN_TEXT]));
        assert_eq!(component.request(reboot), Err(ShutdownError::Busy));
        bench.answer(&asked, status::OK, &asked.body);
    }
    component.request(false).unwrap();
    bench.component.work();
    let asked = bench.asked().unwrap();
    bench.answer(&asked, status::FAIL, &asked.body);
    assert_eq!(component.request(false), Err(ShutdownError::Refused(status::FAIL)));
    assert_eq!(component.request(false), Ok(()));
}

#[test]
fn old_drivers_cannot_reboot() {
    let timers = timers();
    let component = Shutdown::new(no_bell());
    let mut bench = Bench::open(&timers, component.device(&timers));
    bench.choose(Version::new(3, 0));
    assert_eq!(component.request(true), Err(ShutdownError::CannotReboot));
    assert_eq!(component.request(false), Ok(()));
}

#[test]
fn time_is_told_at_once_then_sampled_and_told_again_at_wish() {
    let timers = timers();
    let component = TimeSync::new(&timers, no_bell());
    assert!(!component.request());
    let mut bench = Bench::ready(&timers, component.device());
    let told = |bench: &mut Bench<TimeSync>| {
        let asked = bench.asked().unwrap();
        let time = Time::read_from_bytes(&asked.body).unwrap();
        bench.answer(&asked, status::OK, &asked.body);
        (time.flags, time.host_time.get(), time.reference_time.get())
    };
    // 2024-01-01 in units of 100 ns since 1601.
    let begin = 133_485_408_000_000_000;
    assert_eq!(told(&mut bench), (timesync::SYNC, begin, 0));
    bench.wait(29 * SECOND);
    assert!(bench.asked().is_none());
    bench.wait(SECOND);
    assert_eq!(told(&mut bench), (timesync::SAMPLE, begin + 300_000_000, 300_000_000));
    assert!(component.request());
    bench.component.work();
    assert_eq!(told(&mut bench).0, timesync::SYNC);
}

#[test]
fn older_guests_are_told_the_time_in_their_words() {
    let timers = timers();
    let mut bench = Bench::open(&timers, TimeSync::new(&timers, no_bell()).device());
    bench.choose(Version::new(3, 0));
    let asked = bench.asked().unwrap();
    assert_eq!(TimeSync3::read_from_bytes(&asked.body).unwrap().flags, timesync::SYNC);
}

#[test]
fn file_systems_come_to_rest_and_go_on() {
    let timers = timers();
    let component = Vss::new(no_bell());
    assert_eq!(component.freeze(), Err(VssError::NoDriver));
    let mut bench = Bench::ready(&timers, component.device(&timers));
    assert_eq!(component.file_systems(), FileSystems::Working);
    let mut done = |operation: u8, status: u32| {
        bench.component.work();
        let asked = bench.asked().unwrap();
        assert_eq!(VssBody::read_from_bytes(&asked.body).unwrap().operation, operation);
        bench.answer(&asked, status, &asked.body);
        component.file_systems()
    };
    component.freeze().unwrap();
    assert_eq!((component.file_systems(), component.thaw()), (FileSystems::Freezing, Err(VssError::Busy)));
    assert_eq!(done(vss::FREEZE, status::OK), FileSystems::Frozen);
    component.thaw().unwrap();
    assert_eq!(done(vss::THAW, status::OK), FileSystems::Working);
    component.freeze().unwrap();
    assert_eq!(done(vss::FREEZE, status::FAIL), FileSystems::CannotFreeze(status::FAIL));
    component.freeze().unwrap();
    assert_eq!(done(vss::FREEZE, status::OK), FileSystems::Frozen);
    bench.guest.bus.reset();
    bench.component.work();
    assert_eq!(component.file_systems(), FileSystems::NoDriver);
}

/// The guest's side of key/value pairs: its pools.
#[derive(Default)]
struct Pools {
    records: [Vec<(String, String)>; 5],
    /// The verdict goes over the body's header, as OpenBSD has it.
    verdict_in_body: bool,
}

fn text(field: &[u8], size: u32) -> String {
    let units: Vec<u16> = field[..size as usize].chunks(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]])).collect();
    assert_eq!(units.last(), Some(&0));
    String::from_utf16(&units[..units.len() - 1]).unwrap()
}

fn field<const N: usize>(text: &str) -> ([u8; N], u32) {
    let mut field = [0; N];
    let bytes: Vec<u8> = text.encode_utf16().chain([0]).flat_map(u16::to_le_bytes).collect();
    field[..bytes.len()].copy_from_slice(&bytes);
    (field, bytes.len() as u32)
}

impl Pools {
    /// Answers all requests; how many there were.
    fn serve(&mut self, bench: &mut Bench<Kvp>) -> usize {
        let mut count = 0;
        while let Some(mut asked) = bench.asked() {
            count += 1;
            assert!(count < 5000, "no end");
            assert_eq!(asked.body.len(), pairs::BODY_BYTES);
            let verdict = self.act(&mut asked.body);
            let body = asked.body.clone();
            if self.verdict_in_body {
                let header = if verdict == status::OK { 0 } else { verdict };
                bench.answer(&asked, status::OK, &[&header.to_le_bytes(), &body[4..]].concat());
            } else {
                bench.answer(&asked, verdict, &body);
            }
        }
        count
    }

    fn act(&mut self, body: &mut [u8]) -> u32 {
        let (header, rest) = body.split_at_mut(4);
        let records = &mut self.records[usize::from(header[1])];
        match header[0] {
            pairs::operation::SET => {
                let (record, _) = pairs::Record::read_from_prefix(rest).unwrap();
                assert_eq!(record.value_type.get(), pairs::TEXT);
                let (key, value) = (text(&record.key, record.key_size.get()), text(&record.value, record.value_size.get()));
                records.retain(|(there, _)| *there != key);
                records.push((key, value));
                status::OK
            }
            pairs::operation::DELETE => {
                let (key, _) = pairs::Key::read_from_prefix(rest).unwrap();
                let key = text(&key.key, key.key_size.get());
                records.retain(|(there, _)| *there != key);
                status::OK
            }
            pairs::operation::ENUMERATE => {
                let (enumerate, _) = pairs::Enumerate::mut_from_prefix(rest).unwrap();
                let Some((key, value)) = records.get(enumerate.index.get() as usize) else { return status::NO_MORE_ITEMS };
                let ((key, key_size), (value, value_size)) = (field(key), field(value));
                enumerate.record =
                    pairs::Record { value_type: pairs::TEXT.into(), key_size: key_size.into(), value_size: value_size.into(), key, value };
                status::OK
            }
            other => panic!("operation {other}"),
        }
    }

    fn pool(&self, pool: u8) -> Vec<(&str, &str)> {
        let mut records: Vec<(&str, &str)> = self.records[usize::from(pool)].iter().map(|(key, value)| (&key[..], &value[..])).collect();
        records.sort_unstable();
        records
    }
}

fn pair(key: &str, value: &str) -> (String, String) {
    (key.into(), value.into())
}

fn store(keys: &[(&str, &str)]) -> Arc<MapStore> {
    let store = Arc::new(MapStore::default());
    for (path, value) in keys {
        store.write(Client::Host, path, value.as_bytes()).unwrap();
    }
    store
}

fn kvp(store: &Arc<MapStore>) -> Bench<Kvp> {
    let timers = timers();
    let facts = Facts(vec![("VirtualMachineName", "machine".into())]);
    Bench::ready(&timers, Kvp::new(store.clone(), facts, no_bell()).device(&timers, no_bell()))
}

#[test]
fn keys_for_guests_are_in_the_external_pool() {
    let store = store(&[("vm-data/hostname", "web1"), ("vm-data/a/b", "deep"), ("vm-data/a@20b", "gr\u{fc}n \u{1f980}"), ("data/x", "no")]);
    for verdict_in_body in [false, true] {
        let mut pools = Pools { verdict_in_body, ..Pools::default() };
        let mut bench = kvp(&store);
        pools.serve(&mut bench);
        assert_eq!(pools.pool(pairs::pool::EXTERNAL), [("a b", "gr\u{fc}n \u{1f980}"), ("a.b", "deep"), ("hostname", "web1")]);
        assert_eq!(pools.pool(pairs::pool::AUTO_EXTERNAL), [("VirtualMachineName", "machine")]);
    }
}

#[test]
fn changes_of_the_store_follow_and_nothing_is_said_twice() {
    let store = store(&[("vm-data/a", "1"), ("vm-data/b", "2")]);
    let mut pools = Pools::default();
    let mut bench = kvp(&store);
    pools.serve(&mut bench);
    store.write(Client::Host, "vm-data/a", b"changed").unwrap();
    store.remove(Client::Host, "vm-data/b").unwrap();
    store.write(Client::Host, "vm-data/c", b"new").unwrap();
    bench.component.work();
    assert_eq!(pools.serve(&mut bench), 3);
    assert_eq!(pools.pool(pairs::pool::EXTERNAL), [("a", "changed"), ("c", "new")]);
    store.write(Client::Host, "vm-data/c", b"new").unwrap();
    bench.component.work();
    assert_eq!(pools.serve(&mut bench), 0);
}

#[test]
fn keys_of_an_earlier_time_are_deleted() {
    let store = store(&[("vm-data/stays", "1")]);
    let mut pools = Pools::default();
    pools.records[0] = vec![pair("gone", "x"), pair("stays", "old")];
    pools.serve(&mut kvp(&store));
    assert_eq!(pools.pool(pairs::pool::EXTERNAL), [("stays", "1")]);
}

#[test]
fn what_a_pool_cannot_hold_is_not_sent() {
    let (long_key, long_value) = (format!("vm-data/{}", "k".repeat(256)), "v".repeat(1024));
    let store = store(&[(&long_key, "x"), ("vm-data/long", &long_value), ("vm-data/zero", "a\0b"), ("vm-data/empty", "")]);
    store.write(Client::Host, "vm-data/binary", b"\xff").unwrap();
    store.write(Client::Host, "vm-data/fits", "v".repeat(1023).as_bytes()).unwrap();
    let mut pools = Pools::default();
    pools.serve(&mut kvp(&store));
    assert_eq!(pools.pool(pairs::pool::EXTERNAL).iter().map(|(key, _)| *key).collect::<Vec<_>>(), ["fits"]);
}

#[test]
fn what_the_guest_says_is_in_the_store_as_long_as_it_says_it() {
    for verdict_in_body in [false, true] {
        let store = store(&[]);
        let mut pools = Pools { verdict_in_body, ..Pools::default() };
        pools.records[1] = vec![pair("said.by-guest", "hello"), pair("other", "x")];
        pools.records[2] = vec![pair("OSName", "Debian")];
        let mut bench = kvp(&store);
        pools.serve(&mut bench);
        let read = |path: &str| store.read(Client::Host, path).ok();
        assert_eq!(read("data/hyperv/Guest/said/by-guest").as_deref(), Some(&b"hello"[..]));
        assert_eq!(read("data/hyperv/Auto/OSName").as_deref(), Some(&b"Debian"[..]));
        let_time_pass(&mut pools, &mut bench);
        pools.records[1] = vec![pair("said.by-guest", "bye")];
        bench.wait(4 * SECOND);
        assert_eq!(pools.serve(&mut bench), 0, "not so often");
        bench.wait(SECOND);
        pools.serve(&mut bench);
        assert_eq!(read("data/hyperv/Guest/said/by-guest").as_deref(), Some(&b"bye"[..]));
        assert_eq!(read("data/hyperv/Guest/other"), None);
        assert_eq!(read("data/hyperv/Auto/OSName").as_deref(), Some(&b"Debian"[..]));
    }
}

/// So much that the guest is asked as seldom as at all.
fn let_time_pass(pools: &mut Pools, bench: &mut Bench<Kvp>) {
    for _ in 0..8 {
        bench.wait(5 * SECOND);
        pools.serve(bench);
    }
}

#[test]
fn guest_that_was_just_told_something_is_asked_soon() {
    let store = store(&[("vm-data/a", "1")]);
    let mut pools = Pools::default();
    let mut bench = kvp(&store);
    pools.serve(&mut bench);
    for question in ["first", "second"] {
        let_time_pass(&mut pools, &mut bench);
        store.write(Client::Host, "vm-data/a", question.as_bytes()).unwrap();
        bench.component.work();
        pools.serve(&mut bench);
        pools.records[1] = vec![pair("said", question)];
        bench.wait(SECOND / 10);
        assert_eq!(pools.serve(&mut bench), 2, "the pool Guest, and no other");
        assert_eq!(store.read(Client::Host, "data/hyperv/Guest/said").unwrap(), question.as_bytes());
    }
}

#[test]
fn guest_whose_daemon_is_gone_loses_no_reports() {
    let store = store(&[]);
    let mut pools = Pools::default();
    pools.records[2] = vec![pair("OSName", "Debian")];
    let mut bench = kvp(&store);
    pools.serve(&mut bench);
    bench.wait(5 * SECOND);
    while let Some(asked) = bench.asked() {
        bench.answer(&asked, status::FAIL, &asked.body);
    }
    assert!(store.read(Client::Host, "data/hyperv/Auto/OSName").is_ok());
}

#[test]
fn keys_that_the_guest_did_not_take_are_offered_again() {
    let store = store(&[("vm-data/a", "1")]);
    let mut bench = kvp(&store);
    while let Some(asked) = bench.asked() {
        bench.answer(&asked, status::FAIL, &asked.body);
    }
    bench.wait(5 * SECOND);
    let mut pools = Pools::default();
    pools.serve(&mut bench);
    assert_eq!(pools.pool(pairs::pool::EXTERNAL), [("a", "1")]);
}

#[test]
fn guest_whose_pool_has_no_end_is_asked_only_so_often() {
    let store = store(&[]);
    let mut bench = kvp(&store);
    let ((key, key_size), (value, value_size)) = (field("key"), field("value"));
    let record = pairs::Record { value_type: pairs::TEXT.into(), key_size: key_size.into(), value_size: value_size.into(), key, value };
    let mut count = 0;
    while let Some(mut asked) = bench.asked() {
        if asked.body[0] == pairs::operation::ENUMERATE {
            count += 1;
            asked.body[8..8 + size_of::<pairs::Record>()].copy_from_slice(record.as_bytes());
        }
        assert!(count < 5000, "no end");
        bench.answer(&asked, status::OK, &asked.body);
    }
    assert_eq!(store.list(Client::Host, "data/hyperv/Guest").unwrap(), ["key"]);
}

#[test]
fn records_that_lie_about_their_sizes_are_read_within_their_fields() {
    let store = store(&[]);
    let mut bench = kvp(&store);
    let mut is_first = true;
    while let Some(mut asked) = bench.asked() {
        let is_report = asked.body[..2] == [pairs::operation::ENUMERATE, pairs::pool::GUEST];
        if is_report && std::mem::take(&mut is_first) {
            let record = pairs::Record {
                value_type: pairs::TEXT.into(),
                key_size: u32::MAX.into(),
                value_size: u32::MAX.into(),
                key: [b'k'; pairs::KEY_SIZE],
                value: [0xd8; pairs::VALUE_SIZE],
            };
            asked.body[8..8 + size_of::<pairs::Record>()].copy_from_slice(record.as_bytes());
            bench.answer(&asked, status::OK, &asked.body);
        } else {
            // Shorter than any answer.
            bench.answer(&asked, status::NO_MORE_ITEMS, &[]);
        }
    }
    assert_eq!(store.list(Client::Host, "data/hyperv/Guest").unwrap().len(), 1);
}
