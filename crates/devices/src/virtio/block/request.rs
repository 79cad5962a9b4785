//! One request of a block device (section 5.2.6): a header, data, and a status byte at the end of what the device may write.
//!
//! Every field is the guest's. What does not fit the disk or the request's kind is answered with IOERR, an unknown kind with
//! UNSUPP, and a request without room for a status byte is handed back untouched.

use abi::virtio::block::{
    ID_BYTES, RangeSegment, RequestHeader, S_IOERR, S_OK, S_UNSUPP, SECTOR, T_DISCARD, T_FLUSH, T_GET_ID, T_IN, T_OUT, T_WRITE_ZEROES,
    WRITE_ZEROES_UNMAP,
};
use vm_memory::Bytes;
use vmm::memory::GuestMemory;
use zerocopy::{FromBytes, IntoBytes};

use super::super::queue::{Chain, SegmentError};
use crate::block::Disk;

/// Most sectors in one segment of a discard or write-zeroes request: 1 GiB, so that one request cannot keep the disk for long.
pub(super) const MAX_RANGE_SECTORS: u32 = 1 << 21;
/// Most segments in such a request.
pub(super) const MAX_RANGES: usize = 16;

/// What requests are done with.
pub(super) struct Target<'a> {
    pub disk: &'a dyn Disk,
    pub id: &'a [u8; ID_BYTES],
    /// There is no flush command: writes are durable before they are answered.
    pub write_through: bool,
}

/// Why a request is answered with something else than OK.
enum Refusal {
    Failed(std::io::Error),
    Bad(&'static str),
    Unsupported(u32),
}

impl From<SegmentError> for Refusal {
    fn from(_: SegmentError) -> Refusal {
        Refusal::Bad("a buffer is too short or not in guest memory")
    }
}

impl From<std::io::Error> for Refusal {
    fn from(error: std::io::Error) -> Refusal {
        Refusal::Failed(error)
    }
}

impl Target<'_> {
    /// Does the request in `chain` and writes its status. Returns how many bytes were written to the guest's buffers, as the
    /// used ring wants it.
    pub(super) fn execute(&self, memory: &GuestMemory, chain: &mut Chain) -> u32 {
        let Some(status_address) = chain.writable.take_last_byte() else {
            tracing::debug!("virtio-blk: request without room for its status");
            return 0;
        };
        let room = chain.writable.len();
        let status = match self.work(memory, chain) {
            Ok(()) => S_OK,
            Err(Refusal::Failed(error)) => {
                tracing::warn!(%error, "virtio-blk: request failed on the host");
                S_IOERR
            }
            Err(Refusal::Bad(what)) => {
                tracing::debug!(what, "virtio-blk: bad request");
                S_IOERR
            }
            Err(Refusal::Unsupported(kind)) => {
                tracing::debug!(kind, "virtio-blk: request of unknown kind");
                S_UNSUPP
            }
        };
        if memory.write_obj(status, status_address).is_err() {
            return 0;
        }
        // The status byte comes last, whatever of the data before it was written.
        u32::try_from(room - chain.writable.len() + 1).unwrap_or(u32::MAX)
    }

    fn work(&self, memory: &GuestMemory, chain: &mut Chain) -> Result<(), Refusal> {
        let mut header = [0; size_of::<RequestHeader>()];
        chain.readable.read(memory, &mut header)?;
        let header = RequestHeader::read_from_bytes(&header).map_err(|_| Refusal::Bad("header"))?;
        let sector = header.sector.get();
        match header.kind.get() {
            T_IN => {
                let len = chain.writable.len();
                let offset = self.range(sector, len)?;
                let mut slices = Vec::new();
                chain.writable.slices(memory, len, &mut slices)?;
                Ok(self.disk.read_to_guest(offset, &slices)?)
            }
            T_OUT => {
                self.check_writable()?;
                let len = chain.readable.len();
                let offset = self.range(sector, len)?;
                let mut slices = Vec::new();
                chain.readable.slices(memory, len, &mut slices)?;
                self.disk.write_from_guest(offset, &slices)?;
                self.settle()
            }
            T_FLUSH => Ok(self.disk.flush()?),
            T_GET_ID => {
                let len = (chain.writable.len() as usize).min(ID_BYTES);
                Ok(chain.writable.write(memory, &self.id[..len])?)
            }
            T_DISCARD => self.ranges(memory, chain, false),
            T_WRITE_ZEROES => self.ranges(memory, chain, true),
            kind => Err(Refusal::Unsupported(kind)),
        }
    }

    /// Discard and write-zeroes.
    fn ranges(&self, memory: &GuestMemory, chain: &mut Chain, zero: bool) -> Result<(), Refusal> {
        self.check_writable()?;
        let mut bytes = [0; MAX_RANGES * size_of::<RangeSegment>()];
        let len = usize::try_from(chain.readable.len()).unwrap_or(usize::MAX);
        let bytes = bytes.get_mut(..len).ok_or(Refusal::Bad("too many ranges"))?;
        if bytes.is_empty() || !len.is_multiple_of(size_of::<RangeSegment>()) {
            return Err(Refusal::Bad("a length that is not that of some ranges"));
        }
        chain.readable.read(memory, bytes)?;
        let segments = <[RangeSegment]>::ref_from_bytes(bytes).map_err(|_| Refusal::Bad("ranges"))?;
        // All are checked before the first is done, so that a bad request changes nothing.
        for segment in segments {
            let (sectors, flags) = (segment.num_sectors.get(), segment.flags.get());
            // Flags that a device does not know, and unmap on a discard, are UNSUPP (5.2.6.2).
            if flags & !WRITE_ZEROES_UNMAP != 0 || (!zero && flags != 0) {
                return Err(Refusal::Unsupported(if zero { T_WRITE_ZEROES } else { T_DISCARD }));
            }
            if sectors > MAX_RANGE_SECTORS {
                return Err(Refusal::Bad("a range is longer than the device takes"));
            }
            self.range(segment.sector.get(), u64::from(sectors) * SECTOR)?;
        }
        for segment in segments {
            let len = u64::from(segment.num_sectors.get()) * SECTOR;
            let offset = self.range(segment.sector.get(), len)?;
            if len == 0 {
                continue;
            }
            if zero {
                self.disk.write_zeroes(offset, len, segment.flags.get() & WRITE_ZEROES_UNMAP != 0)?;
            } else {
                self.disk.discard(offset, len)?;
            }
        }
        self.settle()
    }

    /// The position of `len` bytes from `sector`, if they are whole sectors of the disk.
    fn range(&self, sector: u64, len: u64) -> Result<u64, Refusal> {
        let offset = sector.checked_mul(SECTOR).ok_or(Refusal::Bad("a position outside of the disk"))?;
        let end = offset.checked_add(len).ok_or(Refusal::Bad("a position outside of the disk"))?;
        if !len.is_multiple_of(SECTOR) {
            return Err(Refusal::Bad("a length that is not whole sectors"));
        }
        if end > self.disk.size() {
            return Err(Refusal::Bad("a position outside of the disk"));
        }
        Ok(offset)
    }

    fn check_writable(&self) -> Result<(), Refusal> {
        if self.disk.read_only() { Err(Refusal::Bad("a write to a read-only disk")) } else { Ok(()) }
    }

    fn settle(&self) -> Result<(), Refusal> {
        if self.write_through { Ok(self.disk.flush()?) } else { Ok(()) }
    }
}

/// The bytes of the device configuration.
pub(super) fn config(disk: &dyn Disk, seg_max: u32) -> Vec<u8> {
    use abi::virtio::block::Config;
    let ranges = if disk.read_only() { 0 } else { MAX_RANGES as u32 };
    let range_sectors = if disk.read_only() { 0 } else { MAX_RANGE_SECTORS };
    let config = Config {
        capacity: (disk.size() / SECTOR).into(),
        seg_max: seg_max.into(),
        blk_size: (SECTOR as u32).into(),
        // Files live in blocks of 4096 bytes.
        physical_block_exp: 3,
        min_io_size: 8.into(),
        opt_io_size: 0.into(),
        max_discard_sectors: range_sectors.into(),
        max_discard_seg: ranges.into(),
        discard_sector_alignment: 8.into(),
        max_write_zeroes_sectors: range_sectors.into(),
        max_write_zeroes_seg: ranges.into(),
        write_zeroes_may_unmap: 1,
        ..Config::default()
    };
    config.as_bytes().to_vec()
}
