//! GuestRPC against a small scripted host that can misbehave in every step.

use alloc::collections::{BTreeMap, VecDeque};
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;

use abi::vmware::backdoor::{GETMHZ, GETVERSION, HYPERCALL_HB, MAGIC, MESSAGE, PORT_HB, VERSION};
use abi::vmware::message::{self as words, status};
use proptest::prelude::*;

use super::*;
use crate::driver::Driver;
use crate::hal::{Gate, Hal, HalError, Registers, SECOND, Transfer};
use crate::store::{Store, StoreError};
use crate::testing::{FakeHal, Host};

/// How a step of the message protocol goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// Status without success: these bits.
    Status(u16),
    /// The channel is closed.
    Close,
    /// The kind of message in EDX is wrong.
    Type,
}

struct Open {
    protocol: u32,
    incoming: Vec<u8>,
    expected: usize,
    reply: Option<Vec<u8>>,
    sent: usize,
}

/// A host with GuestRPC and a few keys.
pub(super) struct Script {
    /// The gate that VMware answers at.
    pub gate: Gate,
    /// Whether high bandwidth is offered, and whether this system has it.
    pub high: (bool, bool),
    pub cookies: bool,
    /// High bandwidth is offered, and then refused.
    pub refuses_high: bool,
    /// Answers of RPCI never come.
    pub silent: bool,
    /// Added to every announced length.
    pub lie: u32,
    /// What goes wrong in which step, counted from 0.
    pub faults: BTreeMap<usize, Fault>,
    pub steps: usize,
    pub keys: BTreeMap<String, Vec<u8>>,
    /// Answers to requests, in place of what the host would say.
    pub replies: VecDeque<Vec<u8>>,
    /// RPCI requests seen.
    pub requests: Vec<Vec<u8>>,
    /// TCLO requests to make, and replies seen.
    pub tclo: VecDeque<&'static str>,
    pub tclo_replies: Vec<String>,
    /// High-bandwidth calls seen.
    pub high_calls: usize,
    channels: Vec<Option<Open>>,
}

const COOKIE: (u32, u32) = (0x1234_5678, 0x9abc_def0);
/// Seconds and microseconds of the host's clock.
pub(super) const TIME: (u64, u32) = (1_800_000_000, 250_000);

impl Default for Script {
    fn default() -> Script {
        Script {
            gate: Gate::In,
            high: (true, true),
            refuses_high: false,
            cookies: true,
            silent: false,
            lie: 0,
            faults: BTreeMap::new(),
            steps: 0,
            keys: BTreeMap::from([("guestinfo.a".to_string(), b"some value".to_vec())]),
            replies: VecDeque::new(),
            requests: Vec::new(),
            tclo: VecDeque::new(),
            tclo_replies: Vec::new(),
            high_calls: 0,
            channels: Vec::new(),
        }
    }
}

impl Script {
    pub(super) fn open_channels(&self) -> usize {
        self.channels.iter().flatten().count()
    }

    /// Closes the open channels of a protocol, as VMware does to the older one when a second TCLO channel is opened.
    pub(super) fn close_all(&mut self, protocol: u32) {
        self.channels.iter_mut().filter(|slot| slot.as_ref().is_some_and(|open| open.protocol == protocol)).for_each(|slot| *slot = None);
    }

    fn answer(&mut self, request: &[u8]) -> Vec<u8> {
        self.requests.push(request.to_vec());
        if let Some(reply) = self.replies.pop_front() {
            return reply;
        }
        let text = String::from_utf8_lossy(request).into_owned();
        let mut parts = text.splitn(3, ' ');
        match (parts.next(), parts.next(), parts.next()) {
            (Some("info-get"), Some(key), None) => match self.keys.get(key) {
                Some(value) => [b"1 ", value.as_slice()].concat(),
                None => b"0 No value found".to_vec(),
            },
            (Some("info-set"), Some(key), Some(_)) => {
                self.keys.insert(key.to_string(), request[10 + key.len()..].to_vec());
                b"1 ".to_vec()
            }
            _ => b"1 ".to_vec(),
        }
    }

    fn received(&mut self, id: usize) {
        let open = self.channels[id].as_mut().unwrap();
        let message = core::mem::take(&mut open.incoming);
        if open.protocol == words::TCLO {
            if !message.is_empty() {
                self.tclo_replies.push(String::from_utf8(message).unwrap());
            }
            open.reply = self.tclo.pop_front().map(|request| request.as_bytes().to_vec());
        } else {
            let reply = self.answer(&message);
            self.channels[id].as_mut().unwrap().reply = (!self.silent).then_some(reply);
        }
    }

    /// Status of a step, if it goes wrong.
    fn fault(&mut self, id: usize) -> Option<u16> {
        let fault = self.faults.remove(&self.steps);
        self.steps += 1;
        match fault? {
            Fault::Status(status) => Some(status),
            Fault::Close => {
                self.channels[id] = None;
                Some(status::CLOSED)
            }
            Fault::Type => None,
        }
    }

    fn step(&mut self, r: &mut Registers) {
        let step = (r.rcx >> 16) as u16;
        let id = (r.rdx >> 16) as usize & 0xffff;
        let (ebx, cookie) = (r.rbx as u32, (r.rsi as u32, r.rdi as u32));
        let wrong_type = self.faults.get(&self.steps) == Some(&Fault::Type);
        let mut set = |status: u16, high: u16, ebx: u32| {
            r.rcx = u64::from(status) << 16;
            r.rdx = u64::from(if wrong_type { 0x77 } else { high }) << 16;
            r.rbx = u64::from(ebx);
        };
        if step == words::OPEN {
            if ebx & words::COOKIE != 0 && !self.cookies {
                return set(0, 0, 0);
            }
            self.channels.push(Some(Open { protocol: ebx & !words::COOKIE, incoming: Vec::new(), expected: 0, reply: None, sent: 0 }));
            set(status::SUCCESS, (self.channels.len() - 1) as u16, 0);
            (r.rsi, r.rdi) = if self.cookies { (COOKIE.0.into(), COOKIE.1.into()) } else { (77, 78) };
            return;
        }
        if !matches!(self.channels.get(id), Some(Some(_))) {
            return set(status::CLOSED, 0, 0);
        }
        assert_eq!(cookie, if self.cookies { COOKIE } else { (0, 0) });
        if step != words::CLOSE
            && let Some(status) = self.fault(id)
        {
            return set(status, 0, 0);
        }
        let offer = status::SUCCESS | if self.high.0 { status::HB } else { 0 };
        let open = self.channels[id].as_mut().unwrap();
        match step {
            words::SENDSIZE => {
                open.incoming.clear();
                open.expected = ebx as usize;
                set(offer, 0, 0);
                if ebx == 0 {
                    self.received(id);
                }
            }
            words::SENDPAYLOAD => {
                let missing = open.expected - open.incoming.len();
                open.incoming.extend(ebx.to_le_bytes().iter().take(missing));
                set(status::SUCCESS, 0, 0);
                if open.incoming.len() == open.expected {
                    self.received(id);
                }
            }
            words::RECVSIZE => {
                open.sent = 0;
                match &open.reply {
                    Some(reply) => set(offer | status::DORECV, words::TYPE_SENDSIZE, (reply.len() as u32).wrapping_add(self.lie)),
                    None => set(status::SUCCESS, 0, 0),
                }
            }
            words::RECVPAYLOAD => {
                let mut word = [0; 4];
                let rest = &open.reply.as_ref().unwrap()[open.sent.min(open.reply.as_ref().unwrap().len())..];
                word.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
                open.sent += 4;
                set(status::SUCCESS, words::TYPE_SENDPAYLOAD, u32::from_le_bytes(word));
            }
            words::RECVSTATUS => {
                open.reply = None;
                set(status::SUCCESS, 0, 0);
            }
            words::CLOSE => {
                self.channels[id] = None;
                set(status::SUCCESS, 0, 0);
            }
            _ => set(0, 0, 0),
        }
    }

    fn high(&mut self, r: &mut Registers, transfer: Transfer<'_>) {
        self.high_calls += 1;
        if self.refuses_high {
            r.rbx &= 0xffff;
            return;
        }
        let id = (r.rdx >> 16) as usize;
        if self.channels[id].is_none() {
            r.rbx = u64::from(status::CLOSED) << 16;
            return;
        }
        if let Some(status) = self.fault(id) {
            r.rbx = u64::from(status) << 16;
            return;
        }
        assert_eq!(r.rbx, 1 << 16);
        let cookie = if self.cookies { COOKIE } else { (0, 0) };
        r.rbx = u64::from(status::SUCCESS) << 16;
        let open = self.channels[id].as_mut().unwrap();
        match transfer {
            Transfer::Out(data) => {
                assert_eq!((r.rbp as u32, r.rdi as u32, r.rcx as usize), (cookie.0, cookie.1, data.len()));
                assert_eq!(open.expected, data.len());
                open.incoming = data.to_vec();
                self.received(id);
            }
            Transfer::In(data) => {
                assert_eq!((r.rsi as u32, r.rbp as u32, r.rcx as usize), (cookie.0, cookie.1, data.len()));
                data.iter_mut().zip(open.reply.as_ref().unwrap()).for_each(|(to, from)| *to = *from);
            }
            Transfer::None | Transfer::Exchange(_) => unreachable!(),
        }
    }
}

impl Host for Script {
    fn call(&mut self, gate: Gate, r: &mut Registers, transfer: Transfer<'_>) -> Result<(), HalError> {
        if gate != self.gate {
            return if matches!(gate, Gate::Vmcall | Gate::Vmmcall) { Err(HalError::Fault) } else { Ok(()) };
        }
        let high = match gate {
            Gate::In | Gate::Out => r.rdx as u16 == PORT_HB,
            Gate::Vmcall | Gate::Vmmcall => r.rdx as u16 & HYPERCALL_HB != 0,
        };
        assert_eq!(r.rax, u64::from(MAGIC));
        if high && !self.high.1 {
            return Err(HalError::Unavailable);
        } else if high {
            self.high(r, transfer);
            return Ok(());
        }
        match r.rcx as u16 {
            GETVERSION => (r.rax, r.rbx) = (VERSION.into(), MAGIC.into()),
            GETMHZ => r.rax = 3000,
            abi::vmware::backdoor::GETTIMEFULL => (r.rsi, r.rdx, r.rbx) = (TIME.0 >> 32, TIME.0 & 0xffff_ffff, TIME.1.into()),
            MESSAGE => self.step(r),
            _ => r.rax = u64::from(u32::MAX),
        }
        Ok(())
    }
}

fn store<H: Host>(hal: &FakeHal<H>) -> Guestinfo<'_> {
    Guestinfo::new(Rpci::new(Backdoor::find(hal, None).unwrap()))
}

fn read(script: Script) -> Result<Vec<u8>, StoreError> {
    store(&FakeHal::new(script)).read(b"guestinfo.a")
}

#[test]
fn value_comes_through_every_gate_in_both_bandwidths() {
    for gate in [Gate::In, Gate::Out, Gate::Vmcall, Gate::Vmmcall] {
        for high in [(false, true), (true, true), (true, false)] {
            for cookies in [true, false] {
                let hal = FakeHal::new(Script { gate, high, cookies, ..Script::default() });
                let mut store = Guestinfo::new(Rpci::new(Backdoor::through(&hal, gate).unwrap()));
                assert_eq!(store.read(b"guestinfo.a").unwrap(), b"some value", "{gate:?} {high:?}");
                store.write(b"guestinfo.b", b"two words").unwrap();
                assert_eq!(hal.host().keys["guestinfo.b"], b"two words");
                assert_eq!(hal.host().high_calls > 0, high == (true, true));
                assert_eq!(hal.host().open_channels(), 0, "each request closes its channel");
            }
        }
    }
}

#[test]
fn high_bandwidth_that_is_offered_and_refused_is_done_without() {
    let hal = FakeHal::new(Script { refuses_high: true, ..Script::default() });
    assert_eq!(store(&hal).read(b"guestinfo.a").unwrap(), b"some value");
    assert_eq!(hal.host().high_calls, 1, "it is tried once on a channel");
}

#[test]
fn values_of_every_length_arrive_whole() {
    for high in [(false, true), (true, true)] {
        for length in 0..70 {
            let value: Vec<u8> = (0..length).map(|byte| byte as u8).collect();
            let hal = FakeHal::new(Script { high, ..Script::default() });
            store(&hal).write(b"guestinfo.b", &value).unwrap();
            assert_eq!(store(&hal).read(b"guestinfo.b").unwrap(), value);
        }
    }
}

#[test]
fn hypercall_is_tried_first_where_the_interface_names_one() {
    let hal = FakeHal::new(Script { gate: Gate::Vmmcall, ..Script::default() })
        .base(0x4000_0000, 0x4000_0010, abi::hypervisor::VMWARE)
        .leaf(0x4000_0010, 0, 0, abi::vmware::CPUID_VMMCALL, 0);
    let detection = crate::detect(&hal);
    assert_eq!(Backdoor::find(&hal, detection.find(crate::Kind::Vmware)).unwrap().gate(), Gate::Vmmcall);
    assert!(matches!(Backdoor::find(&hal, None), Err(BackdoorError::Silent)));
}

#[test]
fn port_that_reads_as_all_ones_is_no_backdoor() {
    struct Ones;
    impl Host for Ones {
        fn call(&mut self, _: Gate, r: &mut Registers, _: Transfer<'_>) -> Result<(), HalError> {
            r.rax = u64::from(u32::MAX);
            Ok(())
        }
    }
    assert!(matches!(Backdoor::find(&FakeHal::new(Ones), None), Err(BackdoorError::Silent)));
}

#[test]
fn port_that_is_denied_is_told_apart_from_none() {
    struct Denied;
    impl Host for Denied {
        fn call(&mut self, gate: Gate, _: &mut Registers, _: Transfer<'_>) -> Result<(), HalError> {
            Err(if gate == Gate::In { HalError::Denied } else { HalError::Unavailable })
        }
    }
    assert!(matches!(Backdoor::find(&FakeHal::new(Denied), None), Err(BackdoorError::Hal(HalError::Denied))));
}

#[test]
fn missing_key_is_not_found() {
    assert_eq!(store(&FakeHal::new(Script::default())).read(b"guestinfo.none"), Err(StoreError::NotFound));
}

#[test]
fn key_with_a_blank_cannot_be_written() {
    assert_eq!(store(&FakeHal::new(Script::default())).write(b"guestinfo.a b", b"x"), Err(StoreError::BadKey));
}

#[test]
fn value_of_60_kib_is_written_and_one_of_64_kib_refused() {
    let hal = FakeHal::new(Script::default());
    let value = vec![b'x'; 60 * 1024];
    store(&hal).write(b"guestinfo.b", &value).unwrap();
    assert_eq!(store(&hal).read(b"guestinfo.b").unwrap(), value);
    assert_eq!(store(&hal).write(b"guestinfo.b", &vec![b'x'; 64 * 1024]), Err(StoreError::TooLong));
}

#[test]
fn checkpoint_in_any_step_is_survived() {
    for high in [(false, true), (true, true)] {
        let steps = steps_of_a_read(high);
        for step in 0..steps {
            let faults = BTreeMap::from([(step, Fault::Status(status::CHECKPOINT))]);
            assert_eq!(read(Script { high, faults, ..Script::default() }).unwrap(), b"some value", "step {step} of {steps}");
        }
    }
}

#[test]
fn channel_closed_in_any_step_is_opened_again() {
    for high in [(false, true), (true, true)] {
        for step in 0..steps_of_a_read(high) {
            let faults = BTreeMap::from([(step, Fault::Close)]);
            assert_eq!(read(Script { high, faults, ..Script::default() }).unwrap(), b"some value", "step {step}");
        }
    }
}

#[test]
fn host_that_closes_every_channel_is_an_error() {
    let faults = (0..100).map(|step| (step, Fault::Close)).collect();
    assert!(matches!(read(Script { faults, ..Script::default() }), Err(StoreError::Transport(_))));
}

#[test]
fn endless_checkpoints_are_an_error() {
    let faults = (0..1000).map(|step| (step, Fault::Status(status::CHECKPOINT))).collect();
    assert!(matches!(read(Script { faults, ..Script::default() }), Err(StoreError::Transport(_))));
}

#[test]
fn refused_steps_and_wrong_kinds_are_errors() {
    for fault in [Fault::Status(0), Fault::Status(status::UNSENT), Fault::Status(status::POWEROFF), Fault::Type] {
        // The second step of a low-bandwidth read that has a kind is the one after the request is sent.
        let steps = steps_of_a_read((false, true));
        let results: Vec<_> = (0..steps)
            .map(|step| read(Script { high: (false, true), faults: BTreeMap::from([(step, fault)]), ..Script::default() }))
            .collect();
        assert!(results.iter().any(|result| matches!(result, Err(StoreError::Transport(_)))), "{fault:?}: {results:?}");
        assert!(results.iter().all(|result| matches!(result, Err(StoreError::Transport(_)) | Ok(_))), "{fault:?}: {results:?}");
    }
}

#[test]
fn host_that_never_answers_is_a_timeout() {
    let hal = FakeHal::new(Script { silent: true, ..Script::default() });
    assert_eq!(store(&hal).read(b"guestinfo.a"), Err(StoreError::Timeout));
    assert_eq!(hal.now(), 5 * SECOND);
    assert_eq!(hal.host().open_channels(), 0);
    assert!(hal.host().steps < 200, "it is not asked all the time: {}", hal.host().steps);
}

#[test]
fn announced_length_beyond_all_limits_is_refused() {
    assert_eq!(read(Script { lie: u32::MAX - 100, ..Script::default() }), Err(StoreError::TooLong));
    assert_eq!(read(Script { lie: MAX_REPLY as u32, ..Script::default() }), Err(StoreError::TooLong));
}

#[test]
fn announced_length_is_what_is_received_even_if_it_is_a_lie() {
    for high in [(false, true), (true, true)] {
        assert_eq!(read(Script { high, lie: 3, ..Script::default() }).unwrap(), b"some value\0\0\0");
        assert_eq!(read(Script { high, lie: 0u32.wrapping_sub(3), ..Script::default() }).unwrap(), b"some va");
    }
}

#[test]
fn short_replies_are_told_apart() {
    let reply = |reply: &[u8]| read(Script { replies: VecDeque::from([reply.to_vec()]), ..Script::default() });
    assert_eq!(reply(b"1 "), Ok(Vec::new()));
    assert_eq!(reply(b"1"), Ok(Vec::new()));
    assert_eq!(reply(b"0"), Err(StoreError::Refused(String::new())));
    assert_eq!(reply(b"0 No value found\0"), Err(StoreError::NotFound));
    assert_eq!(reply(b"0 Permission denied"), Err(StoreError::Denied));
    assert_eq!(reply(b"0 Unknown command"), Err(StoreError::Refused("Unknown command".to_string())));
    for malformed in [b"".as_slice(), b"2 x", b"10 x", b"OK", b" "] {
        assert!(matches!(reply(malformed), Err(StoreError::Transport(_))), "{malformed:?}");
    }
}

#[test]
fn store_says_what_it_cannot_do() {
    let hal = FakeHal::new(Script::default());
    assert_eq!(store(&hal).list(b"guestinfo."), Err(StoreError::Unsupported));
    assert_eq!(store(&hal).remove(b"guestinfo.a"), Err(StoreError::Unsupported));
    assert_eq!(store(&hal).length(b"guestinfo.a"), Ok(10));
}

#[test]
fn watch_tells_of_new_values_once() {
    let hal = FakeHal::new(Script::default());
    let mut store = store(&hal);
    let mut watch = store.watch(b"guestinfo.new").unwrap();
    assert_eq!(store.changed(&mut watch), Ok(None));
    hal.host().keys.insert("guestinfo.new".to_string(), b"1".to_vec());
    assert_eq!(store.changed(&mut watch), Ok(Some(Some(b"1".to_vec()))));
    assert_eq!(store.changed(&mut watch), Ok(None));
    hal.host().keys.clear();
    assert_eq!(store.changed(&mut watch), Ok(Some(None)));
}

#[test]
fn time_comes_from_the_backdoor() {
    let hal = FakeHal::new(Script::default());
    let time = Backdoor::find(&hal, None).unwrap().time().unwrap().unwrap();
    assert_eq!((time.seconds, time.microseconds), TIME);
}

fn steps_of_a_read(high: (bool, bool)) -> usize {
    let hal = FakeHal::new(Script { high, ..Script::default() });
    store(&hal).read(b"guestinfo.a").unwrap();
    hal.host().steps
}

/// A host that answers anything.
struct Noise(VecDeque<[u32; 6]>, bool);

impl Host for Noise {
    fn call(&mut self, _: Gate, r: &mut Registers, transfer: Transfer<'_>) -> Result<(), HalError> {
        match r.rcx as u16 {
            GETVERSION => (r.rax, r.rbx) = (VERSION.into(), MAGIC.into()),
            GETMHZ => r.rax = 3000,
            _ => {
                if let Transfer::In(data) = transfer {
                    data.fill(b'1');
                }
                let [a, b, c, d, s, i] =
                    self.0.pop_front().unwrap_or([u32::MAX, 5, if self.1 { u32::MAX } else { 1 << 16 }, 1 << 16, 0, 0]);
                (r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi) = (a.into(), b.into(), c.into(), d.into(), s.into(), i.into());
            }
        }
        Ok(())
    }
}

proptest! {
    #[test]
    fn no_answers_of_a_host_panic_or_hang(answers in prop::collection::vec(any::<[u32; 6]>(), 0..200), always in any::<bool>()) {
        let answers = answers.into_iter().map(|mut answer| {
            // Mostly successes, or nothing gets far.
            answer[2] |= 1 << 16;
            answer[1] &= 0xffff_01ff;
            answer
        });
        let hal = FakeHal::new(Noise(answers.collect(), always)).base(0x4000_0000, 0x4000_0010, abi::hypervisor::VMWARE);
        let detection = crate::detect(&hal);
        if let Ok(mut vmt) = Vmt::attach(&hal, &detection.interfaces[0]) {
            for second in 0..20 {
                vmt.poll(second * SECOND, &mut Vec::new());
            }
        }
        let mut store = store(&hal);
        let _ = store.read(b"guestinfo.a");
        let _ = store.write(b"guestinfo.a", b"some text");
        prop_assert!(hal.now() <= 11 * SECOND);
    }
}
