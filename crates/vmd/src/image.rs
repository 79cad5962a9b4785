//! A disk image as the disks of the dialects see it.

use std::io;
use std::sync::Arc;

use dialects::disk::{Disk, GuestSlice};

/// An image of the host.
pub struct Image(pub Arc<dyn devices::block::Disk>);

impl Disk for Image {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read_only(&self) -> bool {
        self.0.read_only()
    }

    fn read(&self, offset: u64, slices: &[GuestSlice<'_>]) -> io::Result<()> {
        self.0.read_to_guest(offset, slices)
    }

    fn write(&self, offset: u64, slices: &[GuestSlice<'_>]) -> io::Result<()> {
        self.0.write_from_guest(offset, slices)
    }

    fn flush(&self) -> io::Result<()> {
        self.0.flush()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.discard(offset, len)
    }
}
