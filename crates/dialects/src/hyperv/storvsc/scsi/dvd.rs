//! What only DVD drives have (MMC-6): a table of contents with one track, one profile, and no news.

use abi::hyperv::scsi::mmc;

use super::{Cdb, Data, ILLEGAL_FIELD, Outcome, Unit, reply};

/// Bytes of a block.
pub(super) const BLOCK_SIZE: u64 = 2048;

impl Unit {
    /// READ TOC/PMA/ATIP (section 6.25): one data track, one session.
    pub(super) fn toc(&self, cdb: Cdb<'_>, data: Data<'_>) -> Outcome {
        let minutes_wanted = cdb.byte(1) & 2 != 0;
        let track = |number: u8, block: u64| {
            let [a, b, c, d] = (u32::try_from(block).unwrap_or(u32::MAX)).to_be_bytes();
            [0, mmc::DATA_TRACK, number, 0, a, b, c, d]
        };
        let tracks = match cdb.byte(2) & 0xf {
            // Addresses in minutes are for players.
            _ if minutes_wanted => return Err(ILLEGAL_FIELD),
            0 => match cdb.byte(6) {
                0..=1 => [track(1, 0), track(mmc::LEAD_OUT, self.blocks())].concat(),
                mmc::LEAD_OUT => track(mmc::LEAD_OUT, self.blocks()).to_vec(),
                _ => return Err(ILLEGAL_FIELD),
            },
            // The first track of the last session.
            1 => track(1, 0).to_vec(),
            _ => return Err(ILLEGAL_FIELD),
        };
        // First and last track, or session.
        let header = [0, 2 + tracks.len() as u8, 1, 1];
        reply(data, &[header.as_slice(), &tracks].concat(), cdb.length::<2>(7))
    }
}

/// GET CONFIGURATION (section 6.6): the profile list, with the one profile.
pub(super) fn configuration(cdb: Cdb<'_>, data: Data<'_>) -> Outcome {
    let [high, low] = mmc::PROFILE_DVD_ROM.to_be_bytes();
    let mut features = Vec::new();
    if cdb.field::<2>(2) == u64::from(mmc::FEATURE_PROFILES) {
        // Persistent and current, four bytes more: the profile, current.
        features.extend([0, 0, 3, 4, high, low, 1, 0]);
    }
    let header = [0, 0, 0, 4 + features.len() as u8, 0, 0, high, low];
    reply(data, &[header.as_slice(), &features].concat(), cdb.length::<2>(7))
}

/// GET EVENT STATUS NOTIFICATION (section 6.7): the medium is there, as before.
pub(super) fn event_status(cdb: Cdb<'_>, data: Data<'_>) -> Outcome {
    let polled = cdb.byte(1) & 1 != 0;
    if !polled {
        return Err(ILLEGAL_FIELD);
    }
    let media = 1 << mmc::EVENT_MEDIA;
    let answer: &[u8] = if cdb.byte(4) & media != 0 {
        &[0, 6, mmc::EVENT_MEDIA, media, 0, mmc::MEDIA_PRESENT, 0, 0]
    } else {
        // No such events.
        &[0, 2, 0x80, media]
    };
    reply(data, answer, cdb.length::<2>(7))
}
