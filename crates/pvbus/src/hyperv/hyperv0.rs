//! Device hyperv0: the bus. It finds out which version of VMBus the host speaks, and then follows its messages: devices are offered, opened, and taken away
//! while the machine runs.
//!
//! ```text
//!   poll:  acknowledge events --> messages --> vmbus.rs --> devices open, close
//!                                 devices work by their rings
//!                                 messages to the host, as many as it takes now
//! ```
//!
//! Only attaching waits for the host, at most five seconds for each answer. OpenBSD `sys/dev/pv/hyperv.c`; its lines in the message buffer are OpenBSD's.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::AtomicUsize;

use abi::hyperv::hypercall::Status;
use abi::hyperv::vmbus::{
    Header, InitiateContact, MESSAGE_CONNECTION, MESSAGE_CONNECTION_5, Offer, SINT, VersionResponse, guid, message, version,
};
use zerocopy::{FromBytes, IntoBytes};

use super::Platform;
use super::channel::{Channel, PAGE};
use super::clock::ReferenceClock;
use super::hypercall::HypervError;
use super::ic::pools::{KvpStore, Pools};
use super::ic::{Component, heartbeat, kvp, shutdown, timesync, vss};
use super::netvsc::Netvsc;
use super::ring::BrokenRing;
use super::storvsc::{Address, Storvsc};
use super::vmbus::{Notice, VmBus};
use crate::block::BlockDevice;
use crate::detect::Interface;
use crate::driver::{Driver, Event, News};
use crate::hal::{Dma, Hal, HalError, MILLISECOND, Nanos, SECOND};
use crate::net::NetDevice;
use crate::store::Store;

/// Versions of VMBus, newest first.
const VERSIONS: [u32; 8] = [
    version::WIN10_V5_3,
    version::WIN10_V5_2,
    version::WIN10_V5_1,
    version::WIN10_V5,
    version::WIN10_RS3,
    version::WIN10,
    version::WIN8_1,
    version::WIN8,
];
/// How long an answer is waited for.
const PATIENCE: Nanos = 5 * SECOND;
/// How long the host is waited for when the machine goes down.
const LAST_PATIENCE: Nanos = SECOND;
/// How long at once; an upcall ends it sooner.
const PAUSE: Nanos = MILLISECOND;
/// How often rings are looked at: for a kernel that takes upcalls, and for one that takes none.
const PERIODS: [Nanos; 2] = [SECOND, 10 * MILLISECOND];
/// Most messages in one poll.
const MESSAGES: usize = 64;
/// Most devices.
const DEVICES: usize = 256;

/// What is at the other end of a channel.
pub(super) trait Device<'h>: Send {
    /// As the message buffer knows it.
    fn name(&self) -> &str;

    /// Whether it is one of the integration components.
    fn is_component(&self) -> bool {
        false
    }

    /// How large the channel's memory shall be.
    fn needs(&self) -> Needs;

    /// The channel is open.
    fn opened(&mut self, channel: Channel<'h>, buffer: Option<Buffer>);

    /// Does what is due at `now`; when to be called again, if not before an event.
    ///
    /// # Errors
    /// [`Failure`]. The channel is closed then.
    fn work(&mut self, now: Nanos, events: &mut Vec<Event>) -> Result<Option<Nanos>, Failure>;

    /// Hears about the kernel.
    fn hear(&mut self, news: &News, now: Nanos) {
        let _ = (news, now);
    }

    /// Lets go of channel and buffer.
    fn close(&mut self, events: &mut Vec<Event>);

    /// The disks that it has now.
    fn disks(&self) -> Vec<Arc<dyn BlockDevice + 'h>> {
        Vec::new()
    }

    /// The network cards that it has now.
    fn cards(&self) -> Vec<Arc<dyn NetDevice + 'h>> {
        Vec::new()
    }
}

/// Memory of a channel.
#[derive(Debug, Clone, Copy)]
pub(super) struct Needs {
    /// Pages of data in each of both rings.
    pub ring_pages: usize,
    /// Pages of a buffer besides.
    pub buffer_pages: usize,
}

/// A buffer that the host has, too.
pub(super) struct Buffer {
    /// Its GPADL.
    pub gpadl: u32,
    /// The memory.
    pub memory: Arc<Dma>,
}

/// Why a device cannot go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Failure {
    /// Rings or packets of the host make no sense.
    Broken,
    /// The host does not speak any version that the driver speaks, or refuses what the driver cannot do without.
    Refused(&'static str),
    /// The host does not answer.
    Silent,
    /// There is no memory.
    NoMemory,
}

impl From<BrokenRing> for Failure {
    fn from(_: BrokenRing) -> Failure {
        Failure::Broken
    }
}

impl From<HalError> for Failure {
    fn from(_: HalError) -> Failure {
        Failure::NoMemory
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Broken => f.write_str("the host answers what was not asked; not used any more"),
            Failure::Refused(what) => write!(f, "the host refuses {what}"),
            Failure::Silent => f.write_str("the host does not answer; not used any more"),
            Failure::NoMemory => f.write_str("no memory"),
        }
    }
}

/// The device.
pub(crate) struct Hyperv0<'h> {
    platform: Arc<Platform<'h>>,
    /// Connection of messages to the host.
    connection: u32,
    version: u32,
    features: u32,
    /// Reference time, where the hypervisor has it.
    clock: Option<Arc<ReferenceClock<'h>>>,
    bus: VmBus,
    devices: BTreeMap<u32, Attached<'h>>,
    names: Names,
    pools: Arc<Pools>,
    /// What is to be told of attaching.
    early: Vec<Event>,
    /// The host takes no messages any more.
    is_over: bool,
}

/// Devices so far, for their names.
#[derive(Default)]
struct Names {
    controllers: usize,
    cards: usize,
    disks: Arc<AtomicUsize>,
}

/// A device with what it is to be opened by.
struct Attached<'h> {
    device: Box<dyn Device<'h> + 'h>,
    connection: u32,
    rings: Arc<Dma>,
    buffer: Option<Arc<Dma>>,
}

impl<'h> Hyperv0<'h> {
    /// Finds together with the host, and asks for what there is.
    pub fn attach(hal: &'h dyn Hal, interface: &Interface) -> Result<Hyperv0<'h>, HypervError> {
        let platform = Platform::new(hal)?;
        let (version, connection) = match contact(&platform) {
            Ok(contact) => contact,
            Err(error) => {
                platform.end();
                return Err(error);
            }
        };
        let mut hyperv0 = Hyperv0 {
            bus: VmBus::new(platform.synic.vp()),
            platform: Arc::new(platform),
            connection,
            version,
            features: interface.features.eax,
            clock: ReferenceClock::attach(hal, interface.features.eax).map(Arc::new),
            devices: BTreeMap::new(),
            names: Names::default(),
            pools: Arc::default(),
            early: Vec::new(),
            is_over: false,
        };
        hyperv0.bus.request_offers();
        let mut events = Vec::new();
        hyperv0.follow_until(PATIENCE, &mut events, |notice| matches!(notice, Notice::AllOffered))?;
        hyperv0.early = events;
        Ok(hyperv0)
    }

    /// The rest of its line, as OpenBSD has it.
    pub fn about(&self) -> String {
        format!(": protocol {}.{}, features {:#x}", self.version >> 16, self.version & 0xffff, self.features)
    }

    /// The hypervisor's clock.
    pub fn clock(&self) -> Option<Arc<ReferenceClock<'h>>> {
        self.clock.clone()
    }

    /// OpenBSD's line of the integration components, in order.
    pub fn components(&self) -> Option<String> {
        let components = self.devices.values().filter(|attached| attached.device.is_component());
        let mut names: Vec<&str> = components.map(|attached| attached.device.name()).collect();
        names.sort_unstable();
        (!names.is_empty()).then(|| format!("hyperv0: {}", names.join(", ")))
    }

    /// Follows messages until one is `last`, at most for `patience`.
    fn follow_until(&mut self, patience: Nanos, events: &mut Vec<Event>, last: impl Fn(&Notice) -> bool) -> Result<(), HypervError> {
        let hal = self.platform.hal;
        let deadline = hal.now().saturating_add(patience);
        loop {
            self.post()?;
            while let Some(message) = self.platform.synic.take_message()? {
                if let Some(notice) = self.bus.on(&message) {
                    let is_last = last(&notice);
                    self.obey(notice, events);
                    if is_last {
                        return Ok(());
                    }
                }
            }
            let now = hal.now();
            if now >= deadline {
                return Err(HypervError::Timeout);
            }
            hal.wait_until(deadline.min(now.saturating_add(PAUSE)));
        }
    }

    /// Does what is due; `true` when there may be more messages.
    fn follow(&mut self, events: &mut Vec<Event>) -> Result<bool, HypervError> {
        self.platform.synic.acknowledge()?;
        for _ in 0..MESSAGES {
            let Some(message) = self.platform.synic.take_message()? else { return Ok(false) };
            if let Some(notice) = self.bus.on(&message) {
                self.obey(notice, events);
            }
        }
        Ok(true)
    }

    /// Posts messages until the host takes no more; `true` when there are some left.
    fn post(&mut self) -> Result<bool, HypervError> {
        while let Some(message) = self.bus.outgoing() {
            match self.platform.calls.post_message(self.connection, message)? {
                Status::SUCCESS => self.bus.posted(),
                Status::INSUFFICIENT_BUFFERS | Status::INSUFFICIENT_MEMORY => return Ok(true),
                Status(status) => return Err(HypervError::Refused(status)),
            }
        }
        Ok(false)
    }

    fn obey(&mut self, notice: Notice, events: &mut Vec<Event>) {
        match notice {
            Notice::Offered(offer) => {
                if let Some(device) = self.device(&offer)
                    && let Err(error) = self.open(&offer, device)
                {
                    events.push(Event::Message(format!("hyperv0: channel {}: {error}", offer.relid)));
                }
            }
            Notice::Opened { relid, buffer } => {
                let Some(attached) = self.devices.get_mut(&relid) else { return };
                let memory = attached.buffer.clone();
                let buffer = buffer.zip(memory).map(|(gpadl, memory)| Buffer { gpadl, memory });
                if let Ok(channel) = Channel::new(&self.platform, attached.connection, &attached.rings) {
                    attached.device.opened(channel, buffer);
                }
            }
            Notice::Refused(relid) => {
                if let Some(attached) = self.devices.remove(&relid) {
                    let refused = Failure::Refused("its channel");
                    events.push(Event::Message(format!("{}: {refused}", attached.device.name())));
                }
            }
            Notice::Rescinded(relid) => {
                if let Some(mut attached) = self.devices.remove(&relid) {
                    events.push(Event::Message(format!("{} detached", attached.device.name())));
                    attached.device.close(events);
                }
            }
            Notice::Freed(memory) => {
                if let Some(memory) = Arc::into_inner(memory) {
                    self.platform.hal.dma_free(memory);
                }
            }
            Notice::AllOffered | Notice::Unloaded => {}
        }
    }

    /// The device of a channel, if there is a driver for it. Further channels of a device are not used.
    fn device(&mut self, offer: &Offer) -> Option<Box<dyn Device<'h> + 'h>> {
        if offer.sub_channel_index.get() != 0 || offer.is_dedicated_interrupt.get() & 1 == 0 || self.devices.len() >= DEVICES {
            return None;
        }
        let device: Box<dyn Device<'h> + 'h> = match offer.class {
            guid::HEARTBEAT => Box::new(Component::new(heartbeat::Heartbeat)),
            guid::KVP => Box::new(Component::new(kvp::Kvp::new(&self.pools))),
            guid::SHUTDOWN => Box::new(Component::new(shutdown::Shutdown)),
            guid::TIMESYNC => Box::new(Component::new(timesync::TimeSync::new(self.clock()))),
            guid::VSS => Box::new(Component::new(vss::Vss::default())),
            guid::SCSI => Box::new(self.controller(offer, "scsi", Address::default())),
            // Path and target are in the instance (Linux `storvsc_get_ide_info`).
            guid::IDE => {
                let [path, _, _, _, target, ..] = offer.instance.0;
                Box::new(self.controller(offer, "ide", Address { path, target }))
            }
            guid::NETWORK => {
                let name = format!("hvn{}", self.names.cards);
                self.names.cards += 1;
                Box::new(Netvsc::new(name, offer.relid.get(), &self.platform))
            }
            _ => return None,
        };
        Some(device)
    }

    fn controller(&mut self, offer: &Offer, bus: &'static str, address: Address) -> Storvsc<'h> {
        let name = format!("hvs{}", self.names.controllers);
        self.names.controllers += 1;
        Storvsc::new(name, bus, offer.relid.get(), address, &self.platform, &self.names.disks)
    }

    /// Gives the host memory for a channel, by which it becomes open.
    fn open(&mut self, offer: &Offer, device: Box<dyn Device<'h> + 'h>) -> Result<(), HalError> {
        let Needs { ring_pages, buffer_pages } = device.needs();
        let hal = self.platform.hal;
        let rings = Arc::new(hal.dma_alloc(2 * (1 + ring_pages))?);
        let buffer = match (buffer_pages > 0).then(|| hal.dma_alloc(buffer_pages)).transpose() {
            Ok(buffer) => buffer.map(Arc::new),
            Err(error) => {
                Arc::into_inner(rings).into_iter().for_each(|rings| hal.dma_free(rings));
                return Err(error);
            }
        };
        let (relid, connection) = (offer.relid.get(), offer.connection_id.get());
        self.bus.open(relid, Arc::clone(&rings), buffer.clone());
        self.devices.insert(relid, Attached { device, connection, rings, buffer });
        Ok(())
    }

    /// Lets the devices work; when the first wants to be called again.
    fn work(&mut self, now: Nanos, events: &mut Vec<Event>) -> Option<Nanos> {
        let mut next = None;
        let mut failed = Vec::new();
        for (relid, attached) in &mut self.devices {
            match attached.device.work(now, events) {
                Ok(due) => next = [next, due].into_iter().flatten().min(),
                Err(failure) => failed.push((*relid, failure)),
            }
        }
        for (relid, failure) in failed {
            if let Some(mut attached) = self.devices.remove(&relid) {
                events.push(Event::Message(format!("{}: {failure}", attached.device.name())));
                attached.device.close(events);
                self.bus.close(relid);
            }
        }
        next
    }
}

impl<'h> Driver<'h> for Hyperv0<'h> {
    fn poll(&mut self, now: Nanos, events: &mut Vec<Event>) -> Option<Nanos> {
        if self.is_over {
            return None;
        }
        events.append(&mut self.early);
        let followed = self.follow(events);
        let due = self.work(now, events);
        match followed.and_then(|more| Ok((more, self.post()?))) {
            Ok((true, _)) => Some(now),
            Ok((false, has_left)) => {
                let [with_upcalls, without] = PERIODS;
                let period = match self.platform.hal.upcall_vector() {
                    _ if has_left => PAUSE,
                    Some(_) => with_upcalls,
                    None => without,
                };
                [due, Some(now.saturating_add(period))].into_iter().flatten().min()
            }
            Err(error) => {
                self.is_over = true;
                events.push(Event::Message(format!("hyperv0: {error}")));
                None
            }
        }
    }

    fn takes_upcalls(&self) -> bool {
        true
    }

    fn hear(&mut self, news: &News, now: Nanos) {
        self.devices.values_mut().for_each(|attached| attached.device.hear(news, now));
        match news {
            News::Guest(guest) => self.pools.tell(guest),
            // The next system begins with a host that has nothing of this one's.
            News::GoingDown { .. } if !self.is_over => {
                self.bus.unload();
                self.is_over = true;
                // The machine goes down in any case.
                let _ = self.clock.as_ref().map(|clock| clock.disable());
                let _ = self.follow_until(LAST_PATIENCE, &mut Vec::new(), |notice| matches!(notice, Notice::Unloaded));
            }
            _ => {}
        }
    }

    fn store(&self) -> Option<Box<dyn Store + 'h>> {
        Some(Box::new(KvpStore::new(&self.pools)))
    }

    fn disks(&self) -> Vec<Arc<dyn BlockDevice + 'h>> {
        self.devices.values().flat_map(|attached| attached.device.disks()).collect()
    }

    fn cards(&self) -> Vec<Arc<dyn NetDevice + 'h>> {
        self.devices.values().flat_map(|attached| attached.device.cards()).collect()
    }
}

/// Agrees on a version; that, and the connection for all further messages.
fn contact(platform: &Platform<'_>) -> Result<(u32, u32), HypervError> {
    // By versions before 5.0 the host learns of a page for interrupts, and by all of two for signals, none of which is used by channels that have
    // interrupts of their own. They are the host's for ever, if there is one.
    let pages = platform.hal.dma_alloc(3)?;
    let page = |number: u64| pages.gpa() + number * PAGE as u64;
    let mut is_there = false;
    for version in VERSIONS {
        let has_choice = version >= version::WIN10_V5;
        let contact = InitiateContact {
            header: Header::new(message::INITIATE_CONTACT),
            version: version.into(),
            target_vp: platform.synic.vp().into(),
            interrupt_page: if has_choice { u64::from(SINT) } else { page(0) }.into(),
            monitor_to_guest: page(1).into(),
            monitor_to_host: page(2).into(),
        };
        let connection = if has_choice { MESSAGE_CONNECTION_5 } else { MESSAGE_CONNECTION };
        let Some(response) = ask(platform, connection, contact.as_bytes())? else { continue };
        is_there = true;
        if response.supported != 0 && response.connection_state == 0 {
            return Ok((version, if has_choice { response.message_connection.get() } else { MESSAGE_CONNECTION }));
        }
    }
    if is_there {
        return Err(HypervError::NoVersion);
    }
    platform.hal.dma_free(pages);
    Err(HypervError::NoBus)
}

/// Asks for one version; nothing when the host does not even have its connection.
fn ask(platform: &Platform<'_>, connection: u32, contact: &[u8]) -> Result<Option<VersionResponse>, HypervError> {
    let deadline = platform.hal.now().saturating_add(PATIENCE);
    let mut is_posted = false;
    loop {
        if !is_posted {
            match platform.calls.post_message(connection, contact)? {
                Status::SUCCESS => is_posted = true,
                Status::INVALID_CONNECTION_ID => return Ok(None),
                Status::INSUFFICIENT_BUFFERS | Status::INSUFFICIENT_MEMORY => {}
                Status(status) => return Err(HypervError::Refused(status)),
            }
        }
        while let Some(message) = platform.synic.take_message()? {
            match VersionResponse::read_from_prefix(&message) {
                Ok((response, _)) if response.header.kind.get() == message::VERSION_RESPONSE => return Ok(Some(response)),
                // Of an earlier system's.
                _ => {}
            }
        }
        let now = platform.hal.now();
        if now >= deadline {
            return Err(HypervError::Timeout);
        }
        platform.hal.wait_until(deadline.min(now.saturating_add(PAUSE)));
    }
}
