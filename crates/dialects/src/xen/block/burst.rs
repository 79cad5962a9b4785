//! When the requests that were done are shown to the frontend: at the end of a burst.
//!
//! What an application reads or writes at once comes in pieces, as a request has at most some segments (Linux' blkfront takes 32 unless told
//! otherwise, so 1 MiB is 8 requests), and each event for pieces that are done interrupts the guest while it makes the next. So after a request
//! the next is waited for, for about as long as a guest needs to make one; once all its processors rest there is no next one, and what is done
//! is shown even while others are under way. Where requests come alone they are answered at once, but for one now and then that tells
//! whether this is still so. Between bursts that follow each other soon, as when a file is read in order, the device's thread stays awake.

use std::time::{Duration, Instant};

/// How long the next request of a burst is waited for.
const PAUSE: Duration = Duration::from_micros(30);
/// How long a burst may last, so that a frontend that has always more to ask is answered, too.
const LONGEST: Duration = Duration::from_micros(500);
/// How long the next burst is waited for, when the last ones came that soon: for as long as a guest works on what it was given.
const STAY: Duration = Duration::from_micros(150);
/// Which of the requests that come alone is held, to see whether another follows.
const TRIED: u32 = 32;

/// Requests that come close behind each other, and how a frontend's came before.
pub(super) struct Burst {
    begin: Instant,
    /// When a request was last done.
    last: Instant,
    /// Requests that were done.
    done: u32,
    /// Requests that came alone since the last burst of several. It may wrap.
    alone: u32,
    /// When the last burst of several ended.
    end: Option<Instant>,
    /// This one began soon after it.
    follows: bool,
}

impl Burst {
    pub fn new() -> Burst {
        let now = Instant::now();
        Burst { begin: now, last: now, done: 0, alone: 0, end: None, follows: false }
    }

    /// The next one begins.
    pub fn begin(&mut self, now: Instant) {
        let follows = self.end.is_some_and(|end| now - end < STAY);
        *self = Burst { begin: now, last: now, done: 0, follows, ..*self };
    }

    /// It has ended, and the frontend knows.
    pub fn end(&mut self, now: Instant) {
        self.end = (self.done > 1).then_some(now);
    }

    /// Whether to wait for the next one awake.
    pub fn stays(&self, now: Instant) -> bool {
        self.follows && self.end.is_some_and(|end| now - end < STAY)
    }

    /// Whether to look for requests again, when `done` have just been done. A guest that was idle before that asks for nothing more until it is told of
    /// them.
    pub fn goes_on(&mut self, done: u32, was_idle: bool, now: Instant) -> bool {
        self.done += done;
        if done > 0 {
            self.last = now;
        }
        let waits = !was_idle && (self.done > 1 || self.done == 1 && self.alone.is_multiple_of(TRIED));
        if now - self.begin < LONGEST && (done > 0 || waits && now - self.last < PAUSE) {
            if done == 0 {
                // The guest's processor may be waiting for this one.
                std::thread::yield_now();
            }
            return true;
        }
        match self.done {
            0 => {}
            1 => self.alone = self.alone.wrapping_add(1),
            _ => self.alone = 0,
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How long a burst lasts that finds as many requests as stated, at so many microseconds after its beginning: the looks after which it goes on.
    fn looks(burst: &mut Burst, found: &[(u64, u32)]) -> usize {
        looks_until_idle(burst, u64::MAX, found)
    }

    /// The same where the guest is idle from that microsecond on.
    fn looks_until_idle(burst: &mut Burst, idle: u64, found: &[(u64, u32)]) -> usize {
        let begin = Instant::now();
        burst.begin(begin);
        found.iter().take_while(|&&(at, done)| burst.goes_on(done, at >= idle, begin + Duration::from_micros(at))).count()
    }

    #[test]
    fn burst_lasts_until_nothing_has_come_for_a_while() {
        let burst = &mut Burst::new();
        assert_eq!(looks(burst, &[(10, 1), (20, 1), (21, 0), (45, 0), (49, 1), (78, 0), (80, 0)]), 6);
        assert_eq!(looks(burst, &[(10, 2), (39, 0), (41, 0)]), 2);
        assert_eq!(looks(burst, &[(10, 0)]), 0, "woken for nothing");
    }

    #[test]
    fn burst_ends_however_much_there_is_to_do() {
        assert_eq!(looks(&mut Burst::new(), &[(10, 32), (300, 32), (501, 32)]), 2);
    }

    #[test]
    fn burst_ends_when_the_guest_is_idle_and_all_is_done() {
        let burst = &mut Burst::new();
        assert_eq!(looks_until_idle(burst, 22, &[(10, 1), (20, 1), (21, 0), (22, 0)]), 3);
        assert_eq!(looks_until_idle(burst, 20, &[(10, 1), (20, 1), (21, 0)]), 2, "one more look after a request");
        assert_eq!(looks_until_idle(burst, 0, &[(10, 1), (11, 0)]), 1, "also where the first one is held");
    }

    #[test]
    fn next_burst_is_waited_for_when_the_last_came_soon() {
        let (burst, start) = (&mut Burst::new(), Instant::now());
        let mut stays = |begin, done, end| {
            let at = |microseconds| start + Duration::from_micros(microseconds);
            burst.begin(at(begin));
            burst.goes_on(done, false, at(begin + 1));
            burst.end(at(end));
            (burst.stays(at(end + 149)), burst.stays(at(end + 150)))
        };
        assert_eq!(stays(0, 8, 100), (false, false), "the first");
        assert_eq!(stays(249, 8, 300), (true, false));
        assert_eq!(stays(450, 8, 500), (false, false), "a pause");
        assert_eq!(stays(510, 1, 520), (false, false), "a single request");
        assert_eq!(stays(530, 8, 540), (false, false), "which no burst follows");
    }

    #[test]
    fn requests_that_come_alone_are_answered_at_once() {
        let burst = &mut Burst::new();
        let mut held = Vec::new();
        for request in 0..100 {
            if looks(burst, &[(10, 1), (11, 0), (41, 0)]) == 2 {
                held.push(request);
            }
        }
        assert_eq!(held, [0, 32, 64, 96]);
        assert_eq!(looks(burst, &[(10, 1), (11, 1), (12, 0), (42, 0)]), 3, "two at once");
        assert_eq!(looks(burst, &[(10, 1), (11, 0), (39, 1), (70, 0)]), 3, "then the first is held");
    }
}
