//! Who a unit says it is, and what it can do (SPC-4 sections 6.6, 6.13 and 7.8).

use abi::hyperv::scsi::{
    BlockCharacteristics, Designator, Inquiry, Provisioning, Sense, VpdHeader, asc, device_type, mode, sense_key, vpd,
};
use zerocopy::IntoBytes;

use super::{Cdb, Data, ILLEGAL_FIELD, Kind, Outcome, Unit, blocks, reply};

/// As Hyper-V's disks: Linux' `hv_storvsc` and udev's rules know the name.
const VENDOR: &[u8; 8] = b"Msft    ";
const DISK: &[u8; 16] = b"Virtual Disk    ";
const DVD: &[u8; 16] = b"Virtual DVD-ROM ";
const REVISION: &[u8; 4] = b"1.0 ";
/// First four bits of a locally assigned NAA designator (SPC-4 section 7.8.6.6.4).
const NAA_LOCAL: u64 = 3 << 60;

const NOT_SAVED: Sense = Sense::new(sense_key::ILLEGAL_REQUEST, asc::SAVING_NOT_SUPPORTED);

impl Unit {
    pub(super) fn inquiry(&self, cdb: Cdb<'_>, data: Data<'_>) -> Outcome {
        let asked = cdb.length::<2>(3);
        if cdb.byte(1) & Inquiry::EVPD != 0 {
            return reply(data, &self.vpd(cdb.byte(2)).ok_or(ILLEGAL_FIELD)?, asked);
        }
        let (product, removable) = match self.kind {
            Kind::Disk => (DISK, 0),
            Kind::Dvd => (DVD, Inquiry::REMOVABLE),
        };
        reply(data, standard(self.device_type(), removable, product).as_bytes(), asked)
    }

    /// A page of vital product data.
    fn vpd(&self, page: u8) -> Option<Vec<u8>> {
        let content = match page {
            vpd::SUPPORTED_PAGES => {
                let mut pages = vec![vpd::SUPPORTED_PAGES, vpd::SERIAL_NUMBER, vpd::DEVICE_IDENTIFICATION];
                if self.kind == Kind::Disk {
                    pages.extend([vpd::BLOCK_LIMITS, vpd::BLOCK_CHARACTERISTICS, vpd::LOGICAL_BLOCK_PROVISIONING]);
                }
                pages
            }
            vpd::SERIAL_NUMBER => format!("{:016x}", self.id).into_bytes(),
            vpd::DEVICE_IDENTIFICATION => {
                let number = (NAA_LOCAL | self.id & !(0xf << 60)).to_be_bytes();
                let name = [VENDOR.as_slice(), format!("{:016x}", self.id).as_bytes()].concat();
                [designator(Designator::BINARY, Designator::NAA, &number), designator(Designator::ASCII, Designator::T10, &name)].concat()
            }
            vpd::BLOCK_LIMITS if self.kind == Kind::Disk => blocks::limits().as_bytes().to_vec(),
            vpd::BLOCK_CHARACTERISTICS if self.kind == Kind::Disk => {
                BlockCharacteristics { rotation_rate: BlockCharacteristics::NON_ROTATING.into(), rest: [0; 58] }.as_bytes().to_vec()
            }
            vpd::LOGICAL_BLOCK_PROVISIONING if self.kind == Kind::Disk => {
                let (commands, kind) = if self.is_read_only() { (0, 0) } else { (Provisioning::UNMAP, Provisioning::THIN) };
                Provisioning { threshold_exponent: 0, commands, kind, reserved: 0 }.as_bytes().to_vec()
            }
            _ => return None,
        };
        let header = VpdHeader { peripheral: self.device_type(), page, length: (content.len() as u16).into() };
        Some([header.as_bytes(), &content].concat())
    }

    pub(super) fn mode_sense_6(&self, cdb: Cdb<'_>, data: Data<'_>) -> Outcome {
        let pages = self.mode_pages(cdb)?;
        // Length, medium type, device-specific, length of block descriptors.
        let header = [3 + pages.len() as u8, 0, self.device_specific(), 0];
        reply(data, &[header.as_slice(), &pages].concat(), cdb.byte(4).into())
    }

    pub(super) fn mode_sense_10(&self, cdb: Cdb<'_>, data: Data<'_>) -> Outcome {
        let pages = self.mode_pages(cdb)?;
        let header = [0, 6 + pages.len() as u8, 0, self.device_specific(), 0, 0, 0, 0];
        reply(data, &[header.as_slice(), &pages].concat(), cdb.length::<2>(7))
    }

    /// The parameters that are asked for.
    fn mode_pages(&self, cdb: Cdb<'_>) -> Result<Vec<u8>, Sense> {
        let (control, page) = (cdb.byte(2) >> 6, cdb.byte(2) & 0x3f);
        if control == mode::SAVED {
            return Err(NOT_SAVED);
        }
        match (page, self.kind) {
            (mode::CACHING | mode::ALL, Kind::Disk) => {
                let mut caching = vec![0; mode::CACHING_SIZE];
                let cache = if control == mode::CHANGEABLE { 0 } else { mode::WRITE_CACHE };
                for (byte, value) in caching.iter_mut().zip([mode::CACHING, mode::CACHING_SIZE as u8 - 2, cache]) {
                    *byte = value;
                }
                Ok(caching)
            }
            (mode::CAPABILITIES | mode::ALL, Kind::Dvd) => {
                let mut capabilities = vec![0; mode::CAPABILITIES_SIZE];
                // It reads, and nobody can write, lock or eject; no parameter can be changed.
                let (reads, tray) = if control == mode::CHANGEABLE { (0, 0) } else { (mode::READS_DVD_ROM, mode::TRAY) };
                let values = [mode::CAPABILITIES, mode::CAPABILITIES_SIZE as u8 - 2, reads, 0, 0, 0, tray];
                for (byte, value) in capabilities.iter_mut().zip(values) {
                    *byte = value;
                }
                Ok(capabilities)
            }
            _ => Err(ILLEGAL_FIELD),
        }
    }

    fn device_specific(&self) -> u8 {
        let protected = if self.is_read_only() { mode::WRITE_PROTECTED } else { 0 };
        // The byte has no meaning for DVD drives (MMC-6 section 7.2.1).
        if self.kind == Kind::Disk { mode::DPO_FUA | protected } else { 0 }
    }

    fn device_type(&self) -> u8 {
        match self.kind {
            Kind::Disk => device_type::DISK,
            Kind::Dvd => device_type::CD_DVD,
        }
    }
}

/// The answer to an INQUIRY for a unit that is not there.
pub(super) fn absent(cdb: Cdb<'_>, data: Data<'_>) -> Outcome {
    if cdb.byte(1) & Inquiry::EVPD != 0 {
        return Err(ILLEGAL_FIELD);
    }
    reply(data, standard(device_type::ABSENT, 0, DISK).as_bytes(), cdb.length::<2>(3))
}

fn standard(peripheral: u8, removable: u8, product: &[u8; 16]) -> Inquiry {
    Inquiry {
        peripheral,
        removable,
        version: Inquiry::SPC_3,
        response_format: Inquiry::RESPONSE_FORMAT,
        additional_length: size_of::<Inquiry>() as u8 - 5,
        flags: [0; 2],
        queue: Inquiry::COMMAND_QUEUE,
        vendor: *VENDOR,
        product: *product,
        revision: *REVISION,
    }
}

fn designator(code_set: u8, kind: u8, name: &[u8]) -> Vec<u8> {
    [Designator { code_set, kind, reserved: 0, length: name.len() as u8 }.as_bytes(), name].concat()
}
