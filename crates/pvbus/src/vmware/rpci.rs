//! RPCI: the guest asks in text, the host answers `1 data` or `0 reason`.
//!
//! Each request has a channel of its own: whatever happens to the machine between two requests (a snapshot, a move, another program that
//! uses up channels) cannot harm the next one. A channel that the host closes under a request is opened again; all requests of this library
//! may be repeated. [`Call`] is the request as a state machine, [`Rpci::call`] waits for it.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;
use core::task::Poll;

use abi::vmware::message;
use abi::vmware::rpc::{FAILURE, SUCCESS};

use super::backdoor::Backdoor;
use super::channel::{Channel, ChannelError};
use crate::hal::{MILLISECOND, Nanos, SECOND};

/// How long the host may take for an answer. VMware has it ready at once.
const TIMEOUT: Nanos = 5 * SECOND;
/// How long to wait before asking again, at first; doubled each time.
const FIRST_WAIT: Nanos = MILLISECOND / 4;
/// The longest wait before asking again.
const LONGEST_WAIT: Nanos = 100 * MILLISECOND;
/// How many channels a request is tried on.
const ATTEMPTS: usize = 4;

/// The client.
#[derive(Clone, Copy)]
pub struct Rpci<'h> {
    backdoor: Backdoor<'h>,
    timeout: Nanos,
}

impl<'h> Rpci<'h> {
    /// A client whose requests time out after five seconds.
    #[must_use]
    pub const fn new(backdoor: Backdoor<'h>) -> Rpci<'h> {
        Rpci { backdoor, timeout: TIMEOUT }
    }

    /// The same client with another timeout.
    #[must_use]
    pub const fn with_timeout(self, timeout: Nanos) -> Rpci<'h> {
        Rpci { timeout, ..self }
    }

    /// The backdoor it uses.
    #[must_use]
    pub const fn backdoor(&self) -> Backdoor<'h> {
        self.backdoor
    }

    /// Sends a request and waits for what follows the `1 ` of the answer.
    ///
    /// # Errors
    /// [`RpcError`].
    pub fn call(&self, request: &[u8]) -> Result<Vec<u8>, RpcError> {
        let hal = self.backdoor.hal();
        let mut call = self.begin(request, hal.now());
        loop {
            match call.poll(hal.now()) {
                Poll::Ready(result) => return result,
                Poll::Pending => hal.wait_until(call.next()),
            }
        }
    }

    /// Begins a request; [`Call::poll`] does the work.
    #[must_use]
    pub fn begin(&self, request: &[u8], now: Nanos) -> Call<'h> {
        Call {
            backdoor: self.backdoor,
            request: request.to_vec(),
            channel: None,
            attempts: ATTEMPTS,
            deadline: now.saturating_add(self.timeout),
            wait: FIRST_WAIT,
            next: now,
        }
    }
}

/// A request on its way.
pub struct Call<'h> {
    backdoor: Backdoor<'h>,
    request: Vec<u8>,
    /// The channel that the request was sent on.
    channel: Option<Channel<'h>>,
    /// Channels that may still be opened.
    attempts: usize,
    deadline: Nanos,
    wait: Nanos,
    next: Nanos,
}

impl<'h> Call<'h> {
    /// Goes on with it. After an answer the call is over.
    pub fn poll(&mut self, now: Nanos) -> Poll<Result<Vec<u8>, RpcError>> {
        loop {
            match self.advance() {
                Ok(Some(reply)) => return Poll::Ready(parse(&reply)),
                Ok(None) if now >= self.deadline => return Poll::Ready(Err(RpcError::Timeout)),
                Ok(None) => {
                    self.next = now.saturating_add(self.wait).min(self.deadline);
                    self.wait = (self.wait * 2).min(LONGEST_WAIT);
                    return Poll::Pending;
                }
                Err(ChannelError::Closed | ChannelError::Checkpoint) if self.attempts > 0 => self.channel = None,
                Err(error) => return Poll::Ready(Err(RpcError::Channel(error))),
            }
        }
    }

    /// When to poll again.
    #[must_use]
    pub const fn next(&self) -> Nanos {
        self.next
    }

    /// Sends the request if it is not under way, and asks for the reply.
    fn advance(&mut self) -> Result<Option<Vec<u8>>, ChannelError> {
        let channel = match self.channel.take() {
            Some(channel) => channel,
            None => {
                self.attempts = self.attempts.saturating_sub(1);
                let channel = Channel::open(self.backdoor, message::RPCI)?;
                channel.send(&self.request)?;
                channel
            }
        };
        let reply = channel.receive()?;
        self.channel = Some(channel);
        Ok(reply)
    }
}

/// Takes the verdict off a reply: the first character is it, the second separates.
fn parse(reply: &[u8]) -> Result<Vec<u8>, RpcError> {
    let rest = reply.get(2..).unwrap_or_default();
    match (reply.first(), reply.get(1)) {
        (verdict, None | Some(b' ')) if verdict == SUCCESS.first() => Ok(rest.to_vec()),
        (verdict, None | Some(b' ')) if verdict == FAILURE.first() => {
            let text = rest.strip_suffix(b"\0").unwrap_or(rest);
            Err(RpcError::Refused(String::from_utf8_lossy(text).into_owned()))
        }
        _ => Err(RpcError::Malformed),
    }
}

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RpcError {
    /// The host refused, with this reason.
    Refused(String),
    /// The reply begins with neither `1` nor `0`.
    Malformed,
    /// The host did not answer in time.
    Timeout,
    /// The request or the reply did not get through.
    Channel(ChannelError),
}

impl fmt::Display for RpcError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RpcError::Refused(reason) => write!(f, "the host refused: {reason}"),
            RpcError::Malformed => f.write_str("the host's reply begins with neither 1 nor 0"),
            RpcError::Timeout => f.write_str("the host did not answer in time"),
            RpcError::Channel(error) => write!(f, "{error}"),
        }
    }
}

impl core::error::Error for RpcError {}
