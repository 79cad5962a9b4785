//! A device on the bus, and how its thread hears of its channels.
//!
//! ```text
//!   processors' threads                           the device's thread
//!   OPEN, CLOSE, resets --> VmBus --> Mailbox --> Attached::work --> Device::opened, closed, work
//!   events ----------------------> its bell -----^
//! ```

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use abi::hyperv::vmbus::{Guid, USER_BYTES};

use super::channel::Channel;
use super::ring::BrokenRing;
use super::{DeviceId, VmBus};
use crate::network::Worked;

/// Called when a device's thread shall look for work.
pub type Peer = Arc<dyn Fn() + Send + Sync>;

/// What the guest is told of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offer {
    /// Class.
    pub class: Guid,
    /// Which of the class: the same after each start of the machine, so that guests know their devices again.
    pub instance: Guid,
    /// [`abi::hyperv::vmbus::offer_flags`].
    pub flags: u16,
    /// The device's own, or the mode of a pipe.
    pub user_defined: [u8; USER_BYTES],
    /// Most subchannels.
    pub sub_channels: u16,
}

/// A device's own part.
pub trait Device: Send {
    /// What ends the work on the open channels; a [`BrokenRing`] does.
    type Error: fmt::Display + From<BrokenRing>;

    /// What the guest is told.
    fn offer(&self) -> Offer;

    /// The guest has opened a channel. It is the device's until [`Device::closed`].
    fn opened(&mut self, channel: Channel);

    /// The channel with this index is over: the device drops it and all buffers that it has of it.
    fn closed(&mut self, index: u16);

    /// Does what there is to do; what to wait for.
    ///
    /// # Errors
    /// The device cannot go on with its channels. They stay open for the guest, and dead, until it opens them again.
    fn work(&mut self) -> Result<Worked, Self::Error>;
}

/// What happened to a device's channels.
pub(super) enum Event {
    Opened(Box<Channel>),
    Closed(u16),
}

/// Where VMBus leaves events for a device.
pub(super) struct Mailbox {
    events: Mutex<Vec<Event>>,
    bell: Peer,
}

impl Mailbox {
    pub(super) fn new(bell: Peer) -> Mailbox {
        Mailbox { events: Mutex::default(), bell }
    }

    pub(super) fn ring(&self) {
        (self.bell)();
    }

    pub(super) fn put(&self, event: Event) {
        self.lock().push(event);
        self.ring();
    }

    fn take(&self) -> Vec<Event> {
        std::mem::take(&mut *self.lock())
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Event>> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A device that is on the bus until this is dropped. For the device's thread.
pub struct Attached<D: Device> {
    device: D,
    bus: Arc<VmBus>,
    id: DeviceId,
    mailbox: Arc<Mailbox>,
    /// Indices of the channels that the device has.
    open: Vec<u16>,
}

impl<D: Device> Attached<D> {
    pub(super) fn new(device: D, bus: Arc<VmBus>, id: DeviceId, mailbox: Arc<Mailbox>) -> Attached<D> {
        Attached { device, bus, id, mailbox, open: Vec::new() }
    }

    /// The device.
    pub fn device(&mut self) -> &mut D {
        &mut self.device
    }

    /// Tells the guest that the device is to go. Until [`Attached::is_let_go`] it goes on with its work: drivers wait for what is under way before
    /// they close.
    pub fn rescind(&self) {
        self.bus.begin_to_leave(self.id);
    }

    /// Whether the guest knows of none of the device's channels, or not any more; the bell rings when that comes to be after [`Attached::rescind`].
    pub fn is_let_go(&self) -> bool {
        !self.bus.is_known(self.id)
    }

    /// Lets the device hear of its channels and do its work; what to wait for before the next call, beside the bell.
    pub fn work(&mut self) -> Worked {
        for event in self.mailbox.take() {
            match event {
                Event::Opened(channel) => {
                    self.open.push(channel.index());
                    self.device.opened(*channel);
                }
                Event::Closed(index) => self.close(index),
            }
        }
        if self.open.is_empty() {
            return Worked::default();
        }
        self.device.work().unwrap_or_else(|error| {
            tracing::warn!(class = %self.device.offer().class, %error, "hyperv: device gives up its channels");
            self.open.clone().into_iter().for_each(|index| self.close(index));
            Worked::default()
        })
    }

    fn close(&mut self, index: u16) {
        if let Some(place) = self.open.iter().position(|open| *open == index) {
            self.open.swap_remove(place);
            self.device.closed(index);
        }
    }
}

impl<D: Device> Drop for Attached<D> {
    fn drop(&mut self) {
        self.bus.detach(self.id);
        // Channels that were never taken go here, and those of the device with it.
        self.mailbox.take();
    }
}
