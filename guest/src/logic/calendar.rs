//! Days and dates of the Gregorian calendar, and what the real-time clock's registers say.
//!
//! The conversions count years from March, so that a leap day is a year's last; 400 years have 146,097 days.
//! (Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms".)

use core::fmt;

const DAYS_OF_400_YEARS: u64 = 146_097;
/// From 0000-03-01 to 1970-01-01.
const DAYS_TO_1970: u64 = 719_468;
const SECONDS_OF_A_DAY: u64 = 86_400;

/// A point in time, Coordinated Universal Time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct DateTime {
    /// Year.
    pub year: u64,
    /// Month, 1 to 12.
    pub month: u64,
    /// Day, 1 to 31.
    pub day: u64,
    /// Second of the day.
    pub second: u64,
}

impl DateTime {
    /// From seconds since 1970.
    pub fn from_unix(seconds: u64) -> DateTime {
        let days = seconds / SECONDS_OF_A_DAY + DAYS_TO_1970;
        let (era, day) = (days / DAYS_OF_400_YEARS, days % DAYS_OF_400_YEARS);
        // Without the leap days of 4, 100 and 400 years before it, every year has 365 days.
        let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
        let day_of_year = day - (365 * year + year / 4 - year / 100);
        // Months from March, five of which have 153 days.
        let month = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * month + 2) / 5 + 1;
        let month = if month < 10 { month + 3 } else { month - 9 };
        DateTime { year: year + era * 400 + u64::from(month <= 2), month, day, second: seconds % SECONDS_OF_A_DAY }
    }

    /// Seconds since 1970; `None` before that, or when it is no date.
    pub fn to_unix(self) -> Option<u64> {
        if self.year > 9999 || !(1..=12).contains(&self.month) || !(1..=31).contains(&self.day) || self.second >= SECONDS_OF_A_DAY {
            return None;
        }
        let year = self.year.checked_sub(u64::from(self.month <= 2))?;
        let month = (self.month + 9) % 12;
        let (era, year) = (year / 400, year % 400);
        let days = era * DAYS_OF_400_YEARS + 365 * year + year / 4 - year / 100 + (153 * month + 2) / 5 + self.day - 1;
        Some(days.checked_sub(DAYS_TO_1970)? * SECONDS_OF_A_DAY + self.second)
    }

    /// From the registers of an MC146818: second, minute, hour, day, month, year, register B, and the century where firmware
    /// keeps it. `None` when that is no date.
    pub fn from_rtc(registers: [u8; 6], status_b: u8, century: u8) -> Option<DateTime> {
        const BINARY: u8 = 1 << 2;
        const HOURS_24: u8 = 1 << 1;
        const AFTERNOON: u8 = 1 << 7;
        let number = |value: u8| match status_b & BINARY {
            0 if value >> 4 > 9 || value & 0xf > 9 => None,
            0 => Some(u64::from(value >> 4) * 10 + u64::from(value & 0xf)),
            _ => Some(u64::from(value)),
        };
        let [second, minute, hour, day, month, year] = registers;
        let mut hours = number(hour & !AFTERNOON)?;
        if status_b & HOURS_24 == 0 {
            hours = hours % 12 + if hour & AFTERNOON == 0 { 0 } else { 12 };
        }
        let century = number(century).filter(|century| (19..=21).contains(century)).unwrap_or(20);
        let (minutes, seconds) = (number(minute)?, number(second)?);
        let date = DateTime {
            year: century * 100 + number(year)?,
            month: number(month)?,
            day: number(day)?,
            second: (hours * 60 + minutes) * 60 + seconds,
        };
        (hours < 24 && minutes < 60 && seconds < 60 && date.to_unix().is_some()).then_some(date)
    }
}

impl fmt::Display for DateTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let DateTime { year, month, day, second } = self;
        write!(f, "{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02}", second / 3600, second / 60 % 60, second % 60)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00:00"),
            (951_782_399, "2000-02-28 23:59:59"),
            (951_782_400, "2000-02-29 00:00:00"),
            (1_709_251_199, "2024-02-29 23:59:59"),
            (1_709_251_200, "2024-03-01 00:00:00"),
            (4_107_542_399, "2100-02-28 23:59:59"),
            (4_107_542_400, "2100-03-01 00:00:00"),
            (1_795_601_603, "2026-11-25 10:13:23"),
        ] {
            let date = DateTime::from_unix(seconds);
            assert_eq!((date.to_string().as_str(), date.to_unix()), (text, Some(seconds)));
        }
    }

    #[test]
    fn every_day_comes_back() {
        for day in 0..400 * 366 {
            assert_eq!(DateTime::from_unix(day * SECONDS_OF_A_DAY).to_unix(), Some(day * SECONDS_OF_A_DAY));
        }
    }

    #[test]
    fn clock_registers_have_several_forms() {
        let text = |registers, b, century| DateTime::from_rtc(registers, b, century).map(|date| date.to_string());
        let expected = Some("2026-11-25 22:13:23".into());
        assert_eq!(text([0x23, 0x13, 0x22, 0x25, 0x11, 0x26], 0b010, 0x20), expected, "decimal, 24 hours");
        assert_eq!(text([0x23, 0x13, 0x90, 0x25, 0x11, 0x26], 0b000, 0), expected, "decimal, 12 hours, no century");
        assert_eq!(text([23, 13, 22, 25, 11, 26], 0b110, 20), expected, "binary");
        assert_eq!(text([0xff; 6], 0b010, 0xff), None, "no clock");
        assert_eq!(text([0; 6], 0b010, 0x20), None, "no month");
    }
}
