//! File systems at rest, for snapshots: the host asks for rest, takes its snapshot, and lets them go on (`VSS`, after Windows' Volume Shadow Copy
//! Service).
//!
//! ```text
//!   Idle --FREEZE--> Freezing --frozen--> Frozen --THAW--> Idle
//!                        |                                  ^
//!                        +-- not frozen, THAW, or 30 s -----+  the FREEZE is answered as failed
//! ```

use alloc::vec::Vec;

use abi::hyperv::ic::{self, Version, kind, status, version, vss};
use zerocopy::FromBytes;

use super::{Answer, Request, Service};
use crate::detect::Kind;
use crate::driver::{Event, News};
use crate::hal::{Nanos, SECOND};

/// How long the file systems may take to come to rest.
const LIMIT: Nanos = 30 * SECOND;
/// What kinds of backup there are: as Linux says (`VSS_HBU_NO_AUTO_RECOVERY` of `include/uapi/linux/hyperv.h`).
const NO_AUTO_RECOVERY: u32 = 5;

/// The component.
#[derive(Default)]
pub(in super::super) struct Vss(State);

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum State {
    #[default]
    Idle,
    /// The kernel was asked to freeze.
    Freezing { deadline: Nanos },
    /// The kernel has said how it went.
    Heard { frozen: bool },
    /// The file systems are at rest.
    Frozen,
}

impl Service for Vss {
    const NAME: &'static str = "vss";
    const KIND: u16 = kind::VSS;
    const VERSIONS: &'static [Version] = &version::VSS;

    fn answer(&mut self, request: Request<'_>, events: &mut Vec<Event>) -> Answer {
        let Ok((message, _)) = ic::Vss::mut_from_prefix(request.body) else { return Answer::Now(status::FAIL) };
        match (message.operation, self.0) {
            (vss::HOT_BACKUP, _) => message.flags = NO_AUTO_RECOVERY.into(),
            (vss::FREEZE, State::Idle) => {
                let deadline = request.now.saturating_add(LIMIT);
                events.push(Event::Freeze(Kind::HyperV));
                self.0 = State::Freezing { deadline };
                return Answer::Later(deadline);
            }
            (vss::FREEZE, _) => return Answer::Now(status::FAIL),
            (vss::THAW, _) => self.thaw(events),
            _ => return Answer::Now(status::NOT_SUPPORTED),
        }
        Answer::Now(status::OK)
    }

    fn late(&mut self, now: Nanos, events: &mut Vec<Event>) -> Answer {
        match self.0 {
            State::Freezing { deadline } if now < deadline => return Answer::Later(deadline),
            State::Heard { frozen: true } => {
                self.0 = State::Frozen;
                return Answer::Now(status::OK);
            }
            // Thawed meanwhile: nobody is at rest now.
            State::Idle => {}
            _ => self.thaw(events),
        }
        Answer::Now(status::FAIL)
    }

    fn hear(&mut self, news: &News) {
        if let (News::Frozen(frozen), State::Freezing { .. }) = (news, self.0) {
            self.0 = State::Heard { frozen: *frozen };
        }
    }

    fn close(&mut self, events: &mut Vec<Event>) {
        self.thaw(events);
    }
}

impl Vss {
    fn thaw(&mut self, events: &mut Vec<Event>) {
        if self.0 != State::Idle {
            events.push(Event::Thaw(Kind::HyperV));
            self.0 = State::Idle;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;
    use zerocopy::IntoBytes;

    fn ask(vss: &mut Vss, operation: u8, now: Nanos, events: &mut Vec<Event>) -> Answer {
        let mut body = ic::Vss { operation, ..ic::Vss::default() };
        vss.answer(Request { version: version::VSS[0], body: body.as_mut_bytes(), now }, events)
    }

    #[test]
    fn freeze_is_answered_when_the_file_systems_are_at_rest() {
        let (mut vss, mut events) = (Vss::default(), Vec::new());
        assert_eq!(ask(&mut vss, vss::FREEZE, 5, &mut events), Answer::Later(5 + LIMIT));
        assert_eq!(vss.late(6, &mut events), Answer::Later(5 + LIMIT));
        vss.hear(&News::Frozen(true));
        assert_eq!(vss.late(7, &mut events), Answer::Now(status::OK));
        assert_eq!(ask(&mut vss, vss::FREEZE, 8, &mut events), Answer::Now(status::FAIL));
        assert_eq!(ask(&mut vss, vss::THAW, 9, &mut events), Answer::Now(status::OK));
        assert_eq!(events, vec![Event::Freeze(Kind::HyperV), Event::Thaw(Kind::HyperV)]);
    }

    #[test]
    fn freeze_that_fails_or_lasts_is_answered_so_and_undone() {
        for (frozen, now) in [(Some(false), 1), (None, LIMIT)] {
            let (mut vss, mut events) = (Vss::default(), Vec::new());
            ask(&mut vss, vss::FREEZE, 0, &mut events);
            frozen.into_iter().for_each(|frozen| vss.hear(&News::Frozen(frozen)));
            assert_eq!(vss.late(now, &mut events), Answer::Now(status::FAIL));
            assert_eq!(events, vec![Event::Freeze(Kind::HyperV), Event::Thaw(Kind::HyperV)]);
        }
    }

    #[test]
    fn host_that_gives_up_before_the_answer_gets_its_thaw_and_the_failure() {
        let (mut vss, mut events) = (Vss::default(), Vec::new());
        ask(&mut vss, vss::FREEZE, 0, &mut events);
        assert_eq!(ask(&mut vss, vss::THAW, 1, &mut events), Answer::Now(status::OK));
        assert_eq!(vss.late(2, &mut events), Answer::Now(status::FAIL));
        assert_eq!(events.len(), 2);
    }

    #[test]
    fn another_host_s_freeze_is_none_of_this_one_s() {
        let (mut vss, mut events) = (Vss::default(), Vec::new());
        vss.hear(&News::Frozen(true));
        assert_eq!(ask(&mut vss, vss::THAW, 0, &mut events), Answer::Now(status::OK));
        assert!(events.is_empty());
    }
}
