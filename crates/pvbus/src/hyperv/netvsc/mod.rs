//! hvn: a network card ([`abi::hyperv::netvsc`], [`abi::hyperv::rndis`]).
//!
//! The driver agrees with the host step by step, without waiting; then the card is up. Frames are copied from the receive buffer, and to pages of the driver's
//! own. Checksums of TCP and UDP are left to the host where it does both over IPv4 and IPv6.
//!
//! ```text
//!   NVSP: version, newest first --> buffer --> RNDIS: INITIALIZE --> address, frame size, offloads --> offloads on --> filter --> up
//!
//!   NetDevice::send    --frame--> rndis.rs --> wire.rs --channel--> host
//!   NetDevice::receive <--frame-- rndis.rs <-- wire.rs <--channel-- host
//! ```
//!
//! One channel: one processor copies all frames. OpenBSD `sys/dev/pv/if_hvn.c` is the model; its line in the message buffer is OpenBSD's.

mod rndis;
mod wire;

use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;

use abi::hyperv::netvsc::{Init, InitComplete, NdisConfig, ReceiveBufferComplete, SendBuffer, kind, status as nvsp_status, version};
use abi::hyperv::rndis::{
    Complete, FILTER_ALL_MULTICAST, FILTER_BROADCAST, FILTER_DIRECTED, IndicateStatus, Initialize, InitializeComplete, MAJOR_VERSION,
    OFFLOAD_SIZES, ObjectHeader, Offload, OffloadParameters, QueryComplete, checksum_offload, message, object, offload_parameter, oid,
    status,
};
use spin::Mutex;
use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::Platform;
use super::channel::{Channel, PAGE};
use super::hyperv0::{Buffer, Device, Failure, Needs};
use crate::driver::Event;
use crate::hal::{HalError, Nanos, SECOND};
use crate::net::checksum::complete;
use crate::net::{Checksum, ETHERNET_HEADER, NetDevice, NetError, Received, VLAN_TAG};
use rndis::Message;
use wire::{MAX_MESSAGE, Wire};

/// Pages of data in each ring.
const RING_PAGES: usize = 16;
/// Pages of the receive buffer: 1 MiB, some hundred frames.
const BUFFER_PAGES: usize = 256;
/// The guest's name for it, as OpenBSD says it.
const RECEIVE_BUFFER_ID: u16 = 0x2409;
/// Versions of NVSP, newest first.
const VERSIONS: [u32; 5] = [version::V61, version::V6, version::V5, version::V4, version::V2];
/// Versions of NDIS: up to NVSP 4, and since.
const NDIS: [(u32, u32); 2] = [(6, 1), (6, 30)];
/// MTU that the host is told.
const MTU: usize = 1500;
/// The same with the header of a frame.
const NDIS_MTU: u32 = 1514;
const _: () = assert!(NDIS_MTU as usize == MTU + ETHERNET_HEADER);
/// Most bytes that the host may send at once, as Linux says.
const MAX_TRANSFER: u32 = 0x4000;
/// How long an answer is waited for.
const PATIENCE: Nanos = 30 * SECOND;
/// Bytes of [`OffloadParameters`] in revision 3 (`struct ndis_offload_params` of Linux `drivers/net/hyperv/hyperv_net.h`).
const PARAMETERS_SIZE: u16 = 28;
const PARAMETERS_REVISION: u8 = 3;
/// Revision of [`Offload`] that is asked for, the newest.
const OFFLOAD_REVISION: u8 = 3;
const _: () = assert!(OFFLOAD_REVISION as usize == OFFLOAD_SIZES.len());
/// Most messages of the host's in one call: more than its buffer holds are none.
const MESSAGES: usize = 1024;
/// Bytes of a frame's RNDIS message besides the frame.
const RNDIS_ROOM: usize = 128;
const _: () = assert!(MTU + ETHERNET_HEADER + VLAN_TAG + RNDIS_ROOM <= MAX_MESSAGE);

/// The driver of a card.
pub(super) struct Netvsc<'h> {
    name: String,
    relid: u32,
    platform: Arc<Platform<'h>>,
    nic: Arc<Mutex<Nic<'h>>>,
    step: Step,
    /// When the host was asked, if it was.
    asked: Option<Nanos>,
    request_id: u32,
    version: u32,
    mac: [u8; 6],
    mtu: usize,
    /// The host completes checksums.
    has_checksums: bool,
    card: Option<Arc<Card<'h>>>,
}

/// What is agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// The version, by its place in [`VERSIONS`].
    Version(usize),
    Buffer,
    Initialize,
    Address,
    FrameSize,
    Offloads,
    OffloadsOn,
    Filter,
    Up,
}

/// What the driver and the kernel's network stack share.
struct Nic<'h> {
    /// While the channel is open.
    wire: Option<Wire<'h>>,
    failure: Option<Failure>,
    /// What the host has told of the wire since the kernel was told of it.
    link: Option<bool>,
}

impl<'h> Nic<'h> {
    /// Does something with a card that works. A host that lies has no card any more.
    fn with<T>(&mut self, work: impl FnOnce(&mut Wire<'h>) -> Result<T, Failure>) -> Result<T, Failure> {
        if let Some(failure) = self.failure {
            return Err(failure);
        }
        let Some(wire) = &mut self.wire else { return Err(Failure::Broken) };
        let done = work(wire);
        self.failure = done.as_ref().err().copied();
        done
    }

    /// Takes note of a message that is neither a frame nor an answer.
    fn hear(&mut self, message: &Told) {
        if let Told::Link(is_up) = message {
            self.link = Some(*is_up);
        }
    }
}

/// A message of the host's.
enum Told {
    /// A frame.
    Frame(usize, Checksum),
    /// An answer: status, and the value of a query.
    Answer { request_id: u32, status: u32, value: Vec<u8> },
    /// Whether there is something at the other end of the wire.
    Link(bool),
    /// Nothing that matters.
    Nothing,
}

/// Takes a message, and a frame's bytes to `buffer`.
fn hear(message: Option<Message<'_>>, buffer: &mut [u8]) -> Result<Told, HalError> {
    const INITIALIZED: u32 = message::INITIALIZE | message::COMPLETION;
    const QUERIED: u32 = message::QUERY | message::COMPLETION;
    const SET: u32 = message::SET | message::COMPLETION;
    let Some(message) = message else { return Ok(Told::Nothing) };
    Ok(match message.kind() {
        message::PACKET => message.frame(buffer)?.map(|(length, checksum)| Told::Frame(length, checksum)),
        INITIALIZED => message.body::<InitializeComplete>()?.map(|answer| Told::Answer {
            request_id: answer.request_id.get(),
            status: answer.status.get(),
            value: Vec::new(),
        }),
        QUERIED => match message.body::<QueryComplete>()? {
            Some(answer) => message.value(&answer)?.map(|value| Told::Answer {
                request_id: answer.request_id.get(),
                status: answer.status.get(),
                value,
            }),
            None => None,
        },
        SET => message.body::<Complete>()?.map(|answer| Told::Answer {
            request_id: answer.request_id.get(),
            status: answer.status.get(),
            value: Vec::new(),
        }),
        message::INDICATE_STATUS => message.body::<IndicateStatus>()?.and_then(|told| match told.status.get() {
            status::MEDIA_CONNECT => Some(Told::Link(true)),
            status::MEDIA_DISCONNECT => Some(Told::Link(false)),
            _ => None,
        }),
        _ => None,
    }
    .unwrap_or(Told::Nothing))
}

impl<'h> Netvsc<'h> {
    /// The driver of channel `relid`.
    pub fn new(name: String, relid: u32, platform: &Arc<Platform<'h>>) -> Netvsc<'h> {
        Netvsc {
            name,
            relid,
            platform: Arc::clone(platform),
            nic: Arc::new(Mutex::new(Nic { wire: None, failure: None, link: None })),
            step: Step::Version(0),
            asked: None,
            request_id: 0,
            version: 0,
            mac: [0; 6],
            mtu: MTU,
            has_checksums: false,
            card: None,
        }
    }

    /// Begins the step; `false` when there is no room.
    fn ask(&mut self, wire: &mut Wire<'_>) -> Result<bool, Failure> {
        self.request_id = self.request_id.wrapping_add(1);
        let id = self.request_id;
        let rndis = match self.step {
            Step::Version(at) => {
                let version = U32::new(VERSIONS.get(at).copied().unwrap_or_default());
                return wire.request(kind::INIT, &Init { min_version: version, max_version: version }).map(|()| true);
            }
            Step::Buffer => {
                let mtu = NDIS_MTU.into();
                wire.tell(kind::SEND_NDIS_CONFIG, &NdisConfig { mtu, reserved: 0.into(), capabilities: 0.into() })?;
                let (major, minor) = self.ndis();
                wire.tell(kind::SEND_NDIS_VERSION, &[major, minor].map(U32::new))?;
                let buffer = SendBuffer { gpadl: wire.buffer.gpadl.into(), id: RECEIVE_BUFFER_ID.into() };
                return wire.request(kind::SEND_RECEIVE_BUFFER, &buffer).map(|()| true);
            }
            Step::Initialize => {
                let initialize = Initialize {
                    request_id: id.into(),
                    major_version: MAJOR_VERSION.into(),
                    minor_version: 0.into(),
                    max_transfer_size: MAX_TRANSFER.into(),
                };
                rndis::make(message::INITIALIZE, &initialize, &[])
            }
            Step::Address => rndis::query(message::QUERY, id, oid::PERMANENT_ADDRESS, &[]),
            Step::FrameSize => rndis::query(message::QUERY, id, oid::MAXIMUM_FRAME_SIZE, &[]),
            Step::Offloads => rndis::query(message::QUERY, id, oid::OFFLOAD_CAPABILITIES, &self.offload_query()),
            Step::OffloadsOn => rndis::query(message::SET, id, oid::OFFLOAD_PARAMETERS, &self.offload_parameters()),
            Step::Filter => {
                let filter = FILTER_DIRECTED | FILTER_ALL_MULTICAST | FILTER_BROADCAST;
                rndis::query(message::SET, id, oid::CURRENT_PACKET_FILTER, &filter.to_le_bytes())
            }
            Step::Up => return Ok(true),
        };
        wire.send(&rndis, true)
    }

    /// Takes the answer to an NVSP request; the next step.
    fn learn_nvsp(&mut self, answer: &[u8], buffer_bytes: u64) -> Result<Step, Failure> {
        let (kind, body) = U32::read_from_prefix(answer).map_err(|_| Failure::Broken)?;
        match (self.step, kind.get()) {
            (Step::Version(at), kind::INIT_COMPLETE) => {
                let (complete, _) = InitComplete::read_from_prefix(body).map_err(|_| Failure::Broken)?;
                if complete.status.get() != nvsp_status::SUCCESS {
                    return if at + 1 < VERSIONS.len() { Ok(Step::Version(at + 1)) } else { Err(Failure::Refused("all versions of NVSP")) };
                }
                self.version = VERSIONS.get(at).copied().unwrap_or_default();
                Ok(Step::Buffer)
            }
            (Step::Buffer, kind::SEND_RECEIVE_BUFFER_COMPLETE) => {
                let (complete, _) = ReceiveBufferComplete::read_from_prefix(body).map_err(|_| Failure::Broken)?;
                if complete.status.get() != nvsp_status::SUCCESS {
                    return Err(Failure::Refused("the receive buffer"));
                }
                let bytes = u64::from(complete.part_size.get()) * u64::from(complete.parts.get());
                let is_inside = u64::from(complete.offset.get()).checked_add(bytes).is_some_and(|end| end <= buffer_bytes);
                if is_inside { Ok(Step::Initialize) } else { Err(Failure::Broken) }
            }
            _ => Err(Failure::Broken),
        }
    }

    /// Takes the answer to an RNDIS request; the next step.
    fn learn(&mut self, status: u32, value: &[u8]) -> Result<Step, Failure> {
        let is_done = status == status::SUCCESS;
        Ok(match self.step {
            Step::Initialize if is_done => Step::Address,
            Step::Address if is_done => {
                self.mac = *value.first_chunk().ok_or(Failure::Broken)?;
                Step::FrameSize
            }
            Step::FrameSize => {
                let size = value.first_chunk().filter(|_| is_done).map_or(MTU, |size| u32::from_le_bytes(*size) as usize);
                self.mtu = size.clamp(MIN_MTU, MTU);
                // Before, there was none for UDP.
                if self.version < version::V5 { Step::Filter } else { Step::Offloads }
            }
            Step::Offloads => {
                let both = checksum_offload::TCP | checksum_offload::UDP;
                let can = |flags: &[U32; 2]| flags[1].get() & both == both;
                let offload = Offload::read_from_prefix(value).ok().filter(|_| is_done);
                self.has_checksums = offload.is_some_and(|(offload, _)| can(&offload.checksum.ipv4_tx) && can(&offload.checksum.ipv6_tx));
                if self.has_checksums { Step::OffloadsOn } else { Step::Filter }
            }
            Step::OffloadsOn => {
                self.has_checksums = is_done;
                Step::Filter
            }
            Step::Filter if is_done => Step::Up,
            _ => return Err(Failure::Refused("to begin")),
        })
    }

    /// What the host is to fill with what it can.
    fn offload_query(&self) -> Vec<u8> {
        let [.., size] = OFFLOAD_SIZES;
        let mut offload = Offload::new_zeroed();
        offload.header =
            ObjectHeader { kind: object::OFFLOAD, revision: OFFLOAD_REVISION, size: u16::try_from(size).unwrap_or_default().into() };
        offload.as_bytes().into()
    }

    /// What the host is to do: checksums of TCP and UDP, both ways.
    fn offload_parameters(&self) -> Vec<u8> {
        let parameters = OffloadParameters {
            header: ObjectHeader { kind: object::DEFAULT, revision: PARAMETERS_REVISION, size: PARAMETERS_SIZE.into() },
            ipv4_checksum: offload_parameter::NO_CHANGE,
            tcp4_checksum: offload_parameter::ENABLED,
            udp4_checksum: offload_parameter::ENABLED,
            tcp6_checksum: offload_parameter::ENABLED,
            udp6_checksum: offload_parameter::ENABLED,
        };
        let mut bytes = Vec::from(parameters.as_bytes());
        bytes.resize(PARAMETERS_SIZE.into(), offload_parameter::NO_CHANGE);
        bytes
    }

    fn ndis(&self) -> (u32, u32) {
        let [old, new] = NDIS;
        if self.version < version::V5 { old } else { new }
    }

    /// Takes one answer, if it has come; the next step.
    fn progress(&mut self, nic: &mut Nic<'h>) -> Result<Option<Step>, Failure> {
        let buffer_bytes = (BUFFER_PAGES * PAGE) as u64;
        if let Some(answer) = nic.with(|wire| wire.pump().map(|()| wire.answer()))? {
            return self.learn_nvsp(&answer, buffer_bytes).map(Some);
        }
        for _ in 0..MESSAGES {
            let told = nic.with(|wire| wire.take(|memory, place| hear(Message::read(memory, place)?, &mut [])))?;
            match told {
                None => break,
                Some(Told::Answer { request_id, status, value }) if request_id == self.request_id => {
                    return self.learn(status, &value).map(Some);
                }
                Some(told) => nic.hear(&told),
            }
        }
        Ok(None)
    }

    /// The card is up.
    fn attach(&mut self, events: &mut Vec<Event>) {
        let card =
            Card { name: self.name.clone(), mac: self.mac, mtu: self.mtu, has_checksums: self.has_checksums, nic: Arc::clone(&self.nic) };
        let ((major, minor), [a, b, c, d, e, f]) = (self.ndis(), self.mac);
        events.push(Event::Message(format!(
            "{} at hyperv0 channel {}: NVS {}.{} NDIS {major}.{minor}, address {a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}",
            self.name,
            self.relid,
            self.version >> 16,
            self.version & 0xffff
        )));
        self.card = Some(Arc::new(card));
    }
}

/// Smallest MTU that is believed: IPv4's (RFC 791).
const MIN_MTU: usize = 68;

impl<'h> Device<'h> for Netvsc<'h> {
    fn name(&self) -> &str {
        &self.name
    }

    fn needs(&self) -> Needs {
        Needs { ring_pages: RING_PAGES, buffer_pages: BUFFER_PAGES }
    }

    fn opened(&mut self, channel: Channel<'h>, buffer: Option<Buffer>) {
        self.nic.lock().wire = buffer.map(|buffer| Wire::new(&self.platform, channel, buffer));
    }

    fn work(&mut self, now: Nanos, events: &mut Vec<Event>) -> Result<Option<Nanos>, Failure> {
        let shared = Arc::clone(&self.nic);
        let mut nic = shared.lock();
        if nic.wire.is_none() {
            return Ok(None);
        }
        while self.step != Step::Up {
            let Some(since) = self.asked else {
                if !nic.with(|wire| self.ask(wire))? {
                    return Ok(None);
                }
                self.asked = Some(now);
                continue;
            };
            let Some(next) = self.progress(&mut nic)? else {
                let deadline = since.saturating_add(PATIENCE);
                return if now >= deadline { Err(Failure::Silent) } else { Ok(Some(deadline)) };
            };
            (self.step, self.asked) = (next, None);
            if next == Step::Up {
                self.attach(events);
            }
        }
        if let Some(is_up) = nic.link.take() {
            events.push(Event::Message(format!("{}: link {}", self.name, if is_up { "up" } else { "down" })));
        }
        nic.failure.map_or(Ok(None), Err)
    }

    fn close(&mut self, _events: &mut Vec<Event>) {
        self.card = None;
        if let Some(wire) = self.nic.lock().wire.take() {
            wire.close();
        }
    }

    fn cards(&self) -> Vec<Arc<dyn NetDevice + 'h>> {
        self.card.iter().map(|card| Arc::clone(card) as _).collect()
    }
}

/// A card that is up.
struct Card<'h> {
    name: String,
    mac: [u8; 6],
    mtu: usize,
    has_checksums: bool,
    nic: Arc<Mutex<Nic<'h>>>,
}

impl Card<'_> {
    /// The error of a card that is gone, or failed.
    fn check(nic: &Nic<'_>) -> Result<(), NetError> {
        if nic.wire.is_some() && nic.failure.is_none() { Ok(()) } else { Err(NetError::Gone) }
    }
}

impl NetDevice for Card<'_> {
    fn name(&self) -> &str {
        &self.name
    }

    fn mac(&self) -> [u8; 6] {
        self.mac
    }

    fn mtu(&self) -> usize {
        self.mtu
    }

    fn takes_blank_checksums(&self) -> bool {
        self.has_checksums
    }

    fn send(&self, frame: &[u8], checksum: Checksum) -> Result<bool, NetError> {
        if !(ETHERNET_HEADER..=self.mtu + ETHERNET_HEADER + VLAN_TAG).contains(&frame.len()) {
            return Err(NetError::Length);
        }
        let is_blank = checksum == Checksum::Blank;
        let blank = if is_blank && self.has_checksums { rndis::blank_checksum(frame) } else { None };
        let rndis = if is_blank && blank.is_none() {
            let mut frame = frame.to_vec();
            complete(&mut frame);
            rndis::packet(&frame, None)
        } else {
            rndis::packet(frame, blank)
        };
        let mut nic = self.nic.lock();
        Card::check(&nic)?;
        Ok(nic.with(|wire| {
            wire.pump()?;
            wire.send(&rndis, false)
        })?)
    }

    fn receive(&self, buffer: &mut [u8]) -> Result<Option<Received>, NetError> {
        let mut nic = self.nic.lock();
        Card::check(&nic)?;
        nic.with(Wire::pump)?;
        for _ in 0..MESSAGES {
            let told = nic.with(|wire| wire.take(|memory, place| hear(Message::read(memory, place)?, buffer)))?;
            match told {
                None => return Ok(None),
                Some(Told::Frame(length, checksum)) => return Ok(Some(Received { length, checksum })),
                Some(told) => nic.hear(&told),
            }
        }
        // A buffer's worth of messages of which none is a frame.
        nic.failure = Some(Failure::Broken);
        Err(NetError::Broken)
    }
}

impl From<Failure> for NetError {
    fn from(failure: Failure) -> NetError {
        match failure {
            Failure::NoMemory => NetError::Refused,
            _ => NetError::Broken,
        }
    }
}
