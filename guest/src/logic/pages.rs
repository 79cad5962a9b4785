//! Free memory as ranges of pages: first fit, and neighbours become one again.

use core::ops::Range;

/// Bytes of a page.
pub const PAGE_SIZE: u64 = 4096;
/// Ranges that can be told apart. More holes than these are given up, which loses memory and nothing else.
const RANGES: usize = 128;

/// Free pages. Addresses are physical.
#[derive(Debug)]
pub struct Pages {
    /// The first `count` are valid, in order, and none touches the next.
    ranges: [Range<u64>; RANGES],
    count: usize,
}

impl Pages {
    /// No memory.
    pub const fn new() -> Pages {
        Pages { ranges: [const { 0..0 }; RANGES], count: 0 }
    }

    /// Adds the whole pages of a range that is not in it.
    pub fn add(&mut self, range: Range<u64>) {
        let Some(start) = range.start.checked_next_multiple_of(PAGE_SIZE) else { return };
        let mut new = start..range.end & !(PAGE_SIZE - 1);
        if new.is_empty() {
            return;
        }
        let mut at = self.ranges[..self.count].iter().take_while(|range| range.end < new.start).count();
        while at < self.count && self.ranges[at].start <= new.end {
            new = new.start.min(self.ranges[at].start)..new.end.max(self.ranges[at].end);
            self.remove(at);
        }
        if self.count < RANGES {
            self.insert(at, new);
        } else if let Some(smallest) = (0..RANGES).min_by_key(|&n| self.ranges[n].end - self.ranges[n].start)
            && self.ranges[smallest].end - self.ranges[smallest].start < new.end - new.start
        {
            self.remove(smallest);
            at -= usize::from(smallest < at);
            self.insert(at, new);
        }
    }

    /// Takes `range` out, as far as it is in.
    pub fn reserve(&mut self, range: Range<u64>) {
        let mut at = 0;
        while at < self.count {
            let free = self.ranges[at].clone();
            if free.end <= range.start || range.end <= free.start {
                at += 1;
                continue;
            }
            self.remove(at);
            // What is left at both ends goes back; it is in front of `at` or overlaps no more.
            self.add(free.start..range.start.max(free.start));
            self.add(range.end.min(free.end)..free.end);
            at = 0;
        }
    }

    /// Takes `count` pages that follow each other; the first one's address.
    pub fn take(&mut self, count: u64) -> Option<u64> {
        let size = count.checked_mul(PAGE_SIZE).filter(|size| *size > 0)?;
        let at = self.ranges[..self.count].iter().position(|range| range.end - range.start >= size)?;
        let start = self.ranges[at].start;
        self.ranges[at].start += size;
        if self.ranges[at].is_empty() {
            self.remove(at);
        }
        Some(start)
    }

    /// Bytes that are free.
    pub fn free(&self) -> u64 {
        self.ranges[..self.count].iter().map(|range| range.end - range.start).sum()
    }

    fn insert(&mut self, at: usize, range: Range<u64>) {
        self.ranges[at..=self.count].rotate_right(1);
        self.ranges[at] = range;
        self.count += 1;
    }

    fn remove(&mut self, at: usize) {
        self.ranges[at..self.count].rotate_left(1);
        self.count -= 1;
    }
}

impl Default for Pages {
    fn default() -> Pages {
        Pages::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(pages: &Pages) -> Vec<Range<u64>> {
        pages.ranges[..pages.count].to_vec()
    }

    #[test]
    fn only_whole_pages_are_memory() {
        let mut pages = Pages::new();
        pages.add(0x800..0x3800);
        pages.add(0x9001..0x9fff);
        pages.add(u64::MAX - 10..u64::MAX);
        assert_eq!((ranges(&pages).len(), &ranges(&pages)[0]), (1, &(0x1000..0x3000)));
    }

    #[test]
    fn neighbours_become_one() {
        let mut pages = Pages::new();
        for range in [0x1000..0x2000, 0x5000..0x6000, 0x3000..0x4000, 0x2000..0x3000, 0x4000..0x5000] {
            pages.add(range);
        }
        assert_eq!((ranges(&pages).len(), &ranges(&pages)[0]), (1, &(0x1000..0x6000)));
    }

    #[test]
    fn reserved_memory_is_never_given_out() {
        let mut pages = Pages::new();
        pages.add(0x1000..0x9000);
        pages.reserve(0x3000..0x5000);
        pages.reserve(0..0x2000);
        assert_eq!(ranges(&pages), [0x2000..0x3000, 0x5000..0x9000]);
        assert_eq!(pages.take(2), Some(0x5000));
        assert_eq!(pages.take(1), Some(0x2000));
        assert_eq!(pages.take(3), None);
        assert_eq!(pages.take(2), Some(0x7000));
        assert_eq!((pages.take(1), pages.free()), (None, 0));
        assert_eq!(pages.take(u64::MAX), None);
    }

    #[test]
    fn with_too_many_holes_the_smallest_is_given_up() {
        let mut pages = Pages::new();
        for n in 0..RANGES as u64 {
            pages.add(n * 0x10_0000..n * 0x10_0000 + 0x2000);
        }
        pages.add(0x8_0000..0x8_1000);
        assert_eq!(pages.free(), RANGES as u64 * 0x2000, "it is smaller than all the others");
        pages.add(0x8_0000..0x9_0000);
        assert_eq!(pages.free(), (RANGES as u64 - 1) * 0x2000 + 0x1_0000);
        assert!(ranges(&pages).is_sorted_by_key(|range| range.start));
    }
}
