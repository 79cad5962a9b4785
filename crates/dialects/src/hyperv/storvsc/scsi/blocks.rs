//! Reads, writes, flushes and discards (SBC-3).

use abi::hyperv::scsi::{
    BYTE_CHECK, BlockLimits, Capacity10, Capacity16, FUA, Sense, UnmapDescriptor, UnmapHeader, asc, mmc, opcode, sense_key,
};
use zerocopy::{FromBytes, IntoBytes};

use super::{Cdb, Data, ILLEGAL_FIELD, Kind, Outcome, Unit, reply};
use crate::disk::GuestSlice;

/// Most blocks of one UNMAP: 1 GiB, so that one command cannot keep the disk for long.
const MAX_UNMAP: u32 = 1 << 21;
/// Most ranges of one UNMAP.
const MAX_UNMAP_DESCRIPTORS: u32 = 64;
/// Unit in which space is given back, in blocks.
const UNMAP_GRANULARITY: u32 = 8;

const OUT_OF_RANGE: Sense = Sense::new(sense_key::ILLEGAL_REQUEST, asc::LBA_OUT_OF_RANGE);
const ILLEGAL_PARAMETER: Sense = Sense::new(sense_key::ILLEGAL_REQUEST, asc::INVALID_FIELD_IN_PARAMETERS);
const WRITE_PROTECTED: Sense = Sense::new(sense_key::DATA_PROTECT, asc::WRITE_PROTECTED);
const REMOVAL_PREVENTED: Sense = Sense::new(sense_key::ILLEGAL_REQUEST, asc::MEDIUM_REMOVAL_PREVENTED);
const UNREADABLE: Sense = Sense::new(sense_key::MEDIUM_ERROR, asc::UNRECOVERED_READ_ERROR);
const UNWRITABLE: Sense = Sense::new(sense_key::MEDIUM_ERROR, asc::WRITE_ERROR);

/// What the block limits page says of a disk.
pub(super) fn limits() -> BlockLimits {
    BlockLimits {
        max_unmap: MAX_UNMAP.into(),
        max_unmap_descriptors: MAX_UNMAP_DESCRIPTORS.into(),
        unmap_granularity: UNMAP_GRANULARITY.into(),
        ..BlockLimits::default()
    }
}

impl Unit {
    pub(super) fn capacity_10(&self, data: Data<'_>) -> Outcome {
        let last = u32::try_from(self.blocks().saturating_sub(1)).unwrap_or(u32::MAX);
        let answer = Capacity10 { last_block: last.into(), block_size: (self.block_size() as u32).into() };
        reply(data, answer.as_bytes(), usize::MAX)
    }

    pub(super) fn capacity_16(&self, cdb: Cdb<'_>, data: Data<'_>) -> Outcome {
        let provisioning = if self.is_read_only() { 0 } else { Capacity16::LBPME };
        let answer = Capacity16 {
            last_block: self.blocks().saturating_sub(1).into(),
            block_size: (self.block_size() as u32).into(),
            protection: 0,
            physical_exponent: 0,
            provisioning: provisioning.into(),
            reserved: [0; 16],
        };
        reply(data, answer.as_bytes(), cdb.length::<4>(10))
    }

    pub(super) fn read(&self, cdb: Cdb<'_>, data: Data<'_>) -> Outcome {
        let (offset, len) = self.range(cdb)?;
        if len == 0 {
            return Ok(0);
        }
        let Data::ToGuest(slices) = data else { return Err(ILLEGAL_FIELD) };
        let slices = first_bytes(slices, len)?;
        let done = if wants_medium(cdb) { self.disk.flush() } else { Ok(()) }.and_then(|()| self.disk.read(offset, &slices));
        answer(done, len, UNREADABLE)
    }

    pub(super) fn write(&self, cdb: Cdb<'_>, data: Data<'_>) -> Outcome {
        let (offset, len) = self.range(cdb)?;
        if self.is_read_only() {
            return Err(WRITE_PROTECTED);
        }
        if len == 0 {
            return Ok(0);
        }
        let Data::FromGuest(slices) = data else { return Err(ILLEGAL_FIELD) };
        let slices = first_bytes(slices, len)?;
        let done = self.disk.write(offset, &slices).and_then(|()| if wants_medium(cdb) { self.disk.flush() } else { Ok(()) });
        answer(done, len, UNWRITABLE)
    }

    /// Whether blocks are there, which is all that can be said without reading them. Nothing is compared.
    pub(super) fn verify(&self, cdb: Cdb<'_>) -> Outcome {
        if cdb.byte(1) & BYTE_CHECK != 0 {
            return Err(ILLEGAL_FIELD);
        }
        self.inside(cdb.field::<4>(2), cdb.field::<2>(7)).map(|_| 0)
    }

    pub(super) fn flush(&self) -> Outcome {
        answer(self.disk.flush(), 0, UNWRITABLE)
    }

    /// There is nothing to be started; what stops may rely on its writes being durable. The medium stays in.
    pub(super) fn start_stop(&self, cdb: Cdb<'_>) -> Outcome {
        match (self.kind, cdb.byte(4) & (mmc::LOAD_EJECT | mmc::START)) {
            (Kind::Dvd, mmc::LOAD_EJECT) => Err(REMOVAL_PREVENTED),
            (_, 0) => self.flush(),
            _ => Ok(0),
        }
    }

    pub(super) fn unmap(&self, cdb: Cdb<'_>, data: Data<'_>) -> Outcome {
        if self.is_read_only() {
            return Err(WRITE_PROTECTED);
        }
        let most = size_of::<UnmapHeader>() + MAX_UNMAP_DESCRIPTORS as usize * size_of::<UnmapDescriptor>();
        let list = super::parameters(data, cdb.length::<2>(7).min(most));
        if list.is_empty() {
            return Ok(0);
        }
        let (header, descriptors) = UnmapHeader::read_from_prefix(&list).map_err(|_| ILLEGAL_PARAMETER)?;
        let descriptors = descriptors.get(..header.descriptors_length.get().into()).ok_or(ILLEGAL_PARAMETER)?;
        let mut left = MAX_UNMAP;
        // All are looked at before anything is done.
        let mut ranges = Vec::with_capacity(MAX_UNMAP_DESCRIPTORS as usize);
        for bytes in descriptors.chunks_exact(size_of::<UnmapDescriptor>()) {
            let descriptor = UnmapDescriptor::read_from_bytes(bytes).map_err(|_| ILLEGAL_PARAMETER)?;
            left = left.checked_sub(descriptor.count.get()).ok_or(ILLEGAL_PARAMETER)?;
            ranges.push(self.inside(descriptor.block.get(), descriptor.count.get().into())?);
        }
        for (offset, len) in ranges.into_iter().filter(|(_, len)| *len > 0) {
            answer(self.disk.discard(offset, len), 0, UNWRITABLE)?;
        }
        Ok(list.len() as u32)
    }

    /// The range of a read or write, in bytes.
    fn range(&self, cdb: Cdb<'_>) -> Result<(u64, u64), Sense> {
        let (first, count) = match cdb.byte(0) {
            opcode::READ_6 | opcode::WRITE_6 => {
                let count = cdb.field::<1>(4);
                (cdb.field::<3>(1) & 0x1f_ffff, if count == 0 { 256 } else { count })
            }
            opcode::READ_10 | opcode::WRITE_10 => (cdb.field::<4>(2), cdb.field::<2>(7)),
            opcode::READ_12 | opcode::WRITE_12 => (cdb.field::<4>(2), cdb.field::<4>(6)),
            _ => (cdb.field::<8>(2), cdb.field::<4>(10)),
        };
        self.inside(first, count)
    }

    /// A range of blocks in bytes, if it is on the medium.
    fn inside(&self, first: u64, count: u64) -> Result<(u64, u64), Sense> {
        let end = first.checked_add(count).filter(|end| *end <= self.blocks());
        end.map(|_| (first * self.block_size(), count * self.block_size())).ok_or(OUT_OF_RANGE)
    }
}

/// Whether a read or write is to be of the medium itself.
fn wants_medium(cdb: Cdb<'_>) -> bool {
    !matches!(cdb.byte(0), opcode::READ_6 | opcode::WRITE_6) && cdb.byte(1) & FUA != 0
}

/// As many slices as have `len` bytes.
fn first_bytes<'a>(slices: &[GuestSlice<'a>], len: u64) -> Result<Vec<GuestSlice<'a>>, Sense> {
    let mut left = usize::try_from(len).map_err(|_| ILLEGAL_FIELD)?;
    let mut first = Vec::with_capacity(slices.len());
    for slice in slices {
        let here = slice.len().min(left);
        if here > 0 {
            first.push(slice.subslice(0, here).map_err(|_| ILLEGAL_FIELD)?);
        }
        left -= here;
    }
    if left == 0 { Ok(first) } else { Err(ILLEGAL_FIELD) }
}

fn answer(done: std::io::Result<()>, len: u64, sense: Sense) -> Outcome {
    done.map(|()| len as u32).map_err(|error| {
        tracing::warn!(%error, "hyperv: disk request failed");
        sense
    })
}
