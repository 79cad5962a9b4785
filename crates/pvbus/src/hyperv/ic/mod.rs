//! Integration components: small services of the guest's, each on a channel of its own ([`abi::hyperv::ic`]).
//!
//! The host asks, the guest answers each packet by the same packet with its changes. What they have in common is here: the headers, the choice of
//! versions, answers that find no room and are kept, and those that take time. What a component does is its [`Service`].
//!
//! ```text
//!   packet --> Component --body--> Service::answer --status--> the same packet back
//!                 |                      |
//!             negotiation            Later, then Service::late
//! ```
//!
//! A packet without whole headers gets no answer: there is no telling to what it would be one.

pub(super) mod heartbeat;
pub(super) mod kvp;
pub mod pools;
pub(super) mod shutdown;
pub(super) mod timesync;
pub(super) mod vss;

use alloc::vec::Vec;

use abi::hyperv::ic::{Message, Negotiate, Pipe, Version, flags, kind, status, version};
use abi::hyperv::ring::kind::IN_BAND;
use zerocopy::{FromBytes, IntoBytes};

use super::channel::Channel;
use super::hyperv0::{Buffer, Device, Failure, Needs};
use crate::driver::{Event, News};
use crate::hal::Nanos;

/// Pages of data in each ring, as with OpenBSD and Linux.
const RING_PAGES: usize = 4;
/// Most requests in one poll.
const REQUESTS: usize = 32;

/// What a component does.
pub(super) trait Service: Send {
    /// As OpenBSD lists it.
    const NAME: &'static str;
    /// Kind of its messages.
    const KIND: u16;
    /// Versions of its messages, oldest first.
    const VERSIONS: &'static [Version];

    /// Does what the host asks for, and changes the body to what it is answered.
    fn answer(&mut self, request: Request<'_>, events: &mut Vec<Event>) -> Answer;

    /// What has become of the request that was to be answered later.
    fn late(&mut self, now: Nanos, events: &mut Vec<Event>) -> Answer {
        let _ = (now, events);
        Answer::Now(status::FAIL)
    }

    /// Hears about the kernel.
    fn hear(&mut self, news: &News) {
        let _ = news;
    }

    /// The host is gone.
    fn close(&mut self, events: &mut Vec<Event>) {
        let _ = events;
    }
}

/// A request of the host's.
pub(super) struct Request<'a> {
    /// The version of its body that was agreed on.
    pub version: Version,
    /// The body, with whatever follows it in the packet.
    pub body: &'a mut [u8],
    /// Now.
    pub now: Nanos,
}

/// An answer to the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    /// [`status`].
    Now(u32),
    /// Not yet; ask again then, or after news.
    Later(Nanos),
}

/// A component.
pub(super) struct Component<'h, S> {
    service: S,
    channel: Option<Channel<'h>>,
    version: Version,
    /// An answer that found no room.
    unsent: Option<Packet>,
    /// A request that will be answered later.
    open: Option<Packet>,
}

/// A packet of the host's that is, or will be, the answer.
struct Packet {
    transaction: u64,
    bytes: Vec<u8>,
}

impl<S: Service> Component<'_, S> {
    /// A component whose channel is not open yet. Until the host has agreed on a version, it is the oldest.
    pub fn new(service: S) -> Self {
        let version = S::VERSIONS.first().copied().unwrap_or_default();
        Component { service, channel: None, version, unsent: None, open: None }
    }

    /// Takes a packet; `None` when it gets no answer, or none yet.
    fn take(&mut self, mut packet: Packet, now: Nanos, events: &mut Vec<Event>) -> Option<Packet> {
        let (message, body) = parts(&mut packet.bytes)?;
        if message.flags & flags::RESPONSE != 0 {
            return None;
        }
        let answer = match message.kind.get() {
            kind::NEGOTIATE => {
                if let Some(version) = negotiate(body, S::VERSIONS)? {
                    self.version = version;
                }
                message.size = NEGOTIATED.into();
                Answer::Now(status::OK)
            }
            kind if kind == S::KIND => self.service.answer(Request { version: self.version, body, now }, events),
            _ => Answer::Now(status::NOT_SUPPORTED),
        };
        match answer {
            Answer::Now(status) => finish(packet, status),
            Answer::Later(_) => {
                self.open = Some(packet);
                None
            }
        }
    }
}

impl<'h, S: Service> Device<'h> for Component<'h, S> {
    fn name(&self) -> &str {
        S::NAME
    }

    fn is_component(&self) -> bool {
        true
    }

    fn needs(&self) -> Needs {
        Needs { ring_pages: RING_PAGES, buffer_pages: 0 }
    }

    fn opened(&mut self, channel: Channel<'h>, _buffer: Option<Buffer>) {
        self.channel = Some(channel);
    }

    fn work(&mut self, now: Nanos, events: &mut Vec<Event>) -> Result<Option<Nanos>, Failure> {
        let mut due = None;
        for _ in 0..REQUESTS {
            let Some(channel) = &mut self.channel else { return Ok(None) };
            if let Some(Packet { transaction, bytes }) = &self.unsent
                && !channel.tell(*transaction, bytes)?
            {
                return Ok(due);
            }
            self.unsent = None;
            if let Some(open) = self.open.take() {
                match self.service.late(now, events) {
                    Answer::Now(status) => {
                        self.unsent = finish(open, status);
                        continue;
                    }
                    Answer::Later(when) => (self.open, due) = (Some(open), Some(when)),
                }
            }
            let Some(packet) = channel.receive()? else { return Ok(due) };
            if packet.kind == IN_BAND {
                let (transaction, bytes) = (packet.transaction, packet.payload().to_vec());
                self.unsent = self.take(Packet { transaction, bytes }, now, events);
            }
        }
        Ok(Some(now))
    }

    fn hear(&mut self, news: &News, _now: Nanos) {
        self.service.hear(news);
    }

    fn close(&mut self, events: &mut Vec<Event>) {
        self.channel = None;
        self.service.close(events);
    }
}

/// Bytes of a negotiation's answer.
const NEGOTIATED: u16 = 16;

/// Message header and body of a packet.
fn parts(bytes: &mut [u8]) -> Option<(&mut Message, &mut [u8])> {
    let (_, rest) = Pipe::mut_from_prefix(bytes).ok()?;
    Message::mut_from_prefix(rest).ok()
}

/// Makes a request its answer.
fn finish(mut packet: Packet, status: u32) -> Option<Packet> {
    let (message, _) = parts(&mut packet.bytes)?;
    message.status = status.into();
    message.flags = flags::TRANSACTION | flags::RESPONSE;
    Some(packet)
}

/// Chooses the newest versions that both speak, of the framework and of the body, and puts them into the body's place of the first; of the body it
/// comes back. Where there are none the body says so. Nothing comes back of a body that has not as many versions as it says.
fn negotiate(body: &mut [u8], known: &[Version]) -> Option<Option<Version>> {
    let (head, rest) = Negotiate::mut_from_prefix(body).ok()?;
    let (frameworks, messages) = (usize::from(head.framework_count.get()), usize::from(head.message_count.get()));
    let (offered, _) = <[Version]>::mut_from_prefix_with_elems(rest, frameworks + messages).ok()?;
    let (of_framework, of_message) = offered.split_at(frameworks);
    let newest = |known: &[Version], offered: &[Version]| known.iter().rev().find(|version| offered.contains(version)).copied();
    let chosen = newest(&version::FRAMEWORK, of_framework).zip(newest(known, of_message));
    let count = u16::from(chosen.is_some());
    (head.framework_count, head.message_count) = (count.into(), count.into());
    if let Some((framework, message)) = chosen {
        // Two were offered at least.
        let (place, _) = <[Version; 2]>::mut_from_prefix(offered.as_mut_bytes()).ok()?;
        *place = [framework, message];
    }
    Some(chosen.map(|(_, message)| message))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What is answered to the host's versions.
    fn negotiated(frameworks: u16, messages: u16, versions: &[(u16, u16)]) -> Option<Vec<u8>> {
        let mut body =
            Vec::from(Negotiate { framework_count: frameworks.into(), message_count: messages.into(), reserved: 0.into() }.as_bytes());
        versions.iter().for_each(|(major, minor)| body.extend(Version::new(*major, *minor).as_bytes()));
        negotiate(&mut body, &version::SHUTDOWN).map(|_| body)
    }

    #[test]
    fn newest_versions_of_both_are_chosen_in_whatever_order_they_come() {
        let body = negotiated(2, 4, &[(1, 0), (3, 0), (3, 1), (3, 2), (1, 0), (9, 0)]).unwrap();
        assert_eq!(body[..16], [1, 0, 1, 0, 0, 0, 0, 0, 3, 0, 0, 0, 3, 0, 2, 0]);
    }

    #[test]
    fn without_common_versions_there_are_none_in_the_answer() {
        let body = negotiated(1, 1, &[(2, 0), (3, 0)]).unwrap();
        assert_eq!(body[..4], [0; 4]);
        assert_eq!(negotiated(0, 0, &[]).unwrap()[..4], [0; 4]);
    }

    #[test]
    fn more_versions_than_there_are_is_no_negotiation() {
        assert_eq!(negotiated(1, 2, &[(1, 0), (1, 0)]), None);
        assert_eq!(negotiated(u16::MAX, u16::MAX, &[(1, 0), (1, 0)]), None);
    }

    proptest! {
        #[test]
        fn no_bytes_make_a_component_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), kind in 0_u16..7) {
            let mut component = Component::new(shutdown::Shutdown);
            let mut bytes = bytes;
            if let Some((message, _)) = parts(&mut bytes) {
                message.kind = kind.into();
            }
            let length = bytes.len();
            let answer = component.take(Packet { transaction: 1, bytes }, 0, &mut Vec::new());
            prop_assert!(answer.is_none_or(|answer| answer.bytes.len() == length));
        }
    }
}
