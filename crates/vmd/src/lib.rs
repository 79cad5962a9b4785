//! Assembles and runs machines.
//!
//! [`config`] says what is wanted, [`boot`] puts a kernel into memory, [`board`] builds the devices of a PC around it, [`layout`] says
//! which dialects a guest finds and [`paravirtual`] makes them, [`profile`] decides what CPUID tells, [`bus`] leads the processors' accesses to devices and dialects, and [`machine`]
//! runs the whole. [`control`] is what the outside holds of it, [`socket`] hands that to other processes, and [`kv`], [`power`],
//! [`status`], [`inventory`] and [`hotplug`] are what can be done with it. [`backends`] chooses what executes the processors and [`host`] tells what there is to choose from.

pub mod backends;
pub mod board;
pub mod boot;
pub mod bus;
pub mod config;
pub mod control;
pub mod fw_cfg;
pub mod host;
pub mod hotplug;
pub mod hyperv;
mod image;
pub mod inventory;
pub mod kv;
pub mod layout;
mod link;
pub mod machine;
pub mod paravirtual;
pub mod power;
pub mod profile;
pub mod socket;
pub mod stats;
pub mod status;
pub mod steal;
pub mod store;
pub mod xen;
