//! A SCSI logical unit on a disk of the host: a command and memory in, data moved or sense data out.
//!
//! Nothing here knows VMBus. [`Unit::execute`] is pure but for the disk: who a unit says it is lies in [`identity`], reads, writes and what belongs to
//! them in [`blocks`], what only DVD drives have in [`dvd`]. Commands follow SPC-4, SBC-3 and MMC-6; those that no guest's boot needs are answered as
//! commands that do not exist.

mod blocks;
mod dvd;
mod identity;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use abi::hyperv::scsi::{CDB_SIZE, READ_CAPACITY_16, Sense, asc, opcode, sense_key};
use vm_memory::VolatileSlice;

use crate::disk::{Disk, GuestSlice, SECTOR};

/// What kind of device a unit is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A disk.
    Disk,
    /// A drive with a DVD in it, which is never written.
    Dvd,
}

/// A command's data.
#[derive(Clone, Copy)]
pub enum Data<'a> {
    /// None.
    None,
    /// Memory to be filled.
    ToGuest(&'a [GuestSlice<'a>]),
    /// Memory to be read.
    FromGuest(&'a [GuestSlice<'a>]),
}

/// How many bytes were moved, or why none.
pub type Outcome = Result<u32, Sense>;

/// A logical unit.
pub struct Unit {
    disk: Arc<dyn Disk>,
    kind: Kind,
    /// A number that no other unit has.
    id: u64,
}

impl Unit {
    /// A unit on `disk`; `id` is told to the guest as a name that no other unit has.
    pub fn new(disk: Arc<dyn Disk>, kind: Kind, id: u64) -> Unit {
        Unit { disk, kind, id }
    }

    /// Does a command.
    ///
    /// # Errors
    /// Sense data: what the guest is told instead.
    pub fn execute(&self, cdb: &[u8; CDB_SIZE], data: Data<'_>) -> Outcome {
        let cdb = Cdb(cdb);
        match (cdb.byte(0), self.kind) {
            (opcode::TEST_UNIT_READY | opcode::PREVENT_ALLOW_MEDIUM_REMOVAL, _) => Ok(0),
            (opcode::START_STOP_UNIT, _) => self.start_stop(cdb),
            (opcode::REQUEST_SENSE, _) => {
                reply(data, zerocopy::IntoBytes::as_bytes(&Sense::new(sense_key::NO_SENSE, asc::NONE)), cdb.byte(4).into())
            }
            (opcode::INQUIRY, _) => self.inquiry(cdb, data),
            (opcode::MODE_SENSE_6, _) => self.mode_sense_6(cdb, data),
            (opcode::MODE_SENSE_10, _) => self.mode_sense_10(cdb, data),
            (opcode::READ_CAPACITY_10, _) => self.capacity_10(data),
            (opcode::SERVICE_ACTION_IN_16, _) if cdb.byte(1) & 0x1f == READ_CAPACITY_16 => self.capacity_16(cdb, data),
            (opcode::READ_6 | opcode::READ_10 | opcode::READ_12 | opcode::READ_16, _) => self.read(cdb, data),
            (opcode::WRITE_6 | opcode::WRITE_10 | opcode::WRITE_12 | opcode::WRITE_16, Kind::Disk) => self.write(cdb, data),
            (opcode::SYNCHRONIZE_CACHE_10 | opcode::SYNCHRONIZE_CACHE_16, _) => self.flush(),
            (opcode::VERIFY_10, _) => self.verify(cdb),
            (opcode::UNMAP, Kind::Disk) => self.unmap(cdb, data),
            (opcode::READ_TOC, Kind::Dvd) => self.toc(cdb, data),
            (opcode::GET_CONFIGURATION, Kind::Dvd) => dvd::configuration(cdb, data),
            (opcode::GET_EVENT_STATUS, Kind::Dvd) => dvd::event_status(cdb, data),
            _ => Err(ILLEGAL_COMMAND),
        }
    }

    /// Bytes of a block.
    fn block_size(&self) -> u64 {
        match self.kind {
            Kind::Disk => SECTOR,
            Kind::Dvd => dvd::BLOCK_SIZE,
        }
    }

    /// Blocks of the medium.
    fn blocks(&self) -> u64 {
        self.disk.size() / self.block_size()
    }

    fn is_read_only(&self) -> bool {
        self.kind == Kind::Dvd || self.disk.read_only()
    }
}

/// The answer to an INQUIRY for a unit that is not there.
pub fn inquire_absent(data: Data<'_>, cdb: &[u8; CDB_SIZE]) -> Outcome {
    identity::absent(Cdb(cdb), data)
}

const ILLEGAL_COMMAND: Sense = Sense::new(sense_key::ILLEGAL_REQUEST, asc::INVALID_COMMAND);
const ILLEGAL_FIELD: Sense = Sense::new(sense_key::ILLEGAL_REQUEST, asc::INVALID_FIELD_IN_CDB);

/// A command's bytes; fields are named by the offset of their first byte.
#[derive(Clone, Copy)]
struct Cdb<'a>(&'a [u8; CDB_SIZE]);

impl Cdb<'_> {
    fn byte(self, at: usize) -> u8 {
        self.0.get(at).copied().unwrap_or(0)
    }

    /// A field of `N` bytes, big-endian.
    fn field<const N: usize>(self, at: usize) -> u64 {
        (at..at + N).fold(0, |value, at| value << 8 | u64::from(self.byte(at)))
    }

    /// A length that the guest has room for.
    fn length<const N: usize>(self, at: usize) -> usize {
        usize::try_from(self.field::<N>(at)).unwrap_or(usize::MAX)
    }
}

/// Gives the guest `bytes`, as many as it asks for and has room for.
pub(super) fn reply(data: Data<'_>, bytes: &[u8], asked: usize) -> Outcome {
    let Data::ToGuest(slices) = data else { return Ok(0) };
    let mut rest = bytes.get(..asked).unwrap_or(bytes);
    let whole = rest.len();
    for slice in slices {
        let (here, later) = rest.split_at(slice.len().min(rest.len()));
        slice.copy_from(here);
        rest = later;
    }
    Ok((whole - rest.len()) as u32)
}

/// The bytes that the guest gives, up to `most` of them.
fn parameters(data: Data<'_>, most: usize) -> Vec<u8> {
    let Data::FromGuest(slices) = data else { return Vec::new() };
    let total: usize = slices.iter().map(VolatileSlice::len).sum();
    let mut bytes = vec![0; total.min(most)];
    let mut at = 0;
    for slice in slices {
        if let Some(room) = bytes.get_mut(at..).filter(|room| !room.is_empty()) {
            at += slice.copy_to(room);
        }
    }
    bytes
}
