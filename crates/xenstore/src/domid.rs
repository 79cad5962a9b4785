//! Domain numbers, and decimal numbers as requests carry them.

use std::fmt;
use std::str::FromStr;

use abi::xen::xenstore::domid;
use serde::{Deserialize, Serialize};

/// Number of a domain: a running machine as the store sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct DomId(pub u16);

impl DomId {
    /// The host itself, dom0 in Xen's words.
    pub const HOST: DomId = DomId(0);
    /// The caller's own domain, in a request.
    pub const SELF: DomId = DomId(domid::SELF);
    /// Every domain, in a permission entry.
    pub const ANY: DomId = DomId(domid::ANY);

    /// Reads a decimal number from 0 to 65535 and nothing else.
    pub fn parse(text: &[u8]) -> Option<DomId> {
        decimal(text).map(DomId)
    }

    /// Whether a machine can have this number: neither the host nor one of the reserved numbers.
    pub fn is_machine(self) -> bool {
        self != DomId::HOST && self.0 < domid::FIRST_RESERVED
    }
}

impl fmt::Display for DomId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Reads decimal digits: no sign, no blank, at least one digit, no overflow.
pub(crate) fn decimal<T: FromStr>(text: &[u8]) -> Option<T> {
    if !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn domids_are_parsed_strictly() {
        assert_eq!(DomId::parse(b"0"), Some(DomId(0)));
        assert_eq!(DomId::parse(b"65535"), Some(DomId(65535)));
        for bad in ["", "abc", "-1", "+1", " 1", "1 ", "65536", "4294967296", "0x1", "1.0"] {
            assert_eq!(DomId::parse(bad.as_bytes()), None, "{bad:?}");
        }
    }
}
