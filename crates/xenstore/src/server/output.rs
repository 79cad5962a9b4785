//! What waits to be sent on a connection: replies and events in one stream of bytes, with a bound.
//!
//! A client that does not read gets no more of its requests done (see [`Output::has_room`]), so its replies are bounded. Events come from others and
//! cannot wait: an event equal to one that has not begun to leave is dropped, and beyond [`EVENT_ROOM`] a watch is only remembered, once, and
//! fires at its own path when there is room again. That is less precise and loses nothing: who looks again at what it watches sees
//! all that happened.
//!
//! Replies may be in doubt: to changes that are not written down yet, to a request that another process is to take over. What is queued from there on is
//! held back until the doubt is over; then the reply leaves as it is, or another in its place.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

use abi::xen::xenstore::{HEADER_SIZE, Header, NO_TRANSACTION, op};
use zerocopy::IntoBytes;

use crate::error::Error;
use crate::watch::{Event, Watch};
use crate::wire::{self, Next};

/// Bytes that may wait before the client's requests do.
pub const REPLY_ROOM: usize = 64 << 10;
/// Bytes that may wait before events are merged.
pub const EVENT_ROOM: usize = 256 << 10;
/// Bytes sent that are kept before the rest is moved to the front, and most that an idle connection keeps.
const KEPT: usize = 64 << 10;

/// A connection's bytes to send.
#[derive(Default)]
pub struct Output {
    bytes: Vec<u8>,
    /// How many of `bytes` have been sent.
    head: usize,
    /// Position of `bytes` in the stream.
    start: u64,
    /// Where unsent replies end in the stream.
    replies: VecDeque<u64>,
    /// Where events begin in the stream.
    events: HashMap<(u64, Arc<str>), u64>,
    /// Watches that fired when there was no room.
    merged: BTreeMap<u64, Arc<Watch>>,
    /// Where in the stream begins what is held back.
    limit: Option<u64>,
    /// Where in the stream replies begin that are in doubt, in order.
    unsure: VecDeque<(u64, Unsure)>,
}

/// Why a reply is in doubt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unsure {
    /// What it confirms may fail to be written down.
    Kept,
    /// No process may take over.
    TakenOver,
}

impl Output {
    /// What is to be sent.
    pub fn pending(&self) -> &[u8] {
        let end = self.limit.map_or(self.bytes.len(), |limit| self.offset(limit));
        self.bytes.get(self.head..end).unwrap_or_default()
    }

    /// What has not been sent, held back or not.
    fn unsent(&self) -> &[u8] {
        self.bytes.get(self.head..).unwrap_or_default()
    }

    /// Whether a request may be answered, of which `most` may be outstanding; any number for 0.
    pub fn has_room(&self, most: usize) -> bool {
        self.unsent().len() < REPLY_ROOM && (most == 0 || self.replies.len() < most)
    }

    /// The first `count` bytes of [`Output::pending`] have been sent.
    pub fn sent(&mut self, count: usize) {
        self.head = (self.head + count).min(self.bytes.len());
        let position = self.start + self.head as u64;
        while self.replies.front().is_some_and(|end| *end <= position) {
            self.replies.pop_front();
        }
        if self.head == self.bytes.len() || self.head >= KEPT {
            self.start = position;
            self.bytes.drain(..self.head);
            self.head = 0;
            self.bytes.shrink_to(KEPT);
            self.events.retain(|_, begin| *begin >= position);
            self.events.shrink_to(256);
        }
        while self.unsent().len() < EVENT_ROOM / 2
            && let Some((_, watch)) = self.merged.pop_first()
        {
            self.event(&watch.here());
        }
    }

    /// Queues a reply to `request`: what `payload` writes, or the error.
    pub fn reply(&mut self, request: &Header, payload: impl FnOnce(&mut Vec<u8>) -> Result<(), Error>) {
        let begin = self.bytes.len();
        self.bytes.resize(begin + HEADER_SIZE, 0);
        let operation = match payload(&mut self.bytes) {
            Ok(()) => request.op.get(),
            Err(error) => {
                self.bytes.truncate(begin + HEADER_SIZE);
                self.bytes.extend_from_slice(error.wire_name().as_bytes());
                self.bytes.push(0);
                op::ERROR
            }
        };
        self.finish(begin, Header { op: operation.into(), ..*request });
        self.replies.push_back(self.end());
    }

    /// Queues an event, unless an equal one waits or there is no room.
    pub fn event(&mut self, event: &Event) {
        if self.unsent().len() >= EVENT_ROOM {
            self.merged.insert(event.watch.id, event.watch.clone());
            return;
        }
        let begin = self.bytes.len();
        let (sent, here) = (self.start + self.head as u64, self.start + begin as u64);
        // Each special event is about another domain, so equal ones count.
        if !event.path.starts_with('@') {
            let last = self.events.entry((event.watch.id, event.path.clone())).or_insert(here);
            // What was queued earlier and has not begun to leave.
            if *last >= sent && *last != here {
                return;
            }
            *last = here;
        }
        self.bytes.resize(begin + HEADER_SIZE, 0);
        for part in [event.reported_path().as_bytes(), b"\0", &event.watch.token, b"\0"] {
            self.bytes.extend_from_slice(part);
        }
        self.finish(begin, Header { op: op::WATCH_EVENT.into(), req_id: 0.into(), tx_id: NO_TRANSACTION.into(), len: 0.into() });
    }

    /// Holds back what is queued from now on.
    pub fn hold(&mut self) {
        self.limit.get_or_insert(self.end());
    }

    /// The reply that is queued next is in doubt.
    pub fn doubt(&mut self, why: Unsure) {
        self.hold();
        self.unsure.push_back((self.end(), why));
    }

    /// Whether there is such a doubt.
    pub fn is_unsure(&self, why: Unsure) -> bool {
        self.unsure.iter().any(|(_, unsure)| *unsure == why)
    }

    /// Replies that were in doubt are right.
    pub fn confirm(&mut self, why: Unsure) {
        self.unsure.retain(|(_, unsure)| *unsure != why);
        self.limit = self.unsure.front().map(|(begin, _)| *begin);
    }

    /// Puts what `payload` writes in the place of replies that were in doubt.
    pub fn revoke(&mut self, why: Unsure, payload: impl Fn(&mut Vec<u8>) -> Result<(), Error>) {
        let first = self.limit.unwrap_or(self.end());
        let held = self.bytes.split_off(self.offset(first));
        self.replies.retain(|end| *end <= first);
        // Equal ones may be queued again, which is no harm.
        self.events.retain(|_, begin| *begin < first);
        let mut unsure = std::mem::take(&mut self.unsure);
        let mut rest = held.as_slice();
        while let Next::Message(header, _, behind) = wire::next(rest) {
            let (message, was) = (rest.get(..rest.len() - behind.len()), first + (held.len() - rest.len()) as u64);
            rest = behind;
            match unsure.pop_front_if(|(begin, _)| *begin == was) {
                Some((_, unsure)) if unsure == why => self.reply(&header, &payload),
                other => {
                    self.unsure.extend(other.map(|(_, unsure)| (self.end(), unsure)));
                    self.bytes.extend_from_slice(message.unwrap_or_default());
                    if header.op.get() != op::WATCH_EVENT {
                        self.replies.push_back(self.end());
                    }
                }
            }
        }
        self.limit = self.unsure.front().map(|(begin, _)| *begin);
    }

    /// Everything that is to be sent, merged events too, for another process to send.
    pub fn all(&self) -> Vec<u8> {
        let mut bytes = self.unsent().to_vec();
        for watch in self.merged.values() {
            let mut alone = Output::default();
            alone.event(&watch.here());
            bytes.append(&mut alone.bytes);
        }
        bytes
    }

    /// Begins with bytes that another process did not send.
    pub fn resumed(bytes: Vec<u8>) -> Output {
        Output { bytes, ..Output::default() }
    }

    /// Position in the stream of what is queued next.
    fn end(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }

    /// Where in `bytes` a position in the stream is.
    fn offset(&self, position: u64) -> usize {
        usize::try_from(position.saturating_sub(self.start)).map_or(self.bytes.len(), |offset| offset.min(self.bytes.len()))
    }

    fn finish(&mut self, begin: usize, header: Header) {
        let length = u32::try_from(self.bytes.len() - begin - HEADER_SIZE).unwrap_or(u32::MAX);
        if let Some(place) = self.bytes.get_mut(begin..begin + HEADER_SIZE) {
            place.copy_from_slice(Header { len: length.into(), ..header }.as_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use abi::xen::xenstore::OK;

    use super::*;

    fn reply(output: &mut Output, number: u32) {
        let request = Header { op: op::WRITE.into(), req_id: number.into(), tx_id: NO_TRANSACTION.into(), len: 0.into() };
        output.reply(&request, |to| {
            to.extend_from_slice(OK);
            Ok(())
        });
    }

    /// Numbers of the requests whose replies are to be sent, and whether they are errors.
    fn sends(output: &mut Output) -> Vec<(u32, bool)> {
        let bytes = output.pending().to_vec();
        output.sent(bytes.len());
        let (mut replies, mut rest) = (Vec::new(), bytes.as_slice());
        while let Next::Message(header, _, behind) = wire::next(rest) {
            replies.push((header.req_id.get(), header.op.get() == op::ERROR));
            rest = behind;
        }
        assert!(rest.is_empty(), "half a message");
        replies
    }

    /// 1 is sure; 2 waits to be kept, 4 for another process.
    fn doubtful() -> Output {
        let mut output = Output::default();
        for number in 1..=5 {
            match number {
                2 => output.doubt(Unsure::Kept),
                4 => output.doubt(Unsure::TakenOver),
                _ => {}
            }
            reply(&mut output, number);
        }
        output
    }

    #[test]
    fn what_is_in_doubt_is_held_back_with_all_behind_it() {
        let mut output = doubtful();
        assert_eq!(sends(&mut output), [(1, false)]);
        output.confirm(Unsure::Kept);
        assert_eq!(sends(&mut output), [(2, false), (3, false)]);
        output.confirm(Unsure::TakenOver);
        assert_eq!(sends(&mut output), [(4, false), (5, false)]);
        assert!(output.all().is_empty());
    }

    #[test]
    fn revoked_replies_are_replaced_where_they_are() {
        let mut output = doubtful();
        output.revoke(Unsure::Kept, |_| Err(Error::NotKept));
        assert_eq!(sends(&mut output), [(1, false), (2, true), (3, false)]);
        output.revoke(Unsure::TakenOver, |_| Err(Error::BadRequest));
        assert_eq!(sends(&mut output), [(4, true), (5, false)]);
        let mut output = doubtful();
        output.revoke(Unsure::TakenOver, |_| Err(Error::BadRequest));
        assert_eq!(sends(&mut output), [(1, false)]);
        output.confirm(Unsure::Kept);
        assert_eq!(sends(&mut output), [(2, false), (3, false), (4, true), (5, false)]);
    }

    #[test]
    fn another_process_gets_what_was_held_back_too() {
        assert_eq!(sends(&mut Output::resumed(doubtful().all())).len(), 5);
    }

    #[test]
    fn replies_held_back_count_as_outstanding() {
        let mut output = doubtful();
        assert!(output.has_room(6) && !output.has_room(5));
        output.revoke(Unsure::Kept, |_| Err(Error::NotKept));
        assert!(output.has_room(6) && !output.has_room(5));
    }
}
