//! storvsc.

mod protocol;
pub mod scsi;
mod units;

pub use units::{Full, Units};
