//! The paravirtual bus, guest half.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod detect;
pub mod driver;
pub mod errno;
pub mod hal;
pub mod hyperv;
pub mod ioctl;
pub mod kvm;
pub mod net;
pub mod openbsd;
pub mod store;
#[cfg(test)]
mod testing;
pub mod tree;
pub mod vmware;
pub mod xen;

pub use detect::{Detection, Interface, Kind, detect};
pub use driver::{Driver, Event, GuestInfo, News, TimeOfDay};
pub use errno::Errno;
pub use hal::{Dma, Hal, HalError, Nanos};
pub use ioctl::{BadAddress, Stores, UserMemory};
pub use store::{Store, StoreError};
pub use tree::{Polled, Tree};
