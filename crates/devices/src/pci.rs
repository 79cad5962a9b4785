//! PCI bus 0: configuration by ports 0xcf8/0xcfc, and dispatch of memory and I/O accesses by the base address registers.
//!
//! PCI Local Bus Specification 3.0. A function ([`PciFunction`]) owns its configuration space ([`PciConfig`]), which keeps
//! the BARs, the capability list, INTx and MSI-X ([`Msix`]) right by itself; the function is only asked about its own
//! registers.
//!
//! ```text
//!   0xcf8/0xcfc ----> PciBus --> PciConfig of the function --BAR or command changed--> routes of PciBus
//!   memory, I/O ----> PciBus --routes--> Msix table, or PciFunction::bar_read / bar_write
//! ```
//!
//! [`PciBus::assign`] programs all BARs as firmware would, for guests that start without one; a guest may move them within the
//! windows.

mod bus;
mod chipset;
mod config;
mod msix;

pub use bus::{IO_WINDOW, MEMORY_WINDOW, PciAddress, PciBus, PciError};
pub use chipset::{Chipset, host_bridge, isa_bridge};
pub use config::{BarKind, PciConfig, PciIdentity};
pub use msix::Msix;

/// A PCI function.
pub trait PciFunction: Send + Sync {
    /// Its configuration space.
    fn config(&self) -> &PciConfig;

    /// Read of `data.len()` bytes at `offset` in BAR `bar`; it begins inside the BAR but may reach beyond its end. The MSI-X table is
    /// not asked for here.
    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]);

    /// Write to BAR `bar`. The MSI-X table is not written here.
    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]);

    /// Read of configuration space before [`PciConfig`] answers; `false` leaves it to answer. For capabilities whose reading has
    /// effects.
    fn config_read(&self, offset: u8, data: &mut [u8]) -> bool {
        let _ = (offset, data);
        false
    }

    /// Configuration space was written at `offset` (and [`PciConfig`] has the new value).
    fn config_written(&self, offset: u8, len: usize) {
        let _ = (offset, len);
    }

    /// Power-on state. The bus resets [`PciConfig`] by itself.
    fn reset(&self);
}
