//! The conversation with scripted peers.

use alloc::collections::VecDeque;
use alloc::format;
use alloc::string::ToString;
use alloc::vec::Vec;

use abi::xen::xenstore::{Header, OK, PAYLOAD_MAX, op};
use zerocopy::IntoBytes;

use super::*;
use crate::store::Store;

/// Says what the script says, at most `piece` bytes at a time, and takes down what it is told.
struct Script {
    says: VecDeque<u8>,
    piece: usize,
    told: Vec<u8>,
    is_numbered: bool,
}

impl Peer for Script {
    fn deadline(&self) -> Nanos {
        0
    }

    fn is_numbered(&self) -> bool {
        self.is_numbered
    }

    fn send(&mut self, bytes: &[u8], _: Nanos) -> Result<(), StoreError> {
        self.told.extend_from_slice(bytes);
        Ok(())
    }

    fn receive(&mut self, buffer: &mut [u8], _: Option<Nanos>) -> Result<usize, StoreError> {
        let count = self.piece.min(buffer.len()).min(self.says.len());
        for (to, from) in buffer.iter_mut().zip(self.says.drain(..count)) {
            *to = from;
        }
        if count == 0 { Err(StoreError::Timeout) } else { Ok(count) }
    }
}

fn numbered(id: u32, op: u32, payload: &[u8]) -> Vec<u8> {
    let header = Header { op: op.into(), req_id: id.into(), tx_id: 0.into(), len: (payload.len() as u32).into() };
    [header.as_bytes(), payload].concat()
}

fn message(op: u32, payload: &[u8]) -> Vec<u8> {
    numbered(0, op, payload)
}

fn script(messages: &[Vec<u8>], piece: usize) -> Client<Script> {
    Client::new(Script { says: messages.concat().into(), piece, told: Vec::new(), is_numbered: false }, 0)
}

fn whole(messages: &[Vec<u8>]) -> Client<Script> {
    script(messages, usize::MAX)
}

#[test]
fn answers_to_other_requests_are_dropped_where_they_are_numbered() {
    let mut store = whole(&[numbered(9, op::READ, b"stale"), numbered(9, op::ERROR, b"ENOENT\0"), numbered(1, op::READ, b"mine")]);
    store.peer().is_numbered = true;
    assert_eq!(store.read(b"k").unwrap(), b"mine");
}

#[test]
fn events_wait_once_for_each_path_and_token_and_are_bounded() {
    let event = |path: &str, token: &str| message(op::WATCH_EVENT, format!("{path}\0{token}\0").as_bytes());
    let mut store = whole(&[event("a", "1"), event("a", "1"), event("a", "2"), message(op::READ, b"")]);
    store.read(b"k").unwrap();
    let tokens: Vec<_> = core::iter::from_fn(|| store.next_event(Some(0)).ok()).map(|event| event.token).collect();
    assert_eq!(tokens, [b"1", b"2"]);
    let mut many: Vec<_> = (0..3000).map(|n| event(&n.to_string(), "t")).collect();
    many.push(message(op::READ, b""));
    let mut store = whole(&many);
    store.read(b"k").unwrap();
    assert_eq!(core::iter::from_fn(|| store.next_event(Some(0)).ok()).count(), 1024);
}

#[test]
fn read_sends_the_path_and_gives_the_value_as_it_is() {
    let mut store = whole(&[message(op::READ, b"a\0b\n")]);
    assert_eq!(store.read(b"device/vif/0/mac").unwrap(), b"a\0b\n");
    assert_eq!(store.peer().told, numbered(1, op::READ, b"device/vif/0/mac\0"));
}

#[test]
fn write_sends_path_and_bytes() {
    let mut store = whole(&[message(op::WRITE, OK)]);
    store.write(b"data/x", b"1\n\xff").unwrap();
    assert_eq!(store.peer().told, numbered(1, op::WRITE, b"data/x\x001\n\xff"));
}

#[test]
fn messages_split_at_every_byte_are_put_together() {
    let talk = [message(op::WATCH_EVENT, b"a\0t\0"), message(op::READ, b"value"), message(op::WATCH_EVENT, b"b\0t\0")];
    for piece in 1..talk.concat().len() {
        let mut store = script(&talk, piece);
        assert_eq!(store.read(b"k").unwrap(), b"value", "in pieces of {piece}");
        assert_eq!([0, 1].map(|_| store.next_event(None).unwrap().path), [b"a", b"b"]);
    }
}

#[test]
fn errors_keep_their_meaning() {
    let error = |name: &str| whole(&[message(op::ERROR, format!("{name}\0").as_bytes())]).read(b"k").unwrap_err();
    assert_eq!(error("ENOENT"), StoreError::NotFound);
    assert_eq!(error("EACCES"), StoreError::Denied);
    assert_eq!(error("EINVAL"), StoreError::BadKey);
    assert_eq!(error("ENOSPC"), StoreError::Full);
    assert_eq!(error("EQUOTA"), StoreError::Refused("EQUOTA".into()));
}

#[test]
fn length_beyond_the_protocol_s_ends_the_conversation() {
    let header = Header { op: op::READ.into(), req_id: 0.into(), tx_id: 0.into(), len: u32::MAX.into() };
    let error = whole(&[header.as_bytes().to_vec()]).read(b"k").unwrap_err();
    assert!(error.to_string().contains("longer than its protocol"), "{error}");
}

#[test]
fn length_that_promises_more_than_comes_is_a_timeout() {
    let mut cut = message(op::READ, b"value");
    cut.pop();
    assert_eq!(whole(&[cut]).read(b"k"), Err(StoreError::Timeout));
}

#[test]
fn host_that_never_answers_is_a_timeout() {
    assert_eq!(whole(&[]).read(b"k"), Err(StoreError::Timeout));
}

#[test]
fn answer_to_another_operation_ends_the_conversation() {
    assert!(matches!(whole(&[message(op::DIRECTORY, b"")]).read(b"k"), Err(StoreError::Transport(_))));
}

#[test]
fn too_long_a_value_is_not_sent() {
    let mut store = whole(&[]);
    assert_eq!(store.write(b"k", &[b'x'; PAYLOAD_MAX - 1]), Err(StoreError::TooLong));
    assert!(store.peer().told.is_empty());
}

#[test]
fn zero_byte_in_a_path_is_not_sent() {
    let mut store = whole(&[]);
    assert_eq!(store.write(b"k\0v", b""), Err(StoreError::BadKey));
    assert!(store.peer().told.is_empty());
}

#[test]
fn directory_is_its_names() {
    assert_eq!(whole(&[message(op::DIRECTORY, b"vif\0vbd\0")]).list(b"device/").unwrap(), [b"vif", b"vbd"]);
    assert!(whole(&[message(op::DIRECTORY, b"")]).list(b"device").unwrap().is_empty());
}

#[test]
fn own_directory_is_found_by_the_domain_s_number() {
    let mut store = whole(&[message(op::READ, b"7"), message(op::DIRECTORY, b"name\0")]);
    assert_eq!(store.list(b"").unwrap(), [b"name"]);
    assert!(store.peer().told.ends_with(b"/local/domain/7\0"));
}

#[test]
fn directory_of_many_messages_is_read_in_parts_and_anew_when_it_changes() {
    let mut store = whole(&[
        message(op::ERROR, b"E2BIG\0"),
        message(op::DIRECTORY_PART, b"5\0a\0bb\0"),
        message(op::DIRECTORY_PART, b"6\0c\0\0"),
        message(op::DIRECTORY_PART, b"6\0a\0"),
        message(op::DIRECTORY_PART, b"6\0c\0\0"),
    ]);
    assert_eq!(store.list(b"big").unwrap(), [b"a", b"c"]);
    assert!(store.peer().told.ends_with(b"big\x002\0"), "the offset counts names and their zero bytes");
}

#[test]
fn directory_without_an_end_is_an_error() {
    let mut store = whole(&[message(op::ERROR, b"E2BIG\0"), message(op::DIRECTORY_PART, b"5\0")]);
    assert!(matches!(store.list(b"big"), Err(StoreError::Transport(_))));
}

#[test]
fn removing_what_is_not_there_is_an_error() {
    assert_eq!(whole(&[message(op::ERROR, b"ENOENT\0")]).remove(b"k"), Err(StoreError::NotFound));
}
