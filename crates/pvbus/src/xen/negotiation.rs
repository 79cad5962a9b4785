//! The way of the two halves of a split driver to each other, by the states that each writes to XenStore (`io/xenbus.h`): both ends, without the store.
//!
//! ```text
//!   backend                                     frontend
//!   1 Initialising                              1 Initialising
//!   2 InitWait      tells what it can do   -->  publishes rings and ports    3 Initialised (netfront: 4 Connected)
//!   4 Connected     has mapped the rings   <--
//!                   tells what it has      -->  begins to work               4 Connected
//!   5 Closing       the host takes it away -->  lets go of everything        6 Closed
//!   6 Closed                               <--
//! ```
//!
//! [`Frontend`] and [`Backend`] take the other's state and say what is to be done. Whatever else the other says, in whatever order, changes nothing. After Closed a
//! frontend has no way back: a device that comes again is a new one. A backend begins again with a frontend that does, unless
//! its toolstack takes the device away, which is said in keys and not by states. Frontends here are those
//! of [`crate::xen`]; backends are for domains that drive devices for others, and those of a monitor.

use abi::xen::io::xenbus::state;

/// A frontend in its negotiation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Frontend {
    /// It waits for the backend to offer.
    Initialising,
    /// It has published what the backend needs.
    Initialised,
    /// It works.
    Connected,
    /// It could not go on and has let go, and waits for the backend to do so.
    Closing,
    /// It has ended.
    Closed,
}

/// What a frontend has to do because of the backend's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrontendStep {
    /// Nothing.
    Stay,
    /// To publish rings and ports.
    Publish,
    /// To read what it is connected with.
    Connect,
    /// To read again what may have changed, as the size of a disk.
    Review,
    /// To let go of everything.
    Close,
}

impl Frontend {
    /// The backend says `theirs`; [`state::UNKNOWN`] when it says nothing, or is gone.
    pub fn on(&mut self, theirs: u32) -> FrontendStep {
        let (next, step) = match (*self, theirs) {
            (Frontend::Initialising, state::INIT_WAIT) => (Frontend::Initialised, FrontendStep::Publish),
            (Frontend::Initialised, state::CONNECTED) => (Frontend::Connected, FrontendStep::Connect),
            (Frontend::Connected, state::CONNECTED) => (Frontend::Connected, FrontendStep::Review),
            (Frontend::Initialised | Frontend::Connected | Frontend::Closing, state::UNKNOWN | state::CLOSING | state::CLOSED)
            | (Frontend::Initialising, state::CLOSING | state::CLOSED) => (Frontend::Closed, FrontendStep::Close),
            (same, _) => (same, FrontendStep::Stay),
        };
        *self = next;
        step
    }

    /// It cannot go on: it lets go of everything, and the backend sees Closing.
    pub fn close(&mut self) {
        *self = Frontend::Closing;
    }

    /// As the store has it.
    #[must_use]
    pub const fn number(self) -> u32 {
        match self {
            Frontend::Initialising => state::INITIALISING,
            Frontend::Initialised => state::INITIALISED,
            Frontend::Connected => state::CONNECTED,
            Frontend::Closing => state::CLOSING,
            Frontend::Closed => state::CLOSED,
        }
    }
}

/// A backend in its negotiation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// It waits for a frontend.
    Initialising,
    /// It has told what it can do.
    InitWait,
    /// It works.
    Connected,
    /// It has let go, and waits for the frontend to do so.
    Closing,
    /// It has ended, until a frontend begins again.
    Closed,
}

/// What a backend has to do because of the frontend's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackendStep {
    /// Nothing.
    Stay,
    /// To tell what it can do.
    Offer,
    /// To let go of everything first, then to tell what it can do: the frontend begins anew without having closed.
    Restart,
    /// To map rings and ports, and to tell what it has.
    Connect,
    /// To let go of everything.
    Close,
}

impl Backend {
    /// The frontend says `theirs`; [`state::UNKNOWN`] when it says nothing, or is gone.
    pub fn on(&mut self, theirs: u32) -> BackendStep {
        let (next, step) = match (*self, theirs) {
            (Backend::Initialising | Backend::Closed, state::INITIALISING) => (Backend::InitWait, BackendStep::Offer),
            (Backend::Connected | Backend::Closing, state::INITIALISING) => (Backend::InitWait, BackendStep::Restart),
            (Backend::InitWait, state::INITIALISED | state::CONNECTED) => (Backend::Connected, BackendStep::Connect),
            (Backend::InitWait | Backend::Connected, state::CLOSING) => (Backend::Closing, BackendStep::Close),
            (Backend::InitWait | Backend::Connected | Backend::Closing, state::CLOSED | state::UNKNOWN) => {
                (Backend::Closed, BackendStep::Close)
            }
            (same, _) => (same, BackendStep::Stay),
        };
        *self = next;
        step
    }

    /// It cannot go on, or its device is taken away: it lets go of everything, and the frontend sees Closing.
    pub fn close(&mut self) {
        *self = Backend::Closing;
    }

    /// As the store has it.
    #[must_use]
    pub const fn number(self) -> u32 {
        match self {
            Backend::Initialising => state::INITIALISING,
            Backend::InitWait => state::INIT_WAIT,
            Backend::Connected => state::CONNECTED,
            Backend::Closing => state::CLOSING,
            Backend::Closed => state::CLOSED,
        }
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec::Vec;

    use super::*;

    /// States of the other end, with some that do not exist.
    const STATES: u32 = 10;

    /// All sequences of five states.
    fn sequences() -> impl Iterator<Item = Vec<u32>> {
        (0..STATES.pow(5)).map(|number| (0..5).map(|at| number / STATES.pow(at) % STATES).collect())
    }

    #[test]
    fn frontend_publishes_connects_and_closes() {
        use FrontendStep::{Close, Connect, Publish, Review, Stay};
        use state::{CLOSED, CLOSING, CONNECTED, INIT_WAIT, INITIALISING};
        let mut frontend = Frontend::Initialising;
        assert_eq!(
            [INITIALISING, INIT_WAIT, INIT_WAIT, CONNECTED, CONNECTED, CLOSING, CLOSED].map(|theirs| frontend.on(theirs)),
            [Stay, Publish, Stay, Connect, Review, Close, Stay]
        );
    }

    #[test]
    fn frontend_does_nothing_twice_and_nothing_out_of_order() {
        for sequence in sequences() {
            let mut frontend = Frontend::Initialising;
            let steps = sequence.iter().map(|theirs| frontend.on(*theirs));
            let taken: Vec<_> = steps.filter(|step| !matches!(step, FrontendStep::Stay | FrontendStep::Review)).collect();
            let all = [FrontendStep::Publish, FrontendStep::Connect, FrontendStep::Close];
            let is_early_end = matches!(taken[..], [FrontendStep::Close] | [FrontendStep::Publish, FrontendStep::Close]);
            assert!(all.starts_with(&taken) || is_early_end, "{sequence:?}: {taken:?}");
        }
    }

    #[test]
    fn backend_connects_once_for_each_offer_and_never_holds_on_to_a_frontend_that_is_gone() {
        for sequence in sequences() {
            let mut backend = Backend::Initialising;
            let (mut has_offered, mut holds) = (false, false);
            for theirs in &sequence {
                match backend.on(*theirs) {
                    BackendStep::Stay => {}
                    BackendStep::Offer => {
                        assert!(!holds, "{sequence:?}");
                        has_offered = true;
                    }
                    BackendStep::Restart => (has_offered, holds) = (true, false),
                    BackendStep::Connect => {
                        assert!(has_offered && !holds, "{sequence:?}");
                        (has_offered, holds) = (false, true);
                    }
                    BackendStep::Close => (has_offered, holds) = (false, false),
                }
                assert!(!holds || !matches!(*theirs, state::CLOSING | state::CLOSED | state::UNKNOWN), "{sequence:?}");
                assert_eq!(holds, backend == Backend::Connected, "{sequence:?}");
            }
        }
    }

    #[test]
    fn both_ends_find_together_and_apart_whoever_looks_first() {
        // Each bit of the number lets one of the two look.
        for order in 0_u32..1 << 10 {
            let (mut frontend, mut backend) = (Frontend::Initialising, Backend::Initialising);
            let look = |count: u32, frontend: &mut Frontend, backend: &mut Backend| {
                for turn in (0..count).chain([0, 1, 0, 1, 0, 1]) {
                    if order >> turn & 1 == 0 {
                        frontend.on(backend.number());
                        backend.on(frontend.number());
                    } else {
                        backend.on(frontend.number());
                        frontend.on(backend.number());
                    }
                }
            };
            look(10, &mut frontend, &mut backend);
            assert_eq!((frontend, backend), (Frontend::Connected, Backend::Connected), "{order:#b}");
            if order & 1 == 0 {
                backend.close()
            } else {
                frontend.close()
            }
            look(10, &mut frontend, &mut backend);
            assert_eq!((frontend, backend), (Frontend::Closed, Backend::Closed), "{order:#b}");
        }
    }
}
