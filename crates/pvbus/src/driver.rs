//! What a device driver of the bus is: a state machine that is polled.
//!
//! A driver does not wait for its device; xen0 alone waits for its store, and hyperv0 for a last word when the machine goes down. [`Driver::poll`] does what is due, tells the kernel about it by [`Event`]s and says when it wants to be called
//! again. The kernel tells drivers of itself by [`News`].

use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::block::BlockDevice;
use crate::detect::Kind;
use crate::hal::Nanos;
use crate::net::{NetDevice, Nic};
use crate::store::Store;

/// A device that is attached.
pub trait Driver<'h>: Send {
    /// Does what is due at `now`; returns when to be called again, `None` for not before an interrupt or news.
    fn poll(&mut self, now: Nanos, events: &mut Vec<Event>) -> Option<Nanos>;

    /// The interrupt line at which it wants to be polled, as the PCI function's configuration names it.
    fn interrupt_line(&self) -> Option<u8> {
        None
    }

    /// Whether it wants to be polled when the hypervisor calls ([`crate::Hal::upcall_vector`]).
    fn takes_upcalls(&self) -> bool {
        false
    }

    /// Hears about the kernel.
    fn hear(&mut self, news: &News, now: Nanos) {
        let _ = (news, now);
    }

    /// The information store that it opens.
    fn store(&self) -> Option<Box<dyn Store + 'h>> {
        None
    }

    /// The disks that it has now.
    fn disks(&self) -> Vec<Arc<dyn BlockDevice + 'h>> {
        Vec::new()
    }

    /// The network cards that it has now.
    fn cards(&self) -> Vec<Arc<dyn NetDevice + 'h>> {
        Vec::new()
    }
}

/// What a device wants of the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Shut down and power off: the host of this kind asks.
    Shutdown(Kind),
    /// Shut down and reboot.
    Reboot(Kind),
    /// The machine will be suspended.
    Suspend(Kind),
    /// The machine was suspended, or saved and restored: random numbers are to be stirred, times are to be read again.
    Resume(Kind),
    /// The host's time of day.
    Time(TimeOfDay),
    /// Read the real-time clock again.
    SyncRtc(Kind),
    /// Bring the file systems to rest, then tell [`News::Frozen`].
    Freeze(Kind),
    /// Let the file systems go on.
    Thaw(Kind),
    /// A line for the message buffer.
    Message(String),
}

/// A time of day that a host tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TimeOfDay {
    /// Whose.
    pub source: Kind,
    /// Seconds since 1970.
    pub seconds: u64,
    /// Nanoseconds of that second.
    pub nanoseconds: u32,
    /// When it was read, in time of [`crate::Hal::now`].
    pub read_at: Nanos,
    /// Whether the clock should be set to it at once: at the start and after a resume. Otherwise it is a sample.
    pub set: bool,
}

/// What the kernel tells its devices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum News {
    /// What the guest is, again whenever something of it changes.
    Guest(GuestInfo),
    /// The file systems are at rest, or could not be brought to rest.
    Frozen(bool),
    /// The machine goes down now; nothing is polled after it.
    GoingDown {
        /// Whether it will come up again at once.
        reboot: bool,
    },
}

/// What a host may want to know of its guest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GuestInfo {
    /// Name of the host.
    pub hostname: String,
    /// Full name of the operating system, with its version.
    pub os_name_full: String,
    /// Short name of the operating system.
    pub os_name: String,
    /// Version of the operating system, of numbers and dots.
    pub os_version: String,
    /// [`crate::Hal::now`] when it started.
    pub started: Nanos,
    /// Network cards with their addresses.
    pub nics: Vec<Nic>,
}
