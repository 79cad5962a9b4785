//! Permissions: who may read and write a node, and who asks.
//!
//! A list starts with the owner, whose letter is the right of everybody who is not listed later; of later entries the first that names the
//! caller counts. Owners and privileged callers may do everything. Source: xen-project/xen `docs/misc/xenstore.txt`, SET_PERMS, and C
//! xenstored's `perm_for_conn`.

use std::fmt;

use abi::xen::xenstore::perm;
use serde::{Deserialize, Serialize};

use crate::domid::DomId;
use crate::error::Error;

/// Right to a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Neither.
    None,
    /// Read only.
    Read,
    /// Write only.
    Write,
    /// Both.
    Both,
}

impl Access {
    /// Whether reading is allowed.
    pub fn read(self) -> bool {
        matches!(self, Access::Read | Access::Both)
    }

    /// Whether writing is allowed.
    pub fn write(self) -> bool {
        matches!(self, Access::Write | Access::Both)
    }

    fn of_letter(letter: u8) -> Option<Access> {
        match letter {
            perm::NONE => Some(Access::None),
            perm::READ => Some(Access::Read),
            perm::WRITE => Some(Access::Write),
            perm::BOTH => Some(Access::Both),
            _ => None,
        }
    }

    fn letter(self) -> u8 {
        match self {
            Access::None => perm::NONE,
            Access::Read => perm::READ,
            Access::Write => perm::WRITE,
            Access::Both => perm::BOTH,
        }
    }
}

/// Who makes a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    /// Its domain.
    pub domain: DomId,
    /// Whether it may do everything.
    pub privileged: bool,
    /// Domain whose rights it has too (SET_TARGET).
    pub target: Option<DomId>,
}

impl Caller {
    /// The host.
    pub const HOST: Caller = Caller { domain: DomId::HOST, privileged: true, target: None };

    fn is(&self, domain: DomId) -> bool {
        self.domain == domain || self.target == Some(domain)
    }
}

/// A permission entry: a right and whose it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Whose.
    pub domain: DomId,
    /// What.
    pub access: Access,
}

impl Entry {
    fn parse(text: &[u8]) -> Option<Entry> {
        let (letter, number) = text.split_first()?;
        Some(Entry { domain: DomId::parse(number)?, access: Access::of_letter(*letter)? })
    }
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", char::from(self.access.letter()), self.domain)
    }
}

/// A node's permissions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "Vec<String>", try_from = "Vec<String>")]
pub struct Perms {
    /// Who owns the node, and the right of those who are not listed.
    pub owner: Entry,
    /// The others, in the order that they were given in. Repeated entries are kept.
    pub others: Vec<Entry>,
}

impl Perms {
    /// `domain` owns it, and nobody else may do anything.
    pub fn private(domain: DomId) -> Perms {
        Perms { owner: Entry { domain, access: Access::None }, others: Vec::new() }
    }

    /// Reads `perm`, each such as `r5`. There must be one at least, and a domain must be able to own it.
    ///
    /// # Errors
    /// [`Error::BadRequest`].
    pub fn parse<'a>(perms: impl Iterator<Item = &'a [u8]>) -> Result<Perms, Error> {
        let mut entries = perms.map(Entry::parse);
        let owner = entries.next().flatten().ok_or(Error::BadRequest)?;
        if owner.domain != DomId::HOST && !owner.domain.is_machine() {
            return Err(Error::BadRequest);
        }
        let others = entries.collect::<Option<_>>().ok_or(Error::BadRequest)?;
        Ok(Perms { owner, others })
    }

    /// All entries, the owner's first.
    pub fn entries(&self) -> impl Iterator<Item = Entry> {
        std::iter::once(self.owner).chain(self.others.iter().copied())
    }

    /// How many entries.
    pub fn count(&self) -> usize {
        1 + self.others.len()
    }

    /// Whether `caller` has an owner's rights.
    pub fn owned_by(&self, caller: &Caller) -> bool {
        caller.privileged || caller.is(self.owner.domain)
    }

    /// What `caller` may do.
    pub fn access(&self, caller: &Caller) -> Access {
        if self.owned_by(caller) {
            return Access::Both;
        }
        let named = self.others.iter().find(|entry| caller.is(entry.domain) || entry.domain == DomId::ANY);
        named.unwrap_or(&self.owner).access
    }

    /// Whether a node created by `caller` below one with these permissions needs others than these: what a domain creates is its own.
    pub(crate) fn passed_on_to(&self, caller: &Caller) -> Option<Perms> {
        let same = caller.privileged || caller.domain == self.owner.domain;
        (!same).then(|| Perms { owner: Entry { domain: caller.domain, ..self.owner }, others: self.others.clone() })
    }

    /// Without the entries that name `domain`, unless there are none. The owner stays.
    pub(crate) fn without(&self, domain: DomId) -> Option<Perms> {
        let others: Vec<Entry> = self.others.iter().copied().filter(|entry| entry.domain != domain).collect();
        (others.len() < self.others.len()).then_some(Perms { owner: self.owner, others })
    }
}

impl From<Perms> for Vec<String> {
    fn from(perms: Perms) -> Vec<String> {
        perms.entries().map(|entry| entry.to_string()).collect()
    }
}

impl TryFrom<Vec<String>> for Perms {
    type Error = Error;

    fn try_from(entries: Vec<String>) -> Result<Perms, Error> {
        Perms::parse(entries.iter().map(String::as_bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn perms(text: &str) -> Result<Perms, Error> {
        Perms::parse(text.split_terminator('|').map(str::as_bytes))
    }

    fn access(text: &str, domain: u16) -> Access {
        perms(text).unwrap().access(&Caller { domain: DomId(domain), privileged: false, target: None })
    }

    #[test]
    fn first_entry_is_the_owner_and_the_default() {
        assert_eq!(access("n1", 1), Access::Both);
        assert_eq!(access("r1", 2), Access::Read);
        assert_eq!(access("n1|w2", 2), Access::Write);
        assert_eq!(access("n1|w2", 3), Access::None);
    }

    #[test]
    fn first_match_wins_and_duplicates_are_kept() {
        assert_eq!(access("n1|r2|b2", 2), Access::Read);
        assert_eq!(perms("n1|r2|b2").unwrap().entries().map(|entry| entry.to_string()).collect::<Vec<_>>(), ["n1", "r2", "b2"]);
    }

    #[test]
    fn any_domain_has_a_number() {
        assert_eq!(access("n0|r32757", 9), Access::Read);
        assert_eq!(access("n0|n9|r32757", 9), Access::None);
    }

    #[test]
    fn target_lends_its_rights() {
        let caller = Caller { domain: DomId(9), privileged: false, target: Some(DomId(1)) };
        assert!(perms("n1").unwrap().owned_by(&caller));
        assert_eq!(perms("n3|r1").unwrap().access(&caller), Access::Read);
    }

    #[test]
    fn malformed_lists_are_refused() {
        for bad in ["", "|", "r", "x1", "r-1", "r65536", "rr1", "1", "r1|", "r1||r2", "r32757", "R1", "r 1", "r1x"] {
            let entries = bad.split('|').map(str::as_bytes);
            assert_eq!(Perms::parse(entries), Err(Error::BadRequest), "{bad:?}");
        }
        assert_eq!(Perms::parse(std::iter::empty()), Err(Error::BadRequest));
    }

    #[test]
    fn what_a_domain_creates_is_its_own() {
        let guest = Caller { domain: DomId(3), privileged: false, target: None };
        assert_eq!(perms("r0|w5").unwrap().passed_on_to(&guest), Some(perms("r3|w5").unwrap()));
        assert_eq!(perms("r3|w5").unwrap().passed_on_to(&guest), None);
        assert_eq!(perms("r3|w5").unwrap().passed_on_to(&Caller::HOST), None);
    }
}
