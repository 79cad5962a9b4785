//! hvs: a SCSI controller with its disks, sd ([`abi::hyperv::storvsc`], [`abi::hyperv::scsi`]).
//!
//! The driver asks the controller for its version and properties and each logical unit for what it is, one question after the other and without
//! waiting. When the host says that units came or went, it asks again.
//!
//! ```text
//!   BEGIN --> version, newest first --> properties --> END --> REPORT LUNS --> each new unit: INQUIRY, VPD B2h, READ CAPACITY, MODE SENSE
//!                                                                  ^                 |
//!                                                                  +-- ENUMERATE ----+
//! ```
//!
//! Commands are in `queue.rs`, disks in `disk.rs`. One channel: further ones would only divide the same work, since one processor copies all data. OpenBSD
//! `sys/dev/pv/hvs.c` is the model; its lines in the message buffer are OpenBSD's.

mod disk;
mod queue;

use alloc::collections::{BTreeMap, VecDeque};
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicUsize, Ordering};

use abi::hyperv::scsi::{CDB_SIZE, Capacity16, Inquiry, Provisioning, READ_CAPACITY_16, VpdHeader, device_type, mode, opcode, vpd};
use abi::hyperv::storvsc::{BODY_SIZE, Packet, Properties, operation, status, version};
use spin::Mutex;
use zerocopy::FromBytes;

use super::Platform;
use super::channel::{Channel, PAGE};
use super::hyperv0::{Buffer, Device, Failure, Needs};
use crate::block::{BlockDevice, DiskError, Geometry, SECTOR};
use crate::driver::Event;
use crate::hal::Nanos;
use disk::Disk;
use queue::{Command, Data, PIECE, Queue, verdict};

/// Pages of data in each ring: 16 commands of 16 pages, and their completions.
const RING_PAGES: usize = 8;
/// Versions of the protocol, newest first. Older hosts than Windows 8 have no VMBus that is spoken here.
const VERSIONS: [u16; 3] = [version::V6_2, version::V6_0, version::V5_1];
/// Most logical units, as OpenBSD has it.
const LUNS: usize = 64;
/// Bytes of REPORT LUNS' answer before the units, and of each (SPC-4 section 6.33).
const LUN_BYTES: usize = 8;
/// Bytes that answers to questions may have.
const ANSWER: usize = LUN_BYTES * (1 + LUNS);

/// The driver of a controller.
pub(super) struct Storvsc<'h> {
    name: String,
    /// "scsi" or "ide", as OpenBSD says it.
    bus: &'static str,
    relid: u32,
    address: Address,
    controller: Arc<Mutex<Controller<'h>>>,
    disks: Vec<Arc<Disk<'h>>>,
    /// Disks so far, of all controllers.
    numbers: Arc<AtomicUsize>,
    question: Question,
    /// The packet that asks it.
    asked: Option<u64>,
    version: u16,
    request_bytes: usize,
    /// Units that are to be asked.
    unknown: VecDeque<u8>,
}

/// Bus and target of a controller's units.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Address {
    pub path: u8,
    pub target: u8,
}

/// What the host is asked.
#[derive(Debug, Clone, Copy)]
enum Question {
    Begin,
    /// A version, by its place in [`VERSIONS`].
    Version(usize),
    Properties,
    End,
    Units,
    Unit(Facts, Fact),
    /// Nothing, until something changes.
    None,
}

/// What a unit is asked, in this order.
#[derive(Debug, Clone, Copy)]
enum Fact {
    Inquiry,
    Provisioning,
    Capacity,
    Mode,
}

/// What is known of a unit that is being asked.
#[derive(Debug, Clone, Copy)]
struct Facts {
    lun: u8,
    vendor: [u8; 8],
    product: [u8; 16],
    revision: [u8; 4],
    geometry: Geometry,
}

/// What the driver and the disks share.
struct Controller<'h> {
    platform: Arc<Platform<'h>>,
    /// While the channel is open.
    queue: Option<Queue<'h>>,
    /// Disks by their logical units, with their numbers.
    units: BTreeMap<u8, (usize, Geometry)>,
    /// The host has lied, or says nothing.
    failure: Option<Failure>,
}

impl<'h> Controller<'h> {
    fn geometry(&self, lun: u8, number: usize) -> Option<Geometry> {
        self.units.get(&lun).filter(|unit| unit.0 == number && self.failure.is_none()).map(|unit| unit.1)
    }

    /// Does something with a controller that works. One that lies, or says nothing, has no disks any more: it may still write to memory, and its next
    /// answers would be taken for others'.
    fn with<T>(&mut self, work: impl FnOnce(&mut Queue<'h>) -> Result<T, DiskError>) -> Result<T, DiskError> {
        let queue = self.queue.as_mut().filter(|_| self.failure.is_none()).ok_or(DiskError::Gone)?;
        let done = work(queue);
        match &done {
            Err(DiskError::Broken) => self.failure = Some(Failure::Broken),
            Err(DiskError::Timeout) => self.failure = Some(Failure::Silent),
            _ => {}
        }
        done
    }
}

impl<'h> Storvsc<'h> {
    /// The driver of channel `relid`, whose bus is called `bus`; `numbers` counts disks.
    pub fn new(
        name: String,
        bus: &'static str,
        relid: u32,
        address: Address,
        platform: &Arc<Platform<'h>>,
        numbers: &Arc<AtomicUsize>,
    ) -> Storvsc<'h> {
        let controller = Controller { platform: Arc::clone(platform), queue: None, units: BTreeMap::new(), failure: None };
        Storvsc {
            name,
            bus,
            relid,
            address,
            controller: Arc::new(Mutex::new(controller)),
            disks: Vec::new(),
            numbers: Arc::clone(numbers),
            question: Question::Begin,
            asked: None,
            version: 0,
            request_bytes: PAGE,
            unknown: VecDeque::new(),
        }
    }

    /// Asks the question.
    fn ask(&self, queue: &mut Queue<'_>) -> Result<Option<u64>, DiskError> {
        match self.question {
            Question::Begin => queue.operate(operation::BEGIN_INITIALIZATION, &[]),
            Question::Version(at) => {
                let version = VERSIONS.get(at).copied().unwrap_or_default();
                queue.operate(operation::QUERY_PROTOCOL_VERSION, &version.to_le_bytes())
            }
            Question::Properties => queue.operate(operation::QUERY_PROPERTIES, &[]),
            Question::End => queue.operate(operation::END_INITIALIZATION, &[]),
            Question::Units => queue.begin(question(0, opcode::REPORT_LUNS, 0, 0, ANSWER, 12)),
            Question::Unit(facts, fact) => queue.begin(match fact {
                Fact::Inquiry => question(facts.lun, opcode::INQUIRY, 0, 0, size_of::<Inquiry>(), 6),
                Fact::Provisioning => question(facts.lun, opcode::INQUIRY, Inquiry::EVPD, vpd::LOGICAL_BLOCK_PROVISIONING, VPD, 6),
                Fact::Capacity => question(facts.lun, opcode::SERVICE_ACTION_IN_16, READ_CAPACITY_16, 0, size_of::<Capacity16>(), 16),
                Fact::Mode => question(facts.lun, opcode::MODE_SENSE_6, 0, mode::CACHING, MODE, 6),
            }),
            Question::None => Ok(None),
        }
    }

    /// Takes the answer to the question; the next question.
    fn learn(&mut self, answer: &Packet, data: &[u8], events: &mut Vec<Event>) -> Result<Question, Failure> {
        let is_done = answer.status.get() == status::SUCCESS;
        Ok(match self.question {
            Question::Begin if is_done => Question::Version(0),
            Question::Version(at) if is_done => {
                self.version = VERSIONS.get(at).copied().unwrap_or_default();
                Question::Properties
            }
            Question::Version(at) if at + 1 < VERSIONS.len() => Question::Version(at + 1),
            Question::Version(_) => return Err(Failure::Refused("all versions of the protocol")),
            Question::Properties if is_done => {
                let (properties, _) = Properties::read_from_prefix(&answer.body).map_err(|_| Failure::Broken)?;
                let most = usize::try_from(properties.max_transfer_bytes.get()).unwrap_or(PIECE);
                self.request_bytes = (most / PAGE * PAGE).clamp(PAGE, PIECE);
                Question::End
            }
            Question::End if is_done => {
                let [minor, major] = self.version.to_le_bytes();
                let (name, bus, channel) = (&self.name, self.bus, self.relid);
                events.push(Event::Message(format!("{name} at hyperv0 channel {channel}: {bus}, protocol {major}.{minor}")));
                Question::Units
            }
            Question::Begin | Question::Properties | Question::End => return Err(Failure::Refused("to begin")),
            Question::Units => {
                // A host without the command has one unit.
                let luns = verdict(answer).ok().and_then(|length| luns(data.get(..length)?)).unwrap_or_else(|| [0].into());
                self.compare(&luns, events);
                self.next_unit()
            }
            Question::Unit(facts, fact) => self.learn_fact(facts, fact, verdict(answer).ok().and_then(|length| data.get(..length)), events),
            Question::None => Question::None,
        })
    }

    /// Takes what a unit says of itself, or nothing where it does not want to say it.
    fn learn_fact(&mut self, mut facts: Facts, fact: Fact, data: Option<&[u8]>, events: &mut Vec<Event>) -> Question {
        match (fact, data) {
            (Fact::Inquiry, Some(data)) => match Inquiry::read_from_prefix(data) {
                Ok((inquiry, _)) if inquiry.peripheral == device_type::DISK => {
                    (facts.vendor, facts.product, facts.revision) = (inquiry.vendor, inquiry.product, inquiry.revision);
                    return Question::Unit(facts, Fact::Provisioning);
                }
                _ => return self.next_unit(),
            },
            (Fact::Provisioning, data) => {
                let page = data.and_then(|data| data.get(size_of::<VpdHeader>()..));
                let provisioning = page.and_then(|page| Provisioning::read_from_prefix(page).ok());
                facts.geometry.has_discard = provisioning.is_some_and(|(page, _)| page.commands & Provisioning::UNMAP != 0);
                return Question::Unit(facts, Fact::Capacity);
            }
            (Fact::Capacity, Some(data)) => {
                let Some((sectors, sector_size)) = capacity(data) else { return self.next_unit() };
                (facts.geometry.sectors, facts.geometry.sector_size) = (sectors, sector_size);
                return Question::Unit(facts, Fact::Mode);
            }
            (Fact::Inquiry | Fact::Capacity, None) => return self.next_unit(),
            (Fact::Mode, data) => {
                let [_, _, specific, descriptors, ..] = data.and_then(|data| data.first_chunk()).copied().unwrap_or([0; 4]);
                facts.geometry.is_read_only = specific & mode::WRITE_PROTECTED != 0;
                let page = data.and_then(|data| data.get(4 + usize::from(descriptors)..));
                let has_cache = page.and_then(|page| page.get(2)).is_none_or(|flags| flags & mode::WRITE_CACHE != 0);
                facts.geometry.has_flush = has_cache;
            }
        }
        self.attach(&facts, events);
        self.next_unit()
    }

    /// Compares the units there are with those that are known.
    fn compare(&mut self, luns: &[u8], events: &mut Vec<Event>) {
        let mut controller = self.controller.lock();
        self.disks.retain(|disk| {
            let stays = luns.contains(&disk.lun);
            if !stays {
                controller.units.remove(&disk.lun);
                events.push(Event::Message(format!("{} detached", disk.name)));
            }
            stays
        });
        self.unknown = luns.iter().copied().filter(|lun| !controller.units.contains_key(lun)).collect();
    }

    /// The question to the next unit that is not known.
    fn next_unit(&mut self) -> Question {
        let Some(lun) = self.unknown.pop_front() else { return Question::None };
        let geometry = Geometry {
            sectors: 0,
            sector_size: SECTOR,
            is_read_only: false,
            has_flush: false,
            has_discard: false,
            request_bytes: self.request_bytes,
        };
        Question::Unit(Facts { lun, vendor: [0; 8], product: [0; 16], revision: [0; 4], geometry }, Fact::Inquiry)
    }

    /// A unit is a disk.
    fn attach(&mut self, facts: &Facts, events: &mut Vec<Event>) {
        let Facts { lun, geometry, vendor, product, revision } = facts;
        let number = self.numbers.fetch_add(1, Ordering::Relaxed);
        self.controller.lock().units.insert(*lun, (number, *geometry));
        let name = format!("sd{number}");
        let [vendor, product, revision] = [vendor.as_slice(), product, revision].map(printable);
        let target = self.address.target;
        events.push(Event::Message(format!("{name} at {} targ {target} lun {lun}: <{vendor}, {product}, {revision}>", self.name)));
        let Geometry { sectors, sector_size, is_read_only, has_discard, .. } = geometry;
        let (mebibytes, count) = (sectors / 2048, sectors * SECTOR / sector_size.max(&1));
        let thin = if *has_discard { ", thin" } else { "" };
        let access = if *is_read_only { ", readonly" } else { "" };
        events.push(Event::Message(format!("{name}: {mebibytes}MB, {sector_size} bytes/sector, {count} sectors{thin}{access}")));
        self.disks.push(Arc::new(Disk { name, lun: *lun, number, controller: Arc::clone(&self.controller) }));
    }
}

impl<'h> Device<'h> for Storvsc<'h> {
    fn name(&self) -> &str {
        &self.name
    }

    fn needs(&self) -> Needs {
        Needs { ring_pages: RING_PAGES, buffer_pages: 0 }
    }

    fn opened(&mut self, channel: Channel<'h>, _buffer: Option<Buffer>) {
        let mut controller = self.controller.lock();
        controller.queue = Some(Queue::new(&controller.platform, channel, self.address));
    }

    fn work(&mut self, _now: Nanos, events: &mut Vec<Event>) -> Result<Option<Nanos>, Failure> {
        let shared = Arc::clone(&self.controller);
        loop {
            let mut controller = shared.lock();
            if let Some(failure) = controller.failure {
                return Err(failure);
            }
            if controller.queue.is_none() {
                return Ok(None);
            }
            if let (Question::None, true) = (self.question, controller.with(|queue| queue.has_answers().map(|_| queue.take_changed()))?) {
                self.question = Question::Units;
            }
            let Some(asked) = self.asked else {
                self.asked = controller.with(|queue| self.ask(queue))?;
                if self.asked.is_none() {
                    return Ok(None);
                }
                continue;
            };
            let mut data = [0; ANSWER];
            let Some(answer) = controller.with(|queue| queue.end(asked, &mut data))? else { return Ok(None) };
            drop(controller);
            self.asked = None;
            self.question = self.learn(&answer, &data, events)?;
        }
    }

    fn close(&mut self, events: &mut Vec<Event>) {
        let mut controller = self.controller.lock();
        controller.units.clear();
        if let Some(queue) = controller.queue.take() {
            queue.close();
        }
        events.extend(self.disks.drain(..).map(|disk| Event::Message(format!("{} detached", disk.name))));
    }

    fn disks(&self) -> Vec<Arc<dyn BlockDevice + 'h>> {
        self.disks.iter().map(|disk| Arc::clone(disk) as _).collect()
    }
}

impl From<DiskError> for Failure {
    fn from(error: DiskError) -> Failure {
        match error {
            DiskError::Timeout => Failure::Silent,
            DiskError::Refused => Failure::NoMemory,
            _ => Failure::Broken,
        }
    }
}

impl From<super::ring::BrokenRing> for DiskError {
    fn from(_: super::ring::BrokenRing) -> DiskError {
        DiskError::Broken
    }
}

/// Bytes that are asked of VPD page B2h and of the caching page.
const VPD: usize = size_of::<VpdHeader>() + size_of::<Provisioning>();
const MODE: usize = 4 + mode::CACHING_SIZE;

/// A command that asks something: second and third byte, the length where commands of this length have it.
fn question(lun: u8, opcode: u8, second: u8, third: u8, length: usize, cdb_length: u8) -> Command<'static> {
    let mut cdb = [0; CDB_SIZE];
    let [.., high, low] = length.to_be_bytes();
    let place = match cdb_length {
        6 => 3..5,
        12 => 8..10,
        _ => 12..14,
    };
    for (at, byte) in [(0, opcode), (1, second), (2, third), (place.start, high), (place.end - 1, low)] {
        if let Some(place) = cdb.get_mut(at) {
            *place = byte;
        }
    }
    Command { lun, cdb, cdb_length, data: Data::Read(length) }
}

/// Units that REPORT LUNS names, as far as they have numbers of one byte.
fn luns(data: &[u8]) -> Option<Vec<u8>> {
    let (entries, _) = data.as_chunks::<LUN_BYTES>();
    let ([a, b, c, d, ..], units) = entries.split_first()?;
    let count = usize::try_from(u32::from_be_bytes([*a, *b, *c, *d])).ok()? / LUN_BYTES;
    Some(units.iter().take(count).filter(|unit| unit[0] == 0).map(|[_, lun, ..]| *lun).collect())
}

/// Sectors of 512 bytes, and bytes of the disk's own.
fn capacity(data: &[u8]) -> Option<(u64, u64)> {
    let (capacity, _) = Capacity16::read_from_prefix(data).ok()?;
    let sector_size = u64::from(capacity.block_size.get());
    if !sector_size.is_power_of_two() || !(SECTOR..=PAGE as u64).contains(&sector_size) {
        return None;
    }
    let sectors = capacity.last_block.get().checked_add(1)?.checked_mul(sector_size / SECTOR)?;
    // Positions in bytes are numbers, too.
    sectors.checked_mul(SECTOR).map(|_| (sectors, sector_size))
}

/// A field of INQUIRY, without what plays tricks on terminals.
fn printable(field: &[u8]) -> String {
    field
        .iter()
        .map(|byte| if byte.is_ascii_graphic() || *byte == b' ' { char::from(*byte) } else { '?' })
        .collect::<String>()
        .trim()
        .into()
}

const _: () = assert!(size_of::<Properties>() <= BODY_SIZE);
