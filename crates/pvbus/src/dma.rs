//! Memory that the host sees as well: rings, and the pages that data goes through.
//!
//! The host writes to it at any time, so to Rust it is atomic words, and the library does nothing else with it than loads, stores and copies.
//! Words are 32 bits, as the indices in rings are. Copies of data are most of the work that a disk's or a card's driver does, and atomic accesses are
//! made one by one, whatever the compiler knows of vectors. So whoever hands the memory out may say how its words are copied ([`WordCopy`]):
//!
//! ```text
//!   bytes   [ part ][ whole words ...              ][ part ]
//!             |       |                               |
//!             atomic  WordCopy, checked to be inside  atomic
//! ```

use core::sync::atomic::{AtomicU32, Ordering};

use crate::hal::HalError;

/// Bytes of a word.
const WORD: usize = size_of::<AtomicU32>();

/// Memory that the host sees as well. Atomic, because the host writes to it at any time.
#[derive(Debug)]
pub struct Dma {
    gpa: u64,
    words: &'static [AtomicU32],
    copy: WordCopy,
}

/// How words are copied out of memory that the host sees, and into it. Both slices have the same length. What a hostile host changes meanwhile may
/// come out as any bytes: words that must be whole the library does not copy, but accesses one by one.
#[derive(Debug, Clone, Copy)]
pub struct WordCopy {
    /// Out of it.
    pub load: fn(from: &[AtomicU32], to: &mut [[u8; 4]]),
    /// Into it.
    pub store: fn(from: &[[u8; 4]], to: &[AtomicU32]),
}

impl WordCopy {
    /// A relaxed atomic access for each word.
    pub const ATOMIC: WordCopy = WordCopy {
        load: |from, to| from.iter().zip(to).for_each(|(word, bytes)| *bytes = word.load(Ordering::Relaxed).to_le_bytes()),
        store: |from, to| from.iter().zip(to).for_each(|(bytes, word)| word.store(u32::from_le_bytes(*bytes), Ordering::Relaxed)),
    };
}

impl Dma {
    /// Memory at guest physical address `gpa`, for implementations of [`crate::Hal::dma_alloc`] and [`crate::Hal::map`]. It is copied by [`WordCopy::ATOMIC`].
    #[must_use]
    pub const fn new(gpa: u64, words: &'static [AtomicU32]) -> Dma {
        Dma { gpa, words, copy: WordCopy::ATOMIC }
    }

    /// The same memory, copied in another way: by the processor's string or vector instructions.
    #[must_use]
    pub const fn copied_by(self, copy: WordCopy) -> Dma {
        Dma { copy, ..self }
    }

    /// The memory again, for implementations of [`crate::Hal::dma_free`]. Nobody else has a reference to it any more.
    #[must_use]
    pub const fn into_words(self) -> &'static [AtomicU32] {
        self.words
    }

    /// Guest physical address of the first byte.
    #[must_use]
    pub const fn gpa(&self) -> u64 {
        self.gpa
    }

    /// The memory.
    #[must_use]
    pub const fn words(&self) -> &[AtomicU32] {
        self.words
    }

    /// The word at byte offset `at`, a multiple of four.
    ///
    /// # Errors
    /// [`HalError::Fault`] outside of the memory; here and below.
    pub(crate) fn word(&self, at: usize) -> Result<&AtomicU32, HalError> {
        self.words.get(at / WORD).ok_or(HalError::Fault)
    }

    /// Copies bytes from offset `at`.
    pub(crate) fn read(&self, at: usize, bytes: &mut [u8]) -> Result<(), HalError> {
        let (head, rest) = bytes.split_at_mut(bytes.len().min(to_next_word(at)));
        let (whole, tail) = rest.as_chunks_mut();
        let (words, behind) = self.whole(at, whole.len())?;
        self.read_part(at, head)?;
        (self.copy.load)(words, whole);
        self.read_part(behind, tail)
    }

    /// Copies bytes to offset `at`. The host does not write to words of which a part is written here.
    pub(crate) fn write(&self, at: usize, bytes: &[u8]) -> Result<(), HalError> {
        let (head, rest) = bytes.split_at(bytes.len().min(to_next_word(at)));
        let (whole, tail) = rest.as_chunks();
        let (words, behind) = self.whole(at, whole.len())?;
        self.write_part(at, head)?;
        (self.copy.store)(whole, words);
        self.write_part(behind, tail)
    }

    /// `count` words from the first on that begins at `at` or behind it, and the offset of what follows them.
    fn whole(&self, at: usize, count: usize) -> Result<(&[AtomicU32], usize), HalError> {
        let first = at.div_ceil(WORD);
        let words = self.words.get(first..).and_then(|words| words.get(..count)).ok_or(HalError::Fault)?;
        Ok((words, (first + count) * WORD))
    }

    /// Copies bytes of one word.
    fn read_part(&self, at: usize, bytes: &mut [u8]) -> Result<(), HalError> {
        if !bytes.is_empty() {
            let word = self.word(at)?.load(Ordering::Relaxed).to_le_bytes();
            bytes.iter_mut().zip(word.into_iter().skip(at % WORD)).for_each(|(to, from)| *to = from);
        }
        Ok(())
    }

    /// Copies bytes to one word.
    fn write_part(&self, at: usize, bytes: &[u8]) -> Result<(), HalError> {
        if !bytes.is_empty() {
            let word = self.word(at)?;
            let mut new = word.load(Ordering::Relaxed).to_le_bytes();
            new.iter_mut().skip(at % WORD).zip(bytes).for_each(|(to, from)| *to = *from);
            word.store(u32::from_le_bytes(new), Ordering::Relaxed);
        }
        Ok(())
    }
}

/// Bytes from `at` to where a word begins.
const fn to_next_word(at: usize) -> usize {
    at.wrapping_neg() % WORD
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::boxed::Box;
    use alloc::vec;
    use alloc::vec::Vec;
    use core::sync::atomic::AtomicUsize;

    const BYTES: usize = 24;

    /// Memory with the bytes 0, 1, 2 and so on.
    fn memory() -> Dma {
        let words: Vec<AtomicU32> =
            (0..BYTES as u8).collect::<Vec<u8>>().as_chunks().0.iter().map(|word| AtomicU32::new(u32::from_le_bytes(*word))).collect();
        Dma::new(0x1000, Box::leak(words.into_boxed_slice()))
    }

    fn content(dma: &Dma) -> Vec<u8> {
        dma.words().iter().flat_map(|word| word.load(Ordering::Relaxed).to_le_bytes()).collect()
    }

    /// Every piece of the memory, and its bytes.
    fn pieces() -> impl Iterator<Item = (usize, usize)> {
        (0..=BYTES).flat_map(|at| (0..=BYTES - at).map(move |length| (at, length)))
    }

    #[test]
    fn every_piece_is_read_as_it_is() {
        for (at, length) in pieces() {
            let mut bytes = vec![0xee; length];
            memory().read(at, &mut bytes).unwrap();
            assert_eq!(bytes, content(&memory())[at..at + length], "{length} bytes at {at}");
        }
    }

    #[test]
    fn a_piece_is_written_and_nothing_beside_it() {
        for (at, length) in pieces() {
            let dma = memory();
            let mut wanted = content(&dma);
            let bytes: Vec<u8> = (0x80..).take(length).collect();
            wanted[at..at + length].copy_from_slice(&bytes);
            dma.write(at, &bytes).unwrap();
            assert_eq!(content(&dma), wanted, "{length} bytes at {at}");
        }
    }

    #[test]
    fn nothing_is_copied_from_or_to_outside() {
        let outside = (0..=BYTES).map(|at| (at, BYTES - at + 1)).chain([
            (BYTES + 1, 0),
            (BYTES + 4, 0),
            (usize::MAX, 1),
            (usize::MAX - 3, 8),
            (usize::MAX - 8, 4),
        ]);
        for (at, length) in outside {
            let dma = memory();
            assert_eq!(dma.read(at, &mut vec![0; length]), Err(HalError::Fault), "{length} bytes at {at}");
            assert_eq!(dma.write(at, &vec![0; length]), Err(HalError::Fault), "{length} bytes at {at}");
        }
    }

    #[test]
    fn whole_words_are_copied_as_the_system_wants_it() {
        static LOADED: AtomicUsize = AtomicUsize::new(0);
        static STORED: AtomicUsize = AtomicUsize::new(0);
        let dma = memory().copied_by(WordCopy {
            load: |from, to| {
                assert_eq!(from.len(), to.len());
                LOADED.fetch_add(from.len(), Ordering::Relaxed);
                (WordCopy::ATOMIC.load)(from, to);
            },
            store: |from, to| {
                assert_eq!(from.len(), to.len());
                STORED.fetch_add(from.len(), Ordering::Relaxed);
                (WordCopy::ATOMIC.store)(from, to);
            },
        });
        let mut bytes = [0; 16];
        dma.read(3, &mut bytes).unwrap();
        dma.write(8, &bytes).unwrap();
        assert_eq!(content(&dma)[8..], (3..19).collect::<Vec<u8>>());
        assert_eq!((LOADED.load(Ordering::Relaxed), STORED.load(Ordering::Relaxed)), (3, 4));
    }
}
