//! TCLO: the host asks in text, the guest answers `OK data` or `ERROR reason`.
//!
//! The guest begins: it sends its last reply, or nothing, and looks whether there is a request. One program in a machine can do that.
//! When another one (vmtoolsd) does it too, the host closes the older channel each time a new one is opened: a channel that again and again
//! is closed soon after it was opened means that we are not alone, and then we leave the field to the other for a while.

use alloc::vec::Vec;

use abi::vmware::message;

use super::backdoor::Backdoor;
use super::channel::{Channel, ChannelError};
use crate::hal::{Nanos, SECOND};

/// How often the host is asked while it has nothing to say.
const PERIOD: Nanos = SECOND;
/// How long to wait after a channel could not be opened.
const REOPEN: Nanos = 15 * SECOND;
/// A channel that is closed sooner was taken away by somebody.
const SHORT_LIFE: Nanos = 5 * SECOND;
/// After that many short lives in a row we are not alone.
const SHORT_LIVES: u32 = 3;
/// How long the field is left to the other.
const TRUCE: Nanos = 60 * SECOND;

/// The guest's end.
pub(super) struct Tclo<'h> {
    backdoor: Backdoor<'h>,
    state: State<'h>,
    short_lives: u32,
}

enum State<'h> {
    Closed { retry: Nanos },
    Open { channel: Channel<'h>, opened: Nanos, reply: Vec<u8>, next: Nanos },
}

/// What came of a poll.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Incoming {
    /// Nothing, or it was not time yet.
    Nothing,
    /// A request, to be answered by [`Tclo::reply`].
    Request(Vec<u8>),
    /// The channel could not be opened, or was closed.
    Lost(ChannelError),
    /// Another program answers the host.
    Contended,
}

impl<'h> Tclo<'h> {
    pub(super) const fn new(backdoor: Backdoor<'h>) -> Tclo<'h> {
        Tclo { backdoor, state: State::Closed { retry: 0 }, short_lives: 0 }
    }

    /// Opens the channel, sends the reply and takes a request, as far as it is time for it.
    pub(super) fn poll(&mut self, now: Nanos) -> Incoming {
        if self.next() > now {
            return Incoming::Nothing;
        }
        if let State::Closed { .. } = self.state {
            match Channel::open(self.backdoor, message::TCLO) {
                Ok(channel) => self.state = State::Open { channel, opened: now, reply: Vec::new(), next: now },
                Err(error) => {
                    self.state = State::Closed { retry: now.saturating_add(REOPEN) };
                    return Incoming::Lost(error);
                }
            }
        }
        let State::Open { channel, opened, reply, next } = &mut self.state else { return Incoming::Nothing };
        match channel.send(reply).and_then(|()| channel.receive()) {
            Ok(request) => {
                reply.clear();
                let request = request.filter(|request| !request.is_empty());
                if request.is_none() {
                    *next = now.saturating_add(PERIOD);
                }
                request.map_or(Incoming::Nothing, Incoming::Request)
            }
            Err(error) => {
                let opened = *opened;
                self.lost(error, opened, now)
            }
        }
    }

    fn lost(&mut self, error: ChannelError, opened: Nanos, now: Nanos) -> Incoming {
        let short = error == ChannelError::Closed && now.saturating_sub(opened) < SHORT_LIFE;
        self.short_lives = if short { self.short_lives + 1 } else { 0 };
        let contended = self.short_lives >= SHORT_LIVES;
        if contended {
            self.short_lives = 0;
        }
        self.state = State::Closed { retry: now.saturating_add(if contended { TRUCE } else { PERIOD }) };
        if contended { Incoming::Contended } else { Incoming::Lost(error) }
    }

    /// The answer to the request that [`Tclo::poll`] returned; goes out with the next poll.
    pub(super) fn reply(&mut self, text: &str) {
        if let State::Open { reply, .. } = &mut self.state {
            *reply = text.as_bytes().to_vec();
        }
    }

    /// When to poll again.
    pub(super) const fn next(&self) -> Nanos {
        match self.state {
            State::Closed { retry } => retry,
            State::Open { next, .. } => next,
        }
    }

    /// Closes the channel for good.
    pub(super) fn close(&mut self) {
        self.state = State::Closed { retry: Nanos::MAX };
    }
}
