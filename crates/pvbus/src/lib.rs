//! The paravirtual bus, guest half.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod detect;
pub mod errno;
pub mod hal;
pub mod hyperv;
pub mod store;
pub mod vmware;

pub use detect::{Detection, Interface, Kind, detect};
pub use errno::Errno;
pub use hal::{Dma, Hal, HalError, Nanos};
pub use store::{Store, StoreError};
