//! The bus as the guest's messages make it: the connection, what is offered, what is open.

use std::any::Any;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Weak};

use abi::hyperv::ring::CONTROL_BYTES;
use abi::hyperv::vmbus::{
    GpadlCreated, GpadlTeardown, GpadlTorndown, Header, InitiateContact, MAX_CHANNELS, MESSAGE_CONNECTION_5, MESSAGE_TYPE, ModifyChannel,
    ModifyChannelResponse, Offer as OfferMessage, Open, OpenResult, Relid, SINT, STATUS_SUCCESS, STATUS_UNSUCCESSFUL, VersionResponse,
    interrupt_page, message, monitor, offer_flags, version,
};
use vm_memory::{GuestAddress, GuestMemoryBackend};
use vmm::GuestMemory;
use vmm::memory::PAGE_SIZE;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::channel::{Channel, InUse, Signal};
use super::device::{Event, Mailbox, Offer};
use super::gpadl::{Buffer, Gpadls, Verdict};
use super::ring::{Incoming, Outbound};
use super::{CHANNEL_CONNECTIONS, DeviceId, Shared, Synic};
use crate::atomic;

/// Versions that are spoken.
const VERSIONS: [u32; 10] = [
    version::WS2008,
    version::WIN7,
    version::WIN8,
    version::WIN8_1,
    version::WIN10,
    version::WIN10_RS3,
    version::WIN10_V5,
    version::WIN10_V5_1,
    version::WIN10_V5_2,
    version::WIN10_V5_3,
];

/// Synthetic interrupt sources of a processor.
const SOURCES: u8 = 16;

/// What the guest and we agreed on.
#[derive(Debug, Clone, Copy)]
struct Connection {
    version: u32,
    /// Where the guest wants our messages.
    target_vp: u32,
    sint: u8,
    interrupt_page: u64,
    /// Where the guest signals devices that are no integration components, if its version is so old. OpenBSD takes a channel without this for a component.
    monitor_page: Option<u64>,
    /// The guest has asked what there is.
    wants_offers: bool,
}

impl Connection {
    /// Whether events go by the interrupt page.
    fn page_of_events(&self) -> Option<u64> {
        (self.version < version::WIN8).then_some(self.interrupt_page)
    }
}

/// A device on the bus.
struct Seat {
    offer: Offer,
    mailbox: Arc<Mailbox>,
    /// It goes when the guest has let go of its channels, and is not offered again.
    is_leaving: bool,
}

/// What a channel is doing.
enum Phase {
    /// Offered.
    Closed,
    /// The guest has opened it.
    Open { signal: Arc<Signal>, in_use: Weak<()> },
    /// The guest has closed it, and the device does not know or has not let go yet. The guest may have opened it again.
    Closing { in_use: Weak<()>, then: Option<Open> },
}

/// A channel that was offered.
struct Offered {
    device: DeviceId,
    index: u16,
    phase: Phase,
    /// The guest was told that it is gone, and has not said yet that it has understood.
    is_rescinded: bool,
    /// The guest signals it by the monitor page.
    is_monitored: bool,
}

/// Something of a connection that is over, and may be in use still.
pub(super) type LeftBehind = Weak<dyn Any + Send + Sync>;

/// What the guest hears of a connection's end or a new one's beginning.
struct Answer {
    target_vp: u32,
    sint: u8,
    message: Vec<u8>,
    /// The new one. Until the guest has heard of it, nothing else that it says counts, so that it cannot pile up work for devices.
    connection: Option<Connection>,
}

/// The bus.
pub(super) struct State {
    memory: GuestMemory,
    synic: Weak<dyn Synic>,
    bus: Weak<Shared>,
    connection: Option<Connection>,
    devices: BTreeMap<DeviceId, Seat>,
    next_device: DeviceId,
    /// By their numbers.
    channels: BTreeMap<u32, Offered>,
    gpadls: Gpadls,
    left_behind: Vec<LeftBehind>,
    /// Waits until nothing is left behind.
    answer: Option<Answer>,
    /// Somebody calls [`State::scan_monitor`] again and again.
    is_scanned: bool,
}

impl State {
    pub(super) fn new(memory: GuestMemory, synic: Weak<dyn Synic>, bus: Weak<Shared>) -> State {
        State {
            memory,
            synic,
            bus,
            connection: None,
            devices: BTreeMap::new(),
            next_device: 0,
            channels: BTreeMap::new(),
            gpadls: Gpadls::default(),
            left_behind: Vec::new(),
            answer: None,
            is_scanned: false,
        }
    }

    /// A device comes.
    pub(super) fn attach(&mut self, offer: Offer, mailbox: Arc<Mailbox>) -> DeviceId {
        let id = self.next_device;
        self.next_device += 1;
        self.devices.insert(id, Seat { offer, mailbox, is_leaving: false });
        if self.connection.is_some_and(|connection| connection.wants_offers) {
            self.offer(id, 0);
        }
        id
    }

    /// The guest is told that a device goes. It stays until the guest has let go of its channels.
    pub(super) fn begin_to_leave(&mut self, id: DeviceId) {
        if let Some(seat) = self.devices.get_mut(&id) {
            seat.is_leaving = true;
        }
        self.rescind(|channel| channel.device == id);
    }

    /// Whether the guest knows of a channel of the device.
    pub(super) fn is_known(&self, id: DeviceId) -> bool {
        self.channels.values().any(|channel| channel.device == id)
    }

    /// A device goes. Its thread is the caller and drops what it has, so nothing has to be taken from it.
    pub(super) fn detach(&mut self, id: DeviceId) {
        self.devices.remove(&id);
        self.rescind(|channel| channel.device == id);
    }

    /// A message of the guest.
    pub(super) fn on_message(&mut self, bytes: &[u8]) {
        let Ok((header, _)) = Header::ref_from_prefix(bytes) else { return };
        let kind = header.kind.get();
        if kind == message::INITIATE_CONTACT {
            return with(bytes, |contact| self.initiate_contact(contact));
        }
        if self.connection.is_none() {
            return;
        }
        match kind {
            message::REQUEST_OFFERS => self.request_offers(),
            message::GPADL_HEADER => {
                let verdict = self.gpadls.begin(&self.memory, bytes, |relid| self.channels.contains_key(&relid));
                self.gpadl_created(verdict);
            }
            message::GPADL_BODY => {
                let verdict = self.gpadls.go_on(&self.memory, bytes);
                self.gpadl_created(verdict);
            }
            message::GPADL_TEARDOWN => with(bytes, |teardown: &GpadlTeardown| self.gpadls.tear_down(teardown.gpadl.get())),
            message::OPEN => with(bytes, |open| self.open(open)),
            message::CLOSE => with(bytes, |close: &Relid| self.close(close.relid.get())),
            message::RELID_RELEASED => with(bytes, |released: &Relid| self.released(released.relid.get())),
            message::MODIFY_CHANNEL => with(bytes, |modify| self.modify(modify)),
            message::UNLOAD => self.unload(),
            // What is not known is ignored, as of devices that are not there.
            _ => {}
        }
        self.settle();
    }

    /// An event for a channel; whether there is such a channel.
    pub(super) fn signal(&self, relid: u32) -> bool {
        let Some(channel) = self.channels.get(&relid) else { return false };
        if let (Phase::Open { .. }, Some(seat)) = (&channel.phase, self.devices.get(&channel.device)) {
            seat.mailbox.ring();
        }
        true
    }

    /// An event for the channels in the interrupt page; whether there is one.
    pub(super) fn signal_page(&self) -> bool {
        let Some(page) = self.connection.and_then(|connection| connection.page_of_events()) else { return false };
        for word in 0..=MAX_CHANNELS / 32 {
            let gpa = page + interrupt_page::TO_HOST + u64::from(word) * 4;
            self.signal_bits(gpa, word * 32);
        }
        true
    }

    /// Whether somebody has to begin to call [`State::scan_monitor`]; it is asked once.
    pub(super) fn begins_scan(&mut self) -> bool {
        let begins = !self.is_scanned && self.monitored_page().is_some();
        self.is_scanned |= begins;
        begins
    }

    /// Looks for signals in the monitor page; whether that has to go on.
    pub(super) fn scan_monitor(&mut self) -> bool {
        let page = self.monitored_page();
        self.is_scanned = page.is_some();
        let Some(page) = page else { return false };
        for group in 0..monitor::GROUPS {
            let gpa = page + monitor::TRIGGERS + u64::from(group) * monitor::GROUP_BYTES;
            self.signal_bits(gpa, group * 32);
        }
        true
    }

    /// The monitor page, while there is a channel for which it is of use.
    fn monitored_page(&self) -> Option<u64> {
        let page = self.connection?.monitor_page?;
        let is_open = |channel: &Offered| channel.is_monitored && matches!(channel.phase, Phase::Open { .. });
        self.channels.values().any(is_open).then_some(page)
    }

    /// Takes the bits at `gpa` as events of the channels from `first`.
    fn signal_bits(&self, gpa: u64, first: u32) {
        let bits = atomic::with(&self.memory, gpa, |bits: &AtomicU32| u32::from_le(bits.swap(0, Ordering::SeqCst))).unwrap_or(0);
        for bit in (0..32).filter(|bit| bits & 1 << bit != 0) {
            self.signal(first + bit);
        }
    }

    /// The machine was reset.
    pub(super) fn reset(&mut self) {
        self.disconnect();
        self.answer = None;
    }

    /// The memory under a GPADL's number.
    pub(super) fn gpadl(&self, relid: u32, number: u32) -> Option<Buffer> {
        self.gpadls.get(relid, number, &self.bus)
    }

    /// Offers what is missing of the subchannels 1 to `count` of the device whose first channel is `relid`.
    pub(super) fn offer_sub_channels(&mut self, relid: u32, count: u16) {
        let Some(&Offered { device, index: 0, .. }) = self.channels.get(&relid) else { return };
        let Some(most) = self.devices.get(&device).map(|seat| seat.offer.sub_channels) else { return };
        for index in 1..=count.min(most) {
            let is_there = |channel: &Offered| channel.device == device && channel.index == index && !channel.is_rescinded;
            if !self.channels.values().any(is_there) {
                self.offer(device, index);
            }
        }
    }

    /// Does what waited until something was not in use any more.
    pub(super) fn settle(&mut self) {
        for gpadl in self.gpadls.torn_down() {
            self.send(&GpadlTorndown { header: Header::new(message::GPADL_TORNDOWN), gpadl: gpadl.into() });
        }
        let mut again = Vec::new();
        for channel in self.channels.values_mut() {
            if let Phase::Closing { in_use, then } = &mut channel.phase
                && in_use.strong_count() == 0
            {
                again.extend(then.take());
                channel.phase = Phase::Closed;
            }
        }
        again.iter().for_each(|open| self.open(open));
        self.left_behind.retain(|left| left.strong_count() != 0);
        if self.left_behind.is_empty()
            && let Some(Answer { target_vp, sint, message, connection }) = self.answer.take()
        {
            self.connection = connection;
            self.post(target_vp, sint, &message);
        }
    }

    fn initiate_contact(&mut self, contact: &InitiateContact) {
        self.disconnect();
        let (wanted, target_vp, interrupt_page) = (contact.version.get(), contact.target_vp.get(), contact.interrupt_page.get());
        let names_source = wanted >= version::WIN10_V5;
        let sint = if names_source { interrupt_page as u8 } else { SINT };
        let is_page = |page: u64| page.is_multiple_of(PAGE_SIZE) && self.memory.check_range(GuestAddress(page), PAGE_SIZE as usize);
        let monitor_page = Some(contact.monitor_to_host.get()).filter(|page| wanted <= version::WIN10 && *page != 0 && is_page(*page));
        let connection = Connection { version: wanted, target_vp, sint, interrupt_page, monitor_page, wants_offers: false };
        let has_pages = connection.page_of_events().is_none_or(is_page);
        let is_spoken = VERSIONS.contains(&wanted) && has_pages && sint < SOURCES;
        let response = VersionResponse {
            header: Header::new(message::VERSION_RESPONSE),
            supported: is_spoken.into(),
            connection_state: 0,
            padding: 0.into(),
            message_connection: if names_source { MESSAGE_CONNECTION_5 } else { wanted }.into(),
        };
        let message = response.as_bytes().to_vec();
        // A guest that names no source has none to hear it from.
        let sint = if sint < SOURCES { sint } else { SINT };
        self.answer = Some(Answer { target_vp, sint, message, connection: is_spoken.then_some(connection) });
        self.settle();
    }

    fn request_offers(&mut self) {
        match &mut self.connection {
            Some(connection) if !connection.wants_offers => connection.wants_offers = true,
            _ => return,
        }
        let mut ids: Vec<DeviceId> = self.devices.iter().filter(|(_, seat)| !seat.is_leaving).map(|(id, _)| *id).collect();
        // The same order at each start, whichever thread was first.
        ids.sort_by_key(|id| self.devices.get(id).map(|seat| (seat.offer.class, seat.offer.instance)));
        ids.into_iter().for_each(|id| self.offer(id, 0));
        self.send(&Header::new(message::ALL_OFFERS_DELIVERED));
    }

    fn offer(&mut self, device: DeviceId, index: u16) {
        let Some(offer) = self.devices.get(&device).map(|seat| seat.offer) else { return };
        let Some(relid) = (1..=MAX_CHANNELS).find(|relid| !self.channels.contains_key(relid)) else {
            return tracing::warn!(class = %offer.class, "hyperv: no number is left for a channel");
        };
        let is_component = offer.flags & offer_flags::NAMED_PIPE_MODE != 0;
        let has_page = self.connection.is_some_and(|connection| connection.monitor_page.is_some());
        let monitor_id = u8::try_from(relid).ok().filter(|id| has_page && !is_component && u32::from(*id) < monitor::GROUPS * 32);
        self.channels
            .insert(relid, Offered { device, index, phase: Phase::Closed, is_rescinded: false, is_monitored: monitor_id.is_some() });
        self.send(&OfferMessage {
            header: Header::new(message::OFFER),
            class: offer.class,
            instance: offer.instance,
            reserved: [0.into(); 2],
            flags: offer.flags.into(),
            mmio_megabytes: 0.into(),
            user_defined: offer.user_defined,
            sub_channel_index: index.into(),
            reserved2: 0.into(),
            relid: relid.into(),
            monitor_id: monitor_id.unwrap_or(0),
            monitor_allocated: monitor_id.is_some().into(),
            is_dedicated_interrupt: 1.into(),
            connection_id: (CHANNEL_CONNECTIONS + relid).into(),
        });
    }

    fn rescind(&mut self, which: impl Fn(&Offered) -> bool) {
        let mut gone = Vec::new();
        for (relid, channel) in self.channels.iter_mut().filter(|(_, channel)| which(channel) && !channel.is_rescinded) {
            channel.is_rescinded = true;
            gone.push(*relid);
        }
        for relid in gone {
            self.send(&Relid { header: Header::new(message::RESCIND), relid: relid.into() });
        }
    }

    /// The guest has heard that a channel is gone.
    fn released(&mut self, relid: u32) {
        if self.channels.get(&relid).is_some_and(|channel| channel.is_rescinded) {
            self.close(relid);
            self.gpadls.forget(relid, &mut self.left_behind);
            let channel = self.channels.remove(&relid);
            // One that leaves wants to know.
            if let Some(seat) = channel.and_then(|channel| self.devices.get(&channel.device)) {
                seat.mailbox.ring();
            }
        }
    }

    fn gpadl_created(&mut self, verdict: Option<Verdict>) {
        if let Some(Verdict { relid, gpadl, is_good }) = verdict {
            let status = if is_good { STATUS_SUCCESS } else { STATUS_UNSUCCESSFUL };
            let header = Header::new(message::GPADL_CREATED);
            self.send(&GpadlCreated { header, relid: relid.into(), gpadl: gpadl.into(), status: status.into() });
        }
    }

    fn open(&mut self, open: &Open) {
        let relid = open.relid.get();
        if let Some(Offered { phase: Phase::Closing { then, .. }, .. }) = self.channels.get_mut(&relid) {
            *then = Some(*open);
            return;
        }
        let status = if self.connect(relid, open).is_some() { STATUS_SUCCESS } else { STATUS_UNSUCCESSFUL };
        let header = Header::new(message::OPEN_RESULT);
        self.send(&OpenResult { header, relid: open.relid, open_id: open.open_id, status: status.into() });
    }

    /// Makes the channel and gives it to its device.
    fn connect(&mut self, relid: u32, open: &Open) -> Option<()> {
        let connection = self.connection?;
        let channel = self.channels.get_mut(&relid).filter(|channel| matches!(channel.phase, Phase::Closed) && !channel.is_rescinded)?;
        let seat = self.devices.get(&channel.device)?;
        let buffer = self.gpadls.get(relid, open.ring_gpadl.get(), &self.bus)?;
        let pages = buffer.range().len() / CONTROL_BYTES as u32;
        let to_host = open.downstream_page_offset.get();
        let to_guest = pages.checked_sub(to_host)?;
        let signal = Arc::new(Signal {
            synic: Weak::clone(&self.synic),
            memory: self.memory.clone(),
            sint: connection.sint,
            relid,
            target_vp: open.target_vp.get().into(),
            interrupt_page: connection.page_of_events(),
        });
        let token = Arc::new(());
        let in_use = Arc::downgrade(&token);
        let made = Channel {
            index: channel.index,
            relid,
            user_data: open.user_data,
            incoming: Incoming::new(self.memory.clone(), buffer.clone(), 0, to_host)?,
            outbound: Outbound::new(self.memory.clone(), buffer, to_host, to_guest)?,
            signal: Arc::clone(&signal),
            memory: self.memory.clone(),
            bus: Weak::clone(&self.bus),
            packet: Vec::new(),
            _in_use: InUse { token: Some(token), bus: Weak::clone(&self.bus) },
        };
        channel.phase = Phase::Open { signal, in_use };
        seat.mailbox.put(Event::Opened(Box::new(made)));
        Some(())
    }

    fn close(&mut self, relid: u32) {
        let Some(channel) = self.channels.get_mut(&relid) else { return };
        match &mut channel.phase {
            Phase::Closed => return,
            Phase::Open { in_use, .. } => channel.phase = Phase::Closing { in_use: Weak::clone(in_use), then: None },
            Phase::Closing { then, .. } => {
                *then = None;
                return;
            }
        }
        let (device, index) = (channel.device, channel.index);
        if let Some(seat) = self.devices.get(&device) {
            seat.mailbox.put(Event::Closed(index));
        }
        if index == 0 {
            // They were offered because the device's first channel asked for them.
            self.rescind(|channel| channel.device == device && channel.index != 0);
        }
    }

    fn modify(&mut self, modify: &ModifyChannel) {
        let channel = self.channels.get(&modify.relid.get());
        let status = match channel.map(|channel| &channel.phase) {
            Some(Phase::Open { signal, .. }) => {
                signal.target_vp.store(modify.target_vp.get(), Ordering::Relaxed);
                STATUS_SUCCESS
            }
            _ => STATUS_UNSUCCESSFUL,
        };
        if self.connection.is_some_and(|connection| connection.version >= version::WIN10_V5_3) {
            let header = Header::new(message::MODIFY_CHANNEL_RESPONSE);
            self.send(&ModifyChannelResponse { header, relid: modify.relid, status: status.into() });
        }
    }

    fn unload(&mut self) {
        if let Some(Connection { target_vp, sint, .. }) = self.connection {
            self.disconnect();
            let message = Header::new(message::UNLOAD_RESPONSE).as_bytes().to_vec();
            self.answer = Some(Answer { target_vp, sint, message, connection: None });
        }
    }

    /// The connection is over: takes everything from the devices that is the guest's, and forgets all numbers.
    fn disconnect(&mut self) {
        self.connection = None;
        for channel in std::mem::take(&mut self.channels).into_values() {
            let (Phase::Open { in_use, .. } | Phase::Closing { in_use, .. }) = channel.phase else { continue };
            self.left_behind.push(in_use);
            if let Some(seat) = self.devices.get(&channel.device) {
                seat.mailbox.put(Event::Closed(channel.index));
            }
        }
        std::mem::take(&mut self.gpadls).leave(&mut self.left_behind);
        self.devices.values().filter(|seat| seat.is_leaving).for_each(|seat| seat.mailbox.ring());
    }

    fn send(&self, message: &(impl IntoBytes + Immutable)) {
        let Some(Connection { target_vp, sint, .. }) = self.connection else { return };
        self.post(target_vp, sint, message.as_bytes());
    }

    fn post(&self, target_vp: u32, sint: u8, message: &[u8]) {
        let is_taken = self.synic.upgrade().is_some_and(|synic| synic.post_message(target_vp, sint, MESSAGE_TYPE, message));
        if !is_taken {
            tracing::debug!(target_vp, "hyperv: the guest has no room for a message of VMBus");
        }
    }
}

/// The message in `bytes`, if it is long enough for one.
fn with<M: FromBytes + zerocopy::KnownLayout + Immutable>(bytes: &[u8], act: impl FnOnce(&M)) {
    if let Ok((message, _)) = M::ref_from_prefix(bytes) {
        act(message);
    }
}
