//! A backup with file systems at rest: the host starts it, the kernel freezes, the host takes its snapshot, the kernel thaws.
//!
//! ```text
//!   Idle --start--> Freezing --frozen--> Frozen --snapshotDone--> Idle
//!                      |                   |
//!                      +--abort, or 30 s --+--> Idle
//! ```
//!
//! While it lasts the host hears each second that the guest is alive.

use alloc::vec::Vec;

use abi::vmware::rpc::vmbackup as words;

use crate::detect::Kind;
use crate::driver::Event;
use crate::hal::{Nanos, SECOND};

/// How long the file systems may take to come to rest, and how long they stay there.
const LIMIT: Nanos = 30 * SECOND;
/// How often the host hears that the guest is alive.
const KEEP_ALIVE: Nanos = SECOND;

/// Where a backup stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Quiesce {
    /// None.
    Idle,
    /// The kernel was asked to freeze.
    Freezing { deadline: Nanos, alive: Nanos },
    /// The file systems are at rest.
    Frozen { deadline: Nanos, alive: Nanos },
}

/// What the host or the kernel says, or the time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    Start,
    SnapshotDone,
    Abort,
    Frozen(bool),
    Tick,
}

impl Quiesce {
    /// Goes on: what is to be sent to the host goes to `requests`, what the kernel is to do to `events`. `false` when it is not the time for it.
    pub(super) fn on(&mut self, step: Step, now: Nanos, requests: &mut Vec<Vec<u8>>, events: &mut Vec<Event>) -> bool {
        let mut tell = |event: &str, code: u8, text: &str| {
            requests.push(alloc::format!("{} {event} {code} {text}", words::EVENT_SET).into_bytes());
        };
        let (deadline, alive) = (now.saturating_add(LIMIT), now.saturating_add(KEEP_ALIVE));
        match (*self, step) {
            (Quiesce::Idle, Step::Start) => {
                tell(words::RESET, words::SUCCESS, "");
                events.push(Event::Freeze(Kind::Vmware));
                *self = Quiesce::Freezing { deadline, alive };
            }
            (Quiesce::Freezing { .. }, Step::Frozen(true)) => {
                tell(words::SNAPSHOT_COMMIT, words::SUCCESS, "");
                *self = Quiesce::Frozen { deadline, alive };
            }
            (Quiesce::Freezing { .. }, Step::Frozen(false)) => {
                tell(words::ABORTED, words::SYNC_ERROR, "file systems could not be brought to rest");
                self.end(&mut tell, events);
            }
            (Quiesce::Frozen { .. }, Step::SnapshotDone) => self.end(&mut tell, events),
            (Quiesce::Freezing { .. } | Quiesce::Frozen { .. }, Step::Abort) => {
                tell(words::ABORTED, words::REMOTE_ABORT, "");
                self.end(&mut tell, events);
            }
            (Quiesce::Freezing { deadline, alive } | Quiesce::Frozen { deadline, alive }, Step::Tick) => {
                if now >= deadline {
                    tell(words::ABORTED, words::REMOTE_ABORT, "too slow");
                    self.end(&mut tell, events);
                } else if now >= alive {
                    tell(words::KEEP_ALIVE, words::SUCCESS, "");
                    self.stay_alive(now);
                }
            }
            (Quiesce::Idle, Step::Tick) => {}
            _ => return false,
        }
        true
    }

    /// When [`Step::Tick`] is due.
    pub(super) fn next(&self) -> Option<Nanos> {
        match *self {
            Quiesce::Idle => None,
            Quiesce::Freezing { deadline, alive } | Quiesce::Frozen { deadline, alive } => Some(deadline.min(alive)),
        }
    }

    fn end(&mut self, tell: &mut impl FnMut(&str, u8, &str), events: &mut Vec<Event>) {
        tell(words::DONE, words::SUCCESS, "");
        events.push(Event::Thaw(Kind::Vmware));
        *self = Quiesce::Idle;
    }

    fn stay_alive(&mut self, now: Nanos) {
        if let Quiesce::Freezing { alive, .. } | Quiesce::Frozen { alive, .. } = self {
            *alive = now.saturating_add(KEEP_ALIVE);
        }
    }
}

#[cfg(test)]
mod tests {
    use alloc::string::String;

    use super::*;

    /// Plays steps at their times (seconds) and collects what the host hears and the kernel is to do.
    fn play(steps: &[(u64, Step)]) -> (Quiesce, Vec<String>, Vec<Event>) {
        let (mut quiesce, mut requests, mut events) = (Quiesce::Idle, Vec::new(), Vec::new());
        for (at, step) in steps {
            quiesce.on(*step, at * SECOND, &mut requests, &mut events);
        }
        (quiesce, requests.into_iter().map(|request| String::from_utf8(request).unwrap()).collect(), events)
    }

    #[test]
    fn backup_ends_with_done_and_thaw() {
        let (state, heard, events) = play(&[(0, Step::Start), (1, Step::Frozen(true)), (2, Step::Tick), (3, Step::SnapshotDone)]);
        assert_eq!(state, Quiesce::Idle);
        let expected = [
            "vmbackup.eventSet reset 0 ",
            "vmbackup.eventSet prov.snapshotCommit 0 ",
            "vmbackup.eventSet req.keepAlive 0 ",
            "vmbackup.eventSet req.done 0 ",
        ];
        assert_eq!(heard, expected);
        assert_eq!(events, [Event::Freeze(Kind::Vmware), Event::Thaw(Kind::Vmware)]);
    }

    #[test]
    fn file_systems_that_cannot_rest_are_code_3() {
        let (state, heard, _) = play(&[(0, Step::Start), (1, Step::Frozen(false))]);
        assert_eq!(state, Quiesce::Idle);
        assert!(heard[1].starts_with("vmbackup.eventSet req.aborted 3 "), "{heard:?}");
        assert_eq!(heard[2], "vmbackup.eventSet req.done 0 ");
    }

    #[test]
    fn host_that_never_takes_its_snapshot_does_not_keep_them_frozen() {
        let (state, heard, events) = play(&[(0, Step::Start), (1, Step::Frozen(true)), (31, Step::Tick)]);
        assert_eq!(state, Quiesce::Idle);
        assert!(heard[2].starts_with("vmbackup.eventSet req.aborted 4"), "{heard:?}");
        assert_eq!(events.last(), Some(&Event::Thaw(Kind::Vmware)));
    }

    #[test]
    fn kernel_that_never_freezes_is_given_up() {
        assert_eq!(play(&[(0, Step::Start), (30, Step::Tick)]).0, Quiesce::Idle);
    }

    #[test]
    fn steps_at_the_wrong_time_are_refused() {
        let mut quiesce = Quiesce::Idle;
        for step in [Step::SnapshotDone, Step::Abort, Step::Frozen(true)] {
            assert!(!quiesce.on(step, 0, &mut Vec::new(), &mut Vec::new()), "{step:?}");
        }
        assert!(quiesce.on(Step::Start, 0, &mut Vec::new(), &mut Vec::new()));
        assert!(!quiesce.on(Step::Start, 0, &mut Vec::new(), &mut Vec::new()));
    }
}
