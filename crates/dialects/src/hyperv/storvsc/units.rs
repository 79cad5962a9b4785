//! The logical units of a controller, and commands for them.
//!
//! Units are at bus 0, target 0. They come and go while the machine runs; the guest is told to look again.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use abi::hyperv::scsi::{self, CDB_SIZE, Sense, asc, opcode, sense_key};
use abi::hyperv::storvsc::{SENSE_SIZE, Srb, direction, srb_status};
use zerocopy::IntoBytes;

use super::scsi::{Data, Outcome, Unit, inquire_absent, reply};
use crate::disk::GuestSlice;

/// Bytes of a unit's address in the answer to REPORT LUNS.
const ADDRESS: usize = 8;

/// The units of a controller; shared with who adds and removes them.
#[derive(Default)]
pub struct Units {
    units: Mutex<BTreeMap<u8, Entry>>,
    changed: AtomicBool,
}

struct Entry {
    unit: Arc<Unit>,
    state: UnitState,
}

/// What a guest makes of a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnitState {
    /// It has not asked for more than what the unit is.
    Unused,
    /// It has had commands done.
    Used,
}

/// All numbers are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a SCSI controller has room for 64 disks")]
pub struct Full;

/// Most units; as Hyper-V's controllers.
const MAX_UNITS: u8 = 64;

impl Units {
    /// Adds the unit that `make` makes for the first number that is free; says which. The controller is to be woken.
    ///
    /// # Errors
    /// [`Full`].
    pub fn add(&self, make: impl FnOnce(u8) -> Unit) -> Result<u8, Full> {
        let mut units = self.units();
        let lun = (0..MAX_UNITS).find(|lun| !units.contains_key(lun)).ok_or(Full)?;
        units.insert(lun, Entry { unit: Arc::new(make(lun)), state: UnitState::Unused });
        self.changed.store(true, Ordering::Release);
        Ok(lun)
    }

    /// Removes a unit; `false` when there is none. The controller is to be woken.
    pub fn remove(&self, lun: u8) -> bool {
        let was_there = self.units().remove(&lun).is_some();
        self.changed.store(true, Ordering::Release);
        was_there
    }

    /// How a unit is; `None` when there is none of this number.
    pub fn state(&self, lun: u8) -> Option<UnitState> {
        self.units().get(&lun).map(|entry| entry.state)
    }

    /// Another driver, or none, is at the controller.
    pub(super) fn begin(&self) {
        self.units().values_mut().for_each(|entry| entry.state = UnitState::Unused);
        // It finds what is there by itself.
        self.take_changed();
    }

    /// Whether units have come or gone since the last time this was asked.
    pub(super) fn take_changed(&self) -> bool {
        self.changed.swap(false, Ordering::AcqRel)
    }

    /// Does a command, which becomes its own answer.
    pub(super) fn execute(&self, srb: &mut Srb, slices: &[GuestSlice<'_>]) {
        let mut cdb = [0; CDB_SIZE];
        let (Some(command), true) = (srb.payload.first_chunk::<CDB_SIZE>(), usize::from(srb.cdb_length) <= CDB_SIZE) else {
            return fail(srb, srb_status::INVALID_REQUEST, None);
        };
        let length = usize::from(srb.cdb_length);
        if let (Some(to), Some(from)) = (cdb.get_mut(..length), command.get(..length)) {
            to.copy_from_slice(from);
        }
        let data = match srb.data_in {
            _ if slices.is_empty() => Data::None,
            direction::READ => Data::ToGuest(slices),
            direction::WRITE => Data::FromGuest(slices),
            _ => Data::None,
        };
        let is_ours = (srb.path, srb.target) == (0, 0);
        let unit = self.units().get_mut(&srb.lun).filter(|_| is_ours).map(|entry| {
            if !matches!(cdb[0], opcode::INQUIRY | opcode::REPORT_LUNS) {
                entry.state = UnitState::Used;
            }
            Arc::clone(&entry.unit)
        });
        let outcome = match (cdb[0], unit) {
            (opcode::REPORT_LUNS, _) => self.report(&cdb, data, is_ours),
            (_, Some(unit)) => unit.execute(&cdb, data),
            (opcode::INQUIRY, None) => inquire_absent(data, &cdb),
            (_, None) => {
                return fail(srb, srb_status::INVALID_LUN, Some(Sense::new(sense_key::ILLEGAL_REQUEST, asc::LUN_NOT_SUPPORTED)));
            }
        };
        match outcome {
            Ok(moved) => {
                srb.srb_status = srb_status::SUCCESS;
                srb.scsi_status = scsi::status::GOOD;
                srb.sense_length = 0;
                srb.transfer_length = moved.into();
            }
            Err(sense) => {
                if let Some(asked) = asked_of_itself(&cdb) {
                    // Linux takes the failure for success (`storvsc_on_io_completion`), so that what it finds has to be nothing.
                    let _ = reply(data, &vec![0; asked], asked);
                }
                fail(srb, srb_status::ERROR, Some(sense));
            }
        }
    }

    /// REPORT LUNS (SPC-4 section 6.33).
    fn report(&self, cdb: &[u8; CDB_SIZE], data: Data<'_>, is_ours: bool) -> Outcome {
        let luns: Vec<u8> = self.units().keys().copied().filter(|_| is_ours).collect();
        let mut list = vec![0; ADDRESS * (1 + luns.len())];
        let ([head, ..], rest) = list.as_chunks_mut::<ADDRESS>().0.split_at_mut(1) else { return Ok(0) };
        let [a, b, c, d] = ((ADDRESS * luns.len()) as u32).to_be_bytes();
        *head = [a, b, c, d, 0, 0, 0, 0];
        for (address, lun) in rest.iter_mut().zip(luns) {
            address[1] = lun;
        }
        let asked = u32::from_be_bytes([cdb[6], cdb[7], cdb[8], cdb[9]]);
        reply(data, &list, asked as usize)
    }

    fn units(&self) -> MutexGuard<'_, BTreeMap<u8, Entry>> {
        self.units.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How many bytes a command wants to know of the unit itself: INQUIRY and MODE SENSE.
fn asked_of_itself(cdb: &[u8; CDB_SIZE]) -> Option<usize> {
    match cdb[0] {
        opcode::INQUIRY => Some(u16::from_be_bytes([cdb[3], cdb[4]]).into()),
        opcode::MODE_SENSE_6 => Some(cdb[4].into()),
        opcode::MODE_SENSE_10 => Some(u16::from_be_bytes([cdb[7], cdb[8]]).into()),
        _ => None,
    }
}

/// Answers a command whose memory is none.
pub(super) fn refuse(srb: &mut Srb) {
    fail(srb, srb_status::INVALID_REQUEST, None);
}

/// The command is not done; the guest hears why where there is sense data and room for it.
fn fail(srb: &mut Srb, status: u8, sense: Option<Sense>) {
    srb.srb_status = status;
    srb.transfer_length = 0.into();
    let room = usize::from(srb.sense_length).min(SENSE_SIZE).min(size_of::<Sense>());
    srb.sense_length = 0;
    if let Some(sense) = sense {
        srb.scsi_status = scsi::status::CHECK_CONDITION;
        if let (Some(to), Some(from)) = (srb.payload.get_mut(..room), sense.as_bytes().get(..room)) {
            to.copy_from_slice(from);
            srb.sense_length = room as u8;
            srb.srb_status |= srb_status::AUTOSENSE_VALID;
        }
    }
}
