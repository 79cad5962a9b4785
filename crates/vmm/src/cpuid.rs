//! CPUID as a table that backends offer, boards trim and dialects extend.

use serde::{Deserialize, Serialize};

/// One leaf, or one subleaf of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidEntry {
    /// EAX on entry.
    pub leaf: u32,
    /// ECX on entry; `None` when the leaf ignores it.
    pub subleaf: Option<u32>,
    /// Answer in EAX.
    pub eax: u32,
    /// Answer in EBX.
    pub ebx: u32,
    /// Answer in ECX.
    pub ecx: u32,
    /// Answer in EDX.
    pub edx: u32,
}

/// All leaves a guest may ask for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidTable {
    entries: Vec<CpuidEntry>,
}

impl CpuidTable {
    /// Adds an entry or replaces the one with the same leaf and subleaf.
    pub fn set(&mut self, entry: CpuidEntry) {
        match self.entries.iter_mut().find(|e| e.leaf == entry.leaf && e.subleaf == entry.subleaf) {
            Some(old) => *old = entry,
            None => self.entries.push(entry),
        }
    }

    /// Removes every subleaf of the leaves in `range`.
    pub fn remove(&mut self, range: std::ops::RangeInclusive<u32>) {
        self.entries.retain(|e| !range.contains(&e.leaf));
    }

    /// The entry that answers `leaf` and `subleaf`, if any.
    pub fn get(&self, leaf: u32, subleaf: u32) -> Option<&CpuidEntry> {
        self.entries.iter().find(|e| e.leaf == leaf && e.subleaf.is_none_or(|s| s == subleaf))
    }

    /// The same, to change it.
    pub fn get_mut(&mut self, leaf: u32, subleaf: u32) -> Option<&mut CpuidEntry> {
        self.entries.iter_mut().find(|e| e.leaf == leaf && e.subleaf.is_none_or(|s| s == subleaf))
    }

    /// All entries in the order in which they were added.
    pub fn entries(&self) -> &[CpuidEntry] {
        &self.entries
    }
}
