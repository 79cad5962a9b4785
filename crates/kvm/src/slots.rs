//! Guest memory as KVM's memory slots, and how protection splits them.
//!
//! KVM knows two ways to keep a guest from memory: a slot with KVM_MEM_READONLY (reads and fetches go through, writes leave
//! as MMIO) and no slot at all (everything leaves as MMIO). The slots of a machine are therefore a list of [`Piece`]s; a
//! protection cuts the pieces it touches, and equal neighbours are joined again. Pure arithmetic; `vm.rs` tells the kernel.

use vmm::Protection;

/// What a piece of memory allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Everything.
    Open,
    /// Reads and fetches.
    ReadOnly,
    /// Nothing: there is no slot.
    Hole,
}

impl Kind {
    /// The kind that enforces `protection`, if KVM has one.
    pub(crate) fn from_protection(protection: Protection) -> Option<Kind> {
        if protection == Protection::all() {
            Some(Kind::Open)
        } else if protection == Protection::READ | Protection::EXECUTE {
            Some(Kind::ReadOnly)
        } else if protection.is_empty() {
            Some(Kind::Hole)
        } else {
            None
        }
    }
}

/// A stretch of guest memory of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Piece {
    /// First guest physical address.
    pub gpa: u64,
    /// Size in bytes.
    pub size: u64,
    /// Host address of the first byte.
    pub hva: u64,
    /// What it allows.
    pub kind: Kind,
}

impl Piece {
    fn end(&self) -> u64 {
        self.gpa + self.size
    }

    /// The part of `self` inside `[from, to)`, if any.
    fn part(&self, from: u64, to: u64) -> Option<Piece> {
        let gpa = self.gpa.max(from);
        let end = self.end().min(to);
        (gpa < end).then(|| Piece { gpa, size: end - gpa, hva: self.hva + (gpa - self.gpa), kind: self.kind })
    }
}

/// Whether `[gpa, gpa + size)` is memory without gaps.
pub(crate) fn is_memory(pieces: &[Piece], gpa: u64, size: u64) -> bool {
    let Some(end) = gpa.checked_add(size) else { return false };
    let mut covered = gpa;
    for piece in pieces {
        if piece.gpa <= covered && covered < piece.end() {
            covered = piece.end();
        }
    }
    size > 0 && covered >= end
}

/// The piece that holds `gpa`.
pub(crate) fn find(pieces: &[Piece], gpa: u64) -> Option<&Piece> {
    pieces.iter().find(|p| p.gpa <= gpa && gpa < p.end())
}

/// The pieces after `[gpa, gpa + size)` became `kind`. `pieces` is sorted by address, and so is the answer.
pub(crate) fn protect(pieces: &[Piece], gpa: u64, size: u64, kind: Kind) -> Vec<Piece> {
    let end = gpa.saturating_add(size);
    let mut result: Vec<Piece> = Vec::with_capacity(pieces.len() + 2);
    for piece in pieces {
        let parts = [piece.part(0, gpa), piece.part(gpa, end).map(|p| Piece { kind, ..p }), piece.part(end, u64::MAX)];
        for part in parts.into_iter().flatten() {
            match result.last_mut() {
                Some(last) if last.kind == part.kind && last.end() == part.gpa && last.hva + last.size == part.hva => {
                    last.size += part.size;
                }
                _ => result.push(part),
            }
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const RAM: [Piece; 2] = [
        Piece { gpa: 0, size: 0xa0000, hva: 0x10_0000, kind: Kind::Open },
        Piece { gpa: 0x10_0000, size: 0x10_0000, hva: 0x80_0000, kind: Kind::Open },
    ];

    #[test]
    fn protecting_the_middle_makes_three_pieces_and_undoing_it_one() {
        let cut = protect(&RAM, 0x1000, 0x2000, Kind::ReadOnly);
        assert_eq!(cut.len(), 4);
        assert_eq!(cut[1], Piece { gpa: 0x1000, size: 0x2000, hva: 0x10_1000, kind: Kind::ReadOnly });
        assert_eq!(cut[2], Piece { gpa: 0x3000, size: 0x9d000, hva: 0x10_3000, kind: Kind::Open });
        assert_eq!(protect(&cut, 0x1000, 0x2000, Kind::Open), RAM);
    }

    #[test]
    fn memory_with_a_gap_is_not_memory() {
        assert!(is_memory(&RAM, 0x9f000, 0x1000));
        assert!(!is_memory(&RAM, 0x9f000, 0x2000));
        assert!(!is_memory(&RAM, u64::MAX, 2));
        assert!(!is_memory(&RAM, 0, 0));
    }

    #[test]
    fn only_three_protections_exist() {
        assert_eq!(Kind::from_protection(Protection::all()), Some(Kind::Open));
        assert_eq!(Kind::from_protection(Protection::READ | Protection::EXECUTE), Some(Kind::ReadOnly));
        assert_eq!(Kind::from_protection(Protection::empty()), Some(Kind::Hole));
        assert_eq!(Kind::from_protection(Protection::READ), None);
        assert_eq!(Kind::from_protection(Protection::READ | Protection::WRITE), None);
    }

    proptest! {
        #[test]
        fn every_byte_keeps_its_host_address_and_has_the_last_kind(
            changes in proptest::collection::vec((0u64..0x200, 1u64..0x40, 0usize..3), 1..20)
        ) {
            let kinds = [Kind::Open, Kind::ReadOnly, Kind::Hole];
            let mut pieces = RAM.to_vec();
            let mut expected = std::collections::HashMap::new();
            for (page, pages, kind) in changes {
                pieces = protect(&pieces, page << 12, pages << 12, kinds[kind]);
                for p in page..page + pages {
                    expected.insert(p, kinds[kind]);
                }
            }
            for page in 0..0x240u64 {
                let before = find(&RAM, page << 12);
                let after = find(&pieces, page << 12);
                prop_assert_eq!(before.is_some(), after.is_some());
                if let (Some(before), Some(after)) = (before, after) {
                    prop_assert_eq!((page << 12) - before.gpa + before.hva, (page << 12) - after.gpa + after.hva);
                    prop_assert_eq!(after.kind, *expected.get(&page).unwrap_or(&Kind::Open));
                }
            }
            prop_assert!(pieces.windows(2).all(|w| w[0].end() <= w[1].gpa));
        }
    }
}
