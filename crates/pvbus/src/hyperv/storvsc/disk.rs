//! A disk of a controller, and the SCSI commands that its requests become (SBC-3).

use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;

use abi::hyperv::scsi::{CDB_SIZE, UnmapDescriptor, UnmapHeader, opcode};
use spin::Mutex;
use zerocopy::IntoBytes;

use super::Controller;
use super::queue::{Command, Data, verdict};
use crate::block::{BlockDevice, DiskError, Geometry, Request, SECTOR, Ticket};
use crate::hal::{MILLISECOND, Nanos};

/// How long is waited at once; an upcall ends it sooner.
const PAUSE: Nanos = MILLISECOND;
/// Bytes of UNMAP's parameters with one range.
const UNMAP_BYTES: usize = size_of::<UnmapHeader>() + size_of::<UnmapDescriptor>();

/// A disk.
pub(super) struct Disk<'h> {
    pub name: String,
    pub lun: u8,
    /// No other disk's, even when it comes to the place of one that went.
    pub number: usize,
    pub controller: Arc<Mutex<Controller<'h>>>,
}

impl BlockDevice for Disk<'_> {
    fn name(&self) -> &str {
        &self.name
    }

    fn geometry(&self) -> Option<Geometry> {
        self.controller.lock().geometry(self.lun, self.number)
    }

    fn begin(&self, request: Request<'_>) -> Result<Option<Ticket>, DiskError> {
        let mut controller = self.controller.lock();
        let geometry = controller.geometry(self.lun, self.number).ok_or(DiskError::Gone)?;
        let data = |sector, length| {
            geometry.check(sector, length as u64)?;
            if length == 0 || length > geometry.request_bytes { Err(DiskError::Range) } else { Ok(()) }
        };
        let blocks = |bytes: u64| bytes.checked_div(geometry.sector_size).unwrap_or_default();
        let parameters;
        let (cdb, data) = match request {
            Request::Read { sector, length } => {
                data(sector, length)?;
                (transfer(opcode::READ_16, blocks(sector * SECTOR), blocks(length as u64)), Data::Read(length))
            }
            Request::Write { .. } | Request::Discard { .. } if geometry.is_read_only => return Err(DiskError::ReadOnly),
            Request::Write { sector, bytes } => {
                data(sector, bytes.len())?;
                (transfer(opcode::WRITE_16, blocks(sector * SECTOR), blocks(bytes.len() as u64)), Data::Write(bytes))
            }
            Request::Flush if !geometry.has_flush => return Err(DiskError::Unsupported),
            Request::Flush => (transfer(opcode::SYNCHRONIZE_CACHE_16, 0, 0), Data::None),
            Request::Discard { .. } if !geometry.has_discard => return Err(DiskError::Unsupported),
            Request::Discard { sector, sectors } => {
                let length = sectors.checked_mul(SECTOR).ok_or(DiskError::Range)?;
                geometry.check(sector, length)?;
                parameters = unmap(blocks(sector * SECTOR), blocks(length))?;
                (short(opcode::UNMAP, UNMAP_BYTES), Data::Write(&parameters))
            }
        };
        let cdb_length = if matches!(request, Request::Discard { .. }) { 10 } else { CDB_LENGTH };
        let command = Command { lun: self.lun, cdb, cdb_length, data };
        Ok(controller.with(|queue| queue.begin(command))?.map(Ticket))
    }

    fn end(&self, ticket: Ticket, bytes: &mut [u8]) -> Result<Option<Ticket>, DiskError> {
        let Some(answer) = self.controller.lock().with(|queue| queue.end(ticket.0, bytes))? else { return Ok(Some(ticket)) };
        let moved = verdict(&answer)?;
        // What a read did not bring is not there.
        if moved < bytes.len() { Err(DiskError::Failed) } else { Ok(None) }
    }

    fn pause(&self) {
        let mut controller = self.controller.lock();
        let hal = controller.platform.hal;
        let has_answers = controller.with(|queue| queue.has_answers()).unwrap_or(true);
        // Others may have the controller meanwhile.
        drop(controller);
        if !has_answers {
            hal.wait_until(hal.now().saturating_add(PAUSE));
        }
    }
}

/// Bytes of a command with 64 bits of address.
const CDB_LENGTH: u8 = 16;
const _: () = assert!(CDB_LENGTH as usize == CDB_SIZE);

/// A command with 64 bits of address and 32 of length: READ (16), WRITE (16), SYNCHRONIZE CACHE (16).
fn transfer(opcode: u8, block: u64, blocks: u64) -> [u8; CDB_SIZE] {
    let [a, b, c, d, e, f, g, h] = block.to_be_bytes();
    let [.., i, j, k, l] = blocks.to_be_bytes();
    [opcode, 0, a, b, c, d, e, f, g, h, i, j, k, l, 0, 0]
}

/// A command whose length of parameters is in bytes 7 and 8: UNMAP.
fn short(opcode: u8, length: usize) -> [u8; CDB_SIZE] {
    let [.., high, low] = length.to_be_bytes();
    [opcode, 0, 0, 0, 0, 0, 0, high, low, 0, 0, 0, 0, 0, 0, 0]
}

/// Parameters of UNMAP with one range.
fn unmap(block: u64, blocks: u64) -> Result<Vec<u8>, DiskError> {
    let after = |bytes: usize| u16::try_from(UNMAP_BYTES - bytes).map_err(|_| DiskError::Range);
    let head = UnmapHeader {
        data_length: after(size_of::<u16>())?.into(),
        descriptors_length: after(size_of::<UnmapHeader>())?.into(),
        reserved: 0.into(),
    };
    let count = u32::try_from(blocks).map_err(|_| DiskError::Range)?;
    let range = UnmapDescriptor { block: block.into(), count: count.into(), reserved: 0.into() };
    Ok([head.as_bytes(), range.as_bytes()].concat())
}
