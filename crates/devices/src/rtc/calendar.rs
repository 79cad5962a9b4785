//! Dates: days since the epoch to year, month, day and back (proleptic Gregorian calendar).

use serde::{Deserialize, Serialize};

const DAY: i64 = 86_400;
/// Days of 400 years.
const ERA: i64 = 146_097;
/// Days from 0000-03-01 to 1970-01-01.
const EPOCH: i64 = 719_468;
/// The last second of year 9999: what two two-digit registers can show.
const LAST: i64 = 253_402_300_799;

/// Date and time of day as a guest may have written them, each field any value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Calendar {
    pub(super) year: u16,
    pub(super) month: u8,
    pub(super) day: u8,
    pub(super) hour: u8,
    pub(super) minute: u8,
    pub(super) second: u8,
}

impl Calendar {
    /// `seconds` since 1970-01-01 00:00; what the registers cannot show becomes the nearest time that they can.
    pub(super) fn from_seconds(seconds: i64) -> Calendar {
        let seconds = seconds.clamp(0, LAST);
        let (days, rest) = (seconds / DAY, seconds % DAY);
        // Years begin in March here, so that the leap day is the last.
        let shifted = days + EPOCH;
        let (era, day_of_era) = (shifted / ERA, shifted % ERA);
        let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * month + 2) / 5 + 1;
        let month = if month < 10 { month + 3 } else { month - 9 };
        let year = era * 400 + year_of_era + i64::from(month <= 2);
        Calendar {
            year: year as u16,
            month: month as u8,
            day: day as u8,
            hour: (rest / 3600) as u8,
            minute: (rest / 60 % 60) as u8,
            second: (rest % 60) as u8,
        }
    }

    /// Seconds since 1970-01-01 00:00. Fields that are out of range carry over.
    pub(super) fn to_seconds(self) -> i64 {
        let month = i64::from(self.month.clamp(1, 12));
        let year = i64::from(self.year) - i64::from(month <= 2);
        let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
        let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + i64::from(self.day.max(1)) - 1;
        let days = era * ERA + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - EPOCH;
        days * DAY + i64::from(self.hour) * 3600 + i64::from(self.minute) * 60 + i64::from(self.second)
    }

    /// Day of the week, 1 for Sunday.
    pub(super) fn weekday(self) -> u8 {
        // 1970-01-01 was a Thursday.
        ((self.to_seconds().div_euclid(DAY) + 4).rem_euclid(7) + 1) as u8
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn known_days_are_right() {
        let day = |seconds| {
            let c = Calendar::from_seconds(seconds);
            (c.year, c.month, c.day, c.weekday())
        };
        assert_eq!(day(0), (1970, 1, 1, 5));
        assert_eq!(day(951_782_400), (2000, 2, 29, 3));
        assert_eq!(day(4_107_542_400), (2100, 3, 1, 2));
    }

    proptest! {
        #[test]
        fn there_and_back_is_the_same(seconds in 0..=LAST) {
            prop_assert_eq!(Calendar::from_seconds(seconds).to_seconds(), seconds);
        }
    }
}
