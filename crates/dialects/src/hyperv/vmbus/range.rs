//! Bytes of guest memory in pages that need not lie together: what GPADLs and GPA-direct packets name.

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm::GuestMemory;
use vmm::memory::PAGE_SIZE;
use zerocopy::little_endian::U64;

use crate::disk::GuestSlice;

/// The guest named pages that it does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("bytes that are not in the guest's memory")]
pub struct NotMemory;

/// Bytes in a list of pages. There are enough pages for them; whether the pages are memory shows when they are used.
#[derive(Debug, Clone, Copy, Default)]
pub struct GuestRange<'a> {
    len: u32,
    /// Where in the first page they begin.
    offset: u32,
    pfns: &'a [U64],
}

impl<'a> GuestRange<'a> {
    /// `len` bytes from `offset` of the first page; `None` when there are too few pages for them.
    pub fn new(len: u32, offset: u32, pfns: &'a [U64]) -> Option<GuestRange<'a>> {
        let pages = (u64::from(offset) + u64::from(len)).div_ceil(PAGE_SIZE);
        (pages <= pfns.len() as u64).then_some(GuestRange { len, offset, pfns })
    }

    /// How many bytes.
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// `len` bytes of them from `at`, if there are so many.
    pub fn part(&self, at: u32, len: u32) -> Option<GuestRange<'a>> {
        at.checked_add(len).filter(|end| *end <= self.len)?;
        GuestRange::new(len, self.offset.checked_add(at)?, self.pfns)
    }

    /// All bytes, a piece for each run of pages that lie together.
    ///
    /// # Errors
    /// [`NotMemory`].
    pub fn slices<'m>(&self, memory: &'m GuestMemory) -> Result<Vec<GuestSlice<'m>>, NotMemory> {
        let mut runs: Vec<(GuestAddress, usize)> = Vec::new();
        for (gpa, len) in self.pieces() {
            match runs.last_mut() {
                Some((start, run)) if start.0.checked_add(*run as u64) == Some(gpa.0) => *run += len,
                _ => runs.push((gpa, len)),
            }
        }
        // A run may go on in the next region of memory.
        runs.into_iter().flat_map(|(gpa, len)| memory.get_slices(gpa, len)).map(|slice| slice.map_err(|_| NotMemory)).collect()
    }

    /// Copies the first bytes of guest memory into `bytes`.
    ///
    /// # Errors
    /// [`NotMemory`], also when there are fewer.
    pub fn read(&self, memory: &GuestMemory, bytes: &mut [u8]) -> Result<(), NotMemory> {
        let mut rest = bytes;
        for (gpa, len) in self.pieces() {
            let (piece, after) = rest.split_at_mut(len.min(rest.len()));
            memory.read_slice(piece, gpa).map_err(|_| NotMemory)?;
            rest = after;
            if rest.is_empty() {
                break;
            }
        }
        if rest.is_empty() { Ok(()) } else { Err(NotMemory) }
    }

    /// Copies `bytes` to the first bytes in guest memory.
    ///
    /// # Errors
    /// [`NotMemory`], also when there are fewer.
    pub fn write(&self, memory: &GuestMemory, bytes: &[u8]) -> Result<(), NotMemory> {
        let mut rest = bytes;
        for (gpa, len) in self.pieces() {
            let (piece, after) = rest.split_at(len.min(rest.len()));
            memory.write_slice(piece, gpa).map_err(|_| NotMemory)?;
            rest = after;
            if rest.is_empty() {
                break;
            }
        }
        if rest.is_empty() { Ok(()) } else { Err(NotMemory) }
    }

    /// Address and length of the bytes in each page.
    fn pieces(&self) -> impl Iterator<Item = (GuestAddress, usize)> + 'a {
        let (mut left, mut at) = (u64::from(self.len), u64::from(self.offset));
        let pfns = self.pfns;
        std::iter::from_fn(move || {
            let pfn = pfns.get((at / PAGE_SIZE) as usize)?.get();
            let len = (PAGE_SIZE - at % PAGE_SIZE).min(left);
            if len == 0 {
                return None;
            }
            // A number that is too large is made one that is no memory either.
            let gpa = pfn.checked_mul(PAGE_SIZE).map_or(u64::MAX, |page| page + at % PAGE_SIZE);
            (at, left) = (at + len, left - len);
            Some((GuestAddress(gpa), len as usize))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_go_over_pages_in_the_list_s_order() {
        let memory = vmm::memory::map(&[(0, 0x4000)]).unwrap();
        let pfns = [U64::new(3), U64::new(1)];
        let range = GuestRange::new(0x1000, 0xff0, &pfns).unwrap();
        range.part(8, 16).unwrap().write(&memory, b"0123456789abcdef").unwrap();
        let mut bytes = [0; 8];
        memory.read_slice(&mut bytes, GuestAddress(0x3ff8)).unwrap();
        assert_eq!(&bytes, b"01234567");
        memory.read_slice(&mut bytes, GuestAddress(0x1000)).unwrap();
        assert_eq!(&bytes, b"89abcdef");
        let slices = range.slices(&memory).unwrap();
        assert_eq!(slices.iter().map(|slice| slice.len()).collect::<Vec<_>>(), [0x10, 0xff0]);
    }

    #[test]
    fn pages_that_lie_together_are_one_piece() {
        let memory = vmm::memory::map(&[(0, 0x2000), (0x2000, 0x2000)]).unwrap();
        let pfns = [0, 1, 2, 0].map(U64::new);
        let slices = GuestRange::new(0x3f00, 0x100, &pfns).unwrap().slices(&memory).unwrap();
        assert_eq!(slices.iter().map(|slice| slice.len()).collect::<Vec<_>>(), [0x1f00, 0x1000, 0x1000]);
    }

    #[test]
    fn range_that_its_pages_cannot_hold_is_none() {
        let pfns = [U64::new(3)];
        assert!(GuestRange::new(0x1000, 1, &pfns).is_none());
        assert!(GuestRange::new(u32::MAX, u32::MAX, &pfns).is_none());
        let range = GuestRange::new(0x100, 0xf00, &pfns).unwrap();
        assert!(range.part(0x100, 1).is_none());
        assert!(range.part(u32::MAX, 2).is_none());
        assert!(range.part(0x100, 0).is_some_and(|part| part.is_empty()));
    }

    #[test]
    fn pages_that_are_not_memory_are_told() {
        let memory = vmm::memory::map(&[(0, 0x4000)]).unwrap();
        for pfn in [4, u64::MAX / PAGE_SIZE, u64::MAX] {
            let pfns = [U64::new(pfn)];
            let range = GuestRange::new(8, 0xff8, &pfns).unwrap();
            assert_eq!(range.read(&memory, &mut [0; 8]), Err(NotMemory));
            assert_eq!(range.write(&memory, &[0; 8]), Err(NotMemory));
            assert!(range.slices(&memory).is_err());
        }
    }
}
