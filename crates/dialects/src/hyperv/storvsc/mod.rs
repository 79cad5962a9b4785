//! storvsc.

pub mod scsi;
