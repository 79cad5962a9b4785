//! What host and guest say through the command register, and how long they wait for each other.
//!
//! ```text
//!   Idle --request--> Asked --the guest writes it back--> Agreed --120 s--> Overdue
//!    |                  +-----------------3 s-------------------------------^   ^
//!    +---the guest writes "shutdown" by itself--> Leaving --------3 s-----------+
//! ```
//!
//! A machine that is reset or powered off by its guest ends with all its devices, so that no state here stands for success.

use abi::openbsd::vmmci as words;
use serde::{Deserialize, Serialize};

const SECOND: u64 = 1_000_000_000;
/// How long a guest has for its acknowledgement, and for the end once it said that it powers down (vmd's `VMMCI_TIMEOUT_SHORT`).
pub const ANSWER_TIME: u64 = 3 * SECOND;
/// How long a guest has for its shutdown scripts once it has acknowledged (vmd's `VMMCI_TIMEOUT_LONG`).
pub const SHUTDOWN_TIME: u64 = 120 * SECOND;

/// What the host may ask of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Shut down and power off.
    Shutdown,
    /// Shut down and reboot.
    Reboot,
    /// Read the real-time clock again.
    SyncRtc,
}

impl Request {
    /// The command register's word for it.
    pub fn command(self) -> u32 {
        match self {
            Request::Shutdown => words::SHUTDOWN,
            Request::Reboot => words::REBOOT,
            Request::SyncRtc => words::SYNCRTC,
        }
    }
}

/// Where the conversation stands. Deadlines are nanoseconds of the machine's clock.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Conversation {
    /// Nothing was said.
    #[default]
    Idle,
    /// The host has asked, the guest has not answered.
    Asked {
        /// For what.
        request: Request,
        /// When the host stops waiting. Nobody waits for a clock to be set.
        deadline: Option<u64>,
    },
    /// The guest has acknowledged, or has no way to, and goes down.
    Agreed {
        /// What it was asked for.
        request: Request,
        /// When it should be down.
        deadline: u64,
    },
    /// The guest said, unasked, that it powers down.
    Leaving {
        /// When it should be down.
        deadline: u64,
    },
    /// A deadline passed.
    Overdue {
        /// What the guest was asked for, if it was.
        request: Option<Request>,
    },
}

/// What happens to a conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The host asks.
    Request {
        /// For what.
        request: Request,
        /// Whether the guest's driver writes commands back.
        acknowledges: bool,
    },
    /// The guest wrote the command register.
    Written(u32),
    /// Time has passed.
    Tick,
}

/// What is to be done about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Nothing.
    Nothing,
    /// Tell the guest that the command register has changed.
    Interrupt,
    /// The host's request comes too late: the guest goes down already.
    Refuse,
    /// End the machine without the guest's help.
    PowerOff,
    /// Reset the machine without the guest's help.
    Reset,
}

impl Conversation {
    /// Goes on to the next state at time `now`.
    pub fn on(&mut self, event: Event, now: u64) -> Action {
        match event {
            Event::Request { request, acknowledges } => self.request(request, acknowledges, now),
            Event::Written(command) => {
                self.written(command, now);
                Action::Nothing
            }
            Event::Tick => self.tick(now),
        }
    }

    fn request(&mut self, request: Request, acknowledges: bool, now: u64) -> Action {
        *self = match *self {
            // Asking again reminds the guest, and gives it no more time.
            Conversation::Asked { request: same, .. } if same == request => return Action::Interrupt,
            Conversation::Idle | Conversation::Asked { .. } => match request {
                Request::SyncRtc => Conversation::Asked { request, deadline: None },
                _ if acknowledges => Conversation::Asked { request, deadline: Some(now.saturating_add(ANSWER_TIME)) },
                _ => Conversation::Agreed { request, deadline: now.saturating_add(SHUTDOWN_TIME) },
            },
            Conversation::Agreed { .. } | Conversation::Leaving { .. } | Conversation::Overdue { .. } => return Action::Refuse,
        };
        Action::Interrupt
    }

    /// What fits no state is ignored, as vmd does: an OpenBSD guest that was asked to reboot writes "shutdown" once more on its way.
    fn written(&mut self, command: u32, now: u64) {
        *self = match *self {
            Conversation::Asked { request: Request::SyncRtc, .. } if command == words::SYNCRTC => Conversation::Idle,
            Conversation::Idle | Conversation::Asked { request: Request::SyncRtc, .. } if command == words::SHUTDOWN => {
                Conversation::Leaving { deadline: now.saturating_add(ANSWER_TIME) }
            }
            Conversation::Asked { request, .. } if command == request.command() => {
                Conversation::Agreed { request, deadline: now.saturating_add(SHUTDOWN_TIME) }
            }
            unchanged => unchanged,
        };
    }

    fn tick(&mut self, now: u64) -> Action {
        if self.deadline().is_none_or(|deadline| now < deadline) {
            return Action::Nothing;
        }
        let request = self.asked_for();
        *self = Conversation::Overdue { request };
        if request == Some(Request::Reboot) { Action::Reset } else { Action::PowerOff }
    }

    /// When [`Event::Tick`] is due.
    pub fn deadline(&self) -> Option<u64> {
        match *self {
            Conversation::Asked { deadline, .. } => deadline,
            Conversation::Agreed { deadline, .. } | Conversation::Leaving { deadline } => Some(deadline),
            Conversation::Idle | Conversation::Overdue { .. } => None,
        }
    }

    /// The command register.
    pub fn command(&self) -> u32 {
        self.asked_for().map_or(words::NONE, Request::command)
    }

    fn asked_for(&self) -> Option<Request> {
        match *self {
            Conversation::Asked { request, .. } | Conversation::Agreed { request, .. } => Some(request),
            Conversation::Overdue { request } => request,
            Conversation::Idle | Conversation::Leaving { .. } => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ask(request: Request) -> Event {
        Event::Request { request, acknowledges: true }
    }

    /// Plays events at their times (seconds) and collects what was to be done.
    fn play(steps: &[(u64, Event)]) -> (Conversation, Vec<Action>) {
        let mut conversation = Conversation::Idle;
        let actions = steps.iter().map(|&(at, event)| conversation.on(event, at * SECOND)).collect();
        (conversation, actions)
    }

    #[test]
    fn acknowledged_shutdown_has_two_minutes() {
        let steps = [(0, ask(Request::Shutdown)), (2, Event::Written(words::SHUTDOWN)), (121, Event::Tick), (122, Event::Tick)];
        let (end, actions) = play(&steps);
        assert_eq!(actions, [Action::Interrupt, Action::Nothing, Action::Nothing, Action::PowerOff]);
        assert_eq!(end, Conversation::Overdue { request: Some(Request::Shutdown) });
    }

    #[test]
    fn unanswered_request_is_carried_out_after_three_seconds() {
        let (_, actions) = play(&[(0, ask(Request::Reboot)), (2, Event::Tick), (3, Event::Tick), (4, Event::Tick)]);
        assert_eq!(actions, [Action::Interrupt, Action::Nothing, Action::Reset, Action::Nothing]);
    }

    #[test]
    fn guest_that_cannot_acknowledge_has_two_minutes_at_once() {
        let (state, _) = play(&[(0, Event::Request { request: Request::Shutdown, acknowledges: false })]);
        assert_eq!(state, Conversation::Agreed { request: Request::Shutdown, deadline: SHUTDOWN_TIME });
    }

    #[test]
    fn guest_that_powers_down_by_itself_has_three_seconds() {
        let (state, actions) = play(&[(10, Event::Written(words::SHUTDOWN)), (11, ask(Request::Reboot))]);
        assert_eq!((state, actions[1]), (Conversation::Leaving { deadline: 13 * SECOND }, Action::Refuse));
    }

    #[test]
    fn asking_again_reminds_but_gives_no_more_time() {
        let (state, actions) = play(&[(0, ask(Request::Shutdown)), (1, ask(Request::Shutdown))]);
        assert_eq!(actions, [Action::Interrupt; 2]);
        assert_eq!(state.deadline(), Some(ANSWER_TIME));
    }

    #[test]
    fn clock_request_is_forgotten_once_acknowledged_and_never_overdue() {
        let (state, actions) = play(&[(0, ask(Request::SyncRtc)), (1000, Event::Tick), (1000, Event::Written(words::SYNCRTC))]);
        assert_eq!((state, actions[1]), (Conversation::Idle, Action::Nothing));
    }

    #[test]
    fn powerdown_word_of_a_rebooting_guest_changes_nothing() {
        let steps = [(0, ask(Request::Reboot)), (1, Event::Written(words::REBOOT)), (2, Event::Written(words::SHUTDOWN))];
        assert_eq!(play(&steps).0, Conversation::Agreed { request: Request::Reboot, deadline: SECOND + SHUTDOWN_TIME });
    }

    proptest! {
        #[test]
        fn guest_alone_never_gets_more_than_three_seconds_from_its_first_word(writes in prop::collection::vec((0u64..10, any::<u32>()), 0..50)) {
            let (mut conversation, mut now) = (Conversation::Idle, 0);
            let mut first = None;
            for (step, command) in writes {
                now += step * SECOND / 4;
                conversation.on(Event::Written(command % 5), now);
                if conversation != Conversation::Idle {
                    prop_assert_eq!(conversation.deadline(), Some(*first.get_or_insert(now) + ANSWER_TIME));
                }
            }
        }
    }
}
