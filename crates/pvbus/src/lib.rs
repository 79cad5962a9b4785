//! The paravirtual bus, guest half: finds every hypervisor interface, attaches the devices that belong to it, and opens its information store.
//!
//! The root is OpenBSD's pvbus(4). It is a library for kernels (`no_std` + `alloc`) and for programs; what it needs of either is the trait
//! [`Hal`], on the other side of which is all `unsafe`. Drivers are polled, say when they want to be polled again, and tell the
//! kernel by [`Event`]s what their host wants.
//!
//! ```
//! use pvbus::hal::Cpuid;
//! use pvbus::{Event, Hal, Nanos, Tree};
//!
//! struct Kernel;
//! impl Hal for Kernel {
//!     fn cpuid(&self, leaf: u32, _subleaf: u32) -> Cpuid {
//!         match leaf {
//!             1 => Cpuid { ecx: 1 << 31, ..Cpuid::default() },
//!             0x4000_0000 => Cpuid { eax: 0x4000_0001, ebx: 0x4b4d_564b, ecx: 0x564b_4d56, edx: 0x4d },
//!             _ => Cpuid::default(), // In a kernel: the instruction.
//!         }
//!     }
//!     fn now(&self) -> Nanos {
//!         0
//!     }
//! }
//!
//! let mut tree = Tree::attach(&Kernel);
//! assert_eq!(tree.dmesg(), ["pvbus0 at mainbus0: KVM"]);
//! for event in tree.poll(Kernel.now()).events {
//!     match event {
//!         Event::Shutdown(host) => println!("Shutting down in response to request from {host} host"),
//!         other => println!("{other:?}"),
//!     }
//! }
//! ```
//!
//! ```text
//!   Tree ---attach---> detect                      Stores ---> ioctl (pvbus(4))    Store (typed)
//!     |                                                           |                   |
//!     +--poll/on_interrupt/tell--> Driver: vmt, pvclock, xen0,    +-------------------+--> guestinfo, XenStore, pools
//!                                    |     hyperv0, vmmci                                    |
//!                                    +------------------------- Hal -------------------------+
//! ```
#![no_std]
#![forbid(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(clippy::indexing_slicing, clippy::cast_possible_truncation, clippy::unwrap_used, clippy::expect_used, clippy::panic)
)]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod block;
pub mod detect;
mod dma;
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

/// The example of the documentation's page, so that it stays true.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/pvbus.md")]
struct Page;
