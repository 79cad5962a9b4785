//! Integration components: heartbeat, shutdown, time, key/value pairs, file systems at rest. See [`abi::hyperv::ic`] for their messages.
//!
//! ```text
//!   vmctl stop, sync, freeze, status --> Heartbeat, Shutdown, TimeSync, Vss   handles, one file each
//!                         the store <--> Kvp
//!                                          | Service
//!                                       Component                              framing, versions: this file
//!                                          | vmbus::Device
//! ```
//!
//! The host asks and the guest answers, one request at a time. A guest that does not answer is waited for: it may have to load a daemon first, and
//! all that waits is its own component.

mod heartbeat;
mod kvp;
mod shutdown;
#[cfg(test)]
mod tests;
mod timesync;
mod vss;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use abi::hyperv::ic::{self as words, HEADER_BYTES, Message, Negotiate, PIPE_DATA, Pipe, Version, flags, kind, status};
use abi::hyperv::vmbus::{Guid, PIPE_MODE_MESSAGE, USER_BYTES, offer_flags};
use vmm::time::{Timer, TimerClient, Timers};
use zerocopy::{FromBytes, IntoBytes};

pub use heartbeat::{Heartbeat, Pulse};
pub use kvp::{Facts, Kvp, REPORTS};
pub use shutdown::{Shutdown, ShutdownError};
pub use timesync::TimeSync;
pub use vss::{FileSystems, Vss, VssError};

use super::vmbus::{BrokenRing, Channel, Device, Kind, Offer, Outgoing, PacketBuf, Peer};
use crate::network::Worked;

/// What a component is for the guest.
pub struct Identity {
    /// Class of device.
    pub class: Guid,
    /// The one device of the class.
    pub instance: Guid,
    /// [`Message::kind`] of its requests.
    pub kind: u16,
    /// Versions of its requests that are spoken, oldest first.
    pub versions: &'static [Version],
}

/// What to do when no request is under way.
pub enum Next {
    /// Ask this.
    Ask(Vec<u8>),
    /// Nothing before this time, if any, in nanoseconds of the machine's clock, or before the bell rings.
    Wait(Option<u64>),
}

/// What is particular to a component.
pub trait Service: Send {
    /// What it is.
    const IDENTITY: Identity;

    /// The guest takes requests, of this version. It may say so again after a restart.
    fn ready(&mut self, version: Version, now: u64);

    /// What to do now.
    fn next(&mut self, now: u64) -> Next;

    /// The guest has answered the request that [`Service::next`] gave.
    fn answered(&mut self, status: u32, body: &[u8], now: u64);

    /// The guest does not take requests any more.
    fn gone(&mut self);
}

/// Where a component is with its guest.
enum Phase {
    /// Nothing said.
    Begin,
    /// Asked for versions.
    Negotiating,
    /// The guest has none of ours.
    Stranger,
    /// Ready; and whether an answer is awaited.
    Ready { framework: Version, version: Version, is_asked: bool },
}

/// A component as a device.
pub struct Component<S> {
    service: S,
    timers: Arc<Timers>,
    timer: Timer,
    /// Called by the timer, which does not keep it.
    _alarm: Arc<Alarm>,
    channel: Option<Channel>,
    buf: PacketBuf,
    phase: Phase,
    /// Of the last request.
    transaction: u64,
    /// A request for which the ring had no room.
    unsent: Option<Vec<u8>>,
}

/// Rings the bell of the components' thread.
struct Alarm(Peer);

impl TimerClient for Alarm {
    fn timer_due(&self, _token: u64) {
        (self.0)();
    }
}

impl<S: Service> Component<S> {
    fn new(service: S, timers: &Arc<Timers>, bell: Peer) -> Component<S> {
        let alarm = Arc::new(Alarm(bell));
        let client: std::sync::Weak<dyn TimerClient> = Arc::<Alarm>::downgrade(&alarm);
        Component {
            service,
            timers: Arc::clone(timers),
            timer: timers.timer(client, 0),
            _alarm: alarm,
            channel: None,
            buf: PacketBuf::default(),
            phase: Phase::Begin,
            transaction: 0,
            unsent: None,
        }
    }

    fn now(&self) -> u64 {
        self.timers.clock().now()
    }

    /// Hears all answers.
    fn receive(&mut self) -> Result<(), BrokenRing> {
        let now = self.now();
        let Some(channel) = &mut self.channel else { return Ok(()) };
        while let Some(packet) = channel.receive(&mut self.buf)? {
            let Some((message, body)) = parse(packet.payload) else { continue };
            if !matches!(packet.kind, Kind::InBand) || packet.transaction != self.transaction {
                continue;
            }
            match (&mut self.phase, message.kind.get()) {
                (Phase::Negotiating, kind::NEGOTIATE) => match chosen(body, S::IDENTITY.versions) {
                    Some((framework, version)) => {
                        self.phase = Phase::Ready { framework, version, is_asked: false };
                        self.service.ready(version, now);
                    }
                    None => self.phase = Phase::Stranger,
                },
                (Phase::Ready { is_asked, .. }, kind) if *is_asked && kind == S::IDENTITY.kind => {
                    *is_asked = false;
                    self.service.answered(message.status.get(), body, now);
                }
                // Nobody has asked.
                _ => {}
            }
        }
        Ok(())
    }

    /// Sends what is to be sent, or sets the timer.
    fn ask(&mut self) -> Result<(), BrokenRing> {
        if self.unsent.is_none()
            && let Some(message) = self.next()
        {
            self.transaction = self.transaction.wrapping_add(1);
            self.unsent = Some(message);
        }
        if let (Some(message), Some(channel)) = (&self.unsent, &mut self.channel)
            && channel.send(&Outgoing::in_band(self.transaction, message))?
        {
            self.unsent = None;
        }
        Ok(())
    }

    /// The next request.
    fn next(&mut self) -> Option<Vec<u8>> {
        let now = self.now();
        match &mut self.phase {
            Phase::Begin => {
                self.phase = Phase::Negotiating;
                Some(negotiation(S::IDENTITY.versions))
            }
            Phase::Ready { framework, version, is_asked: is_asked @ false } => match self.service.next(now) {
                Next::Ask(body) => {
                    *is_asked = true;
                    Some(frame((*framework, *version), S::IDENTITY.kind, self.transaction as u8, &body))
                }
                Next::Wait(until) => {
                    self.timers.arm(self.timer, until);
                    None
                }
            },
            _ => None,
        }
    }
}

impl<S: Service> Device for Component<S> {
    type Error = BrokenRing;

    fn offer(&self) -> Offer {
        let mut user_defined = [0; USER_BYTES];
        if let Some(mode) = user_defined.first_chunk_mut() {
            *mode = PIPE_MODE_MESSAGE.to_le_bytes();
        }
        let Identity { class, instance, .. } = S::IDENTITY;
        Offer { class, instance, flags: offer_flags::NAMED_PIPE_MODE, user_defined, sub_channels: 0 }
    }

    fn opened(&mut self, channel: Channel) {
        self.channel = Some(channel);
        self.phase = Phase::Begin;
    }

    fn closed(&mut self, _index: u16) {
        self.channel = None;
        self.unsent = None;
        self.phase = Phase::Begin;
        self.timers.arm(self.timer, None);
        self.service.gone();
    }

    fn work(&mut self) -> Result<Worked, BrokenRing> {
        self.receive()?;
        self.ask()?;
        Ok(Worked::default())
    }
}

/// The first request: what we speak.
fn negotiation(versions: &[Version]) -> Vec<u8> {
    let counts = Negotiate {
        framework_count: (words::version::FRAMEWORK.len() as u16).into(),
        message_count: (versions.len() as u16).into(),
        reserved: 0.into(),
    };
    let body = [counts.as_bytes(), words::version::FRAMEWORK.as_bytes(), versions.as_bytes()].concat();
    frame((Version::default(), Version::default()), kind::NEGOTIATE, 0, &body)
}

/// A request as it goes into a packet.
fn frame((framework, version): (Version, Version), kind: u16, transaction: u8, body: &[u8]) -> Vec<u8> {
    let message = Message {
        framework,
        kind: kind.into(),
        version,
        size: (body.len() as u16).into(),
        status: status::OK.into(),
        transaction,
        flags: flags::TRANSACTION | flags::REQUEST,
        reserved: 0.into(),
    };
    let pipe = Pipe { flags: PIPE_DATA.into(), length: ((size_of::<Message>() + body.len()) as u32).into() };
    [pipe.as_bytes(), message.as_bytes(), body].concat()
}

/// Header and body of an answer. The body may be padded.
fn parse(payload: &[u8]) -> Option<(&Message, &[u8])> {
    let (header, body) = payload.split_at_checked(HEADER_BYTES)?;
    let (_, message) = Pipe::ref_from_prefix(header).ok()?;
    let message = Message::ref_from_bytes(message).ok()?;
    (message.flags & flags::RESPONSE != 0).then_some((message, body))
}

/// Versions of the framework and of `versions` that the guest has chosen, if it has.
fn chosen(body: &[u8], versions: &[Version]) -> Option<(Version, Version)> {
    let (counts, rest) = Negotiate::ref_from_prefix(body).ok()?;
    if (counts.framework_count.get(), counts.message_count.get()) != (1, 1) {
        return None;
    }
    let ([framework, version], _) = <[Version; 2]>::ref_from_prefix(rest).ok()?;
    (words::version::FRAMEWORK.contains(framework) && versions.contains(version)).then_some((*framework, *version))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
