//! Bytes: cut anywhere, too many, wrong; queues with bounds; connections that start again.

mod common;

use abi::xen::xenstore::op;
use common::{Message, Rig, message, parse};
use proptest::prelude::*;
use xenstore::{ClientId, DomId, Quota};

/// A conversation with requests of many kinds, failing ones included.
fn conversation() -> Vec<u8> {
    let requests: [(u32, u32, &[u8]); 14] = [
        (op::WRITE, 0, b"/a/b\0value"),
        (op::WATCH, 0, b"/a\0token\0"),
        (op::READ, 0, b"/a/b\0"),
        (op::TRANSACTION_START, 0, b""),
        (op::WRITE, 1, b"/a/c\0\0\0\0"),
        (op::DIRECTORY, 1, b"/a\0"),
        (op::TRANSACTION_END, 1, b"T\0"),
        (op::READ, 0, b"/a//b\0"),
        (op::WRITE, 0, b"/a/b\0"),
        (op::RM, 0, b"/a\0"),
        (99, 0, b"whatever"),
        (op::RESET_WATCHES, 0, b"\0"),
        (op::GET_DOMAIN_PATH, 0, b"7\0"),
        (op::TRANSACTION_START, 0, b"\0"),
    ];
    requests.iter().zip(1..).flat_map(|((op, tx, payload), id)| message(*op, id, *tx, payload)).collect()
}

fn talk(pieces: impl IntoIterator<Item = Vec<u8>>) -> Vec<Message> {
    let mut rig = Rig::new();
    let client = rig.socket();
    for piece in pieces {
        rig.server.receive(client, &piece);
    }
    rig.messages(client)
}

#[test]
fn message_split_at_every_byte_is_answered_the_same() {
    let bytes = conversation();
    let whole = talk([bytes.clone()]);
    assert_eq!(whole.len(), 14 + 3, "14 replies, and events of /a, /a/c, /a/b");
    for at in 0..=bytes.len() {
        let (first, second) = bytes.split_at(at);
        assert_eq!(talk([first.to_vec(), second.to_vec()]), whole, "cut at {at}");
    }
    assert_eq!(talk(bytes.iter().map(|byte| vec![*byte])), whole, "byte by byte");
}

proptest! {
    #[test]
    fn message_cut_into_any_pieces_is_answered_the_same(cuts in prop::collection::vec(1usize..40, 1..100)) {
        let bytes = conversation();
        let mut cuts = cuts.into_iter().cycle();
        let mut rest = &bytes[..];
        let pieces = std::iter::from_fn(|| {
            let (piece, behind) = rest.split_at(cuts.next()?.min(rest.len()));
            rest = behind;
            (!piece.is_empty()).then(|| piece.to_vec())
        });
        prop_assert_eq!(talk(pieces.collect::<Vec<_>>()), talk([bytes.clone()]));
    }

    #[test]
    fn garbage_never_panics_and_breaks_only_its_own_connection(garbage in prop::collection::vec(any::<u8>(), 0..300)) {
        let mut rig = Rig::new();
        let (honest, bad, worse) = (rig.socket(), rig.guest(1), rig.socket());
        rig.server.receive(bad, &garbage);
        rig.server.receive(worse, &garbage);
        rig.write(honest, 0, "/a", "x").unwrap();
        prop_assert_eq!(rig.read(honest, 0, "/a"), Ok(b"x".to_vec()));
    }

    /// Well framed messages with strings that requests are made of reach further than bytes do.
    #[test]
    fn framed_nonsense_is_answered(
        requests in prop::collection::vec((0u32..28, 0u32..3, prop::collection::vec(prop::sample::select(
            vec!["", "/", "a", "/a", "/a/b", "@releaseDomain", "1", "0", "T", "n1", "b0", "nodes", "-1", "32752", "quota"]), 0..4)), 1..60),
    ) {
        let mut rig = Rig::new();
        let (host, guest) = (rig.socket(), rig.guest(1));
        for (op, tx, strings) in requests {
            for client in [host, guest] {
                let payload: Vec<u8> = strings.iter().flat_map(|text| [text.as_bytes(), b"\0"].concat()).collect();
                rig.server.receive(client, &message(op, 1, tx, &payload));
                let answered = rig.server.is_broken(client) || rig.messages(client).iter().any(|message| message.op != op::WATCH_EVENT);
                prop_assert!(answered);
                rig.messages(host);
            }
        }
        prop_assert!(rig.server.store().is_consistent());
    }
}

#[test]
fn reply_repeats_operation_request_and_transaction() {
    let mut rig = Rig::new();
    let client = rig.socket();
    let tx = rig.start(client);
    rig.server.receive(client, &message(op::READ, 0xdead_beef, tx, b"/\0"));
    rig.server.receive(client, &message(op::READ, 0, tx, b"/x\0"));
    let expected = [
        Message { op: op::READ, req_id: 0xdead_beef, tx_id: tx, payload: vec![] },
        Message { op: op::ERROR, req_id: 0, tx_id: tx, payload: b"ENOENT\0".to_vec() },
    ];
    assert_eq!(rig.messages(client), expected);
}

#[test]
fn request_without_payload_is_answered_at_once() {
    let mut rig = Rig::new();
    let client = rig.socket();
    rig.server.receive(client, &message(op::TRANSACTION_START, 1, 0, b""));
    assert_eq!(rig.messages(client).len(), 1);
}

fn fill(rig: &mut Rig, client: ClientId, request: &[u8]) -> usize {
    let mut count = 0;
    while rig.server.wants_input(client) {
        rig.server.receive(client, request);
        count += 1;
        assert!(count < 100_000, "a client that does not read must be stopped");
    }
    count
}

#[test]
fn client_that_does_not_read_is_not_served_until_it_does() {
    let mut rig = Rig::new();
    let client = rig.socket();
    rig.write(client, 0, "/big", &"x".repeat(4000)).unwrap();
    let request = message(op::READ, 1, 0, b"/big\0");
    let count = fill(&mut rig, client, &request);
    rig.server.receive(client, &request);
    assert_eq!(parse(rig.server.output(client)).len(), count);
    rig.server.sent(client, 4016);
    assert_eq!(rig.messages(client).len(), count, "what had waited is answered");
    assert!(rig.server.wants_input(client));
}

#[test]
fn domain_may_leave_as_many_replies_unread_as_its_quota_says() {
    let mut rig = Rig::new();
    let client = rig.guest(1);
    rig.quota(1, Quota::Outstanding, 5);
    let request = message(op::GET_DOMAIN_PATH, 1, 0, b"1\0");
    assert_eq!(fill(&mut rig, client, &request), 5);
    // Half a reply read is not a reply read.
    rig.server.sent(client, 20);
    assert!(!rig.server.wants_input(client));
    rig.server.sent(client, 20);
    assert_eq!(fill(&mut rig, client, &request), 1);
}

#[test]
fn pipelined_requests_in_one_piece_stop_at_the_same_bound() {
    let mut rig = Rig::new();
    let client = rig.guest(1);
    let requests = message(op::GET_DOMAIN_PATH, 1, 0, b"1\0").repeat(50);
    rig.server.receive(client, &requests);
    assert_eq!(parse(rig.server.output(client)).len(), 20);
    assert_eq!(rig.messages(client).len(), 50, "each reply read lets the next request be done");
}

#[test]
fn active_connections_are_those_that_something_became_of() {
    let mut rig = Rig::new();
    let (one, two, three) = (rig.socket(), rig.socket(), rig.socket());
    rig.watch(two, "/a", "t");
    rig.server.take_active();
    rig.server.receive(one, &message(op::WRITE, 1, 0, b"/a\0x"));
    let mut active = rig.server.take_active();
    active.sort_unstable();
    assert_eq!(active, [one, two]);
    assert!(!rig.server.has_active());
    rig.server.receive(three, &message(op::WRITE, 1, 0, b"/a\0x")[..10]);
    assert_eq!(rig.server.take_active(), []);
}

#[test]
fn reconnection_forgets_what_was_half_done() {
    let mut rig = Rig::new();
    let (host, guest) = (rig.socket(), rig.guest(1));
    rig.watch(guest, "x", "t");
    let tx = rig.start(guest);
    rig.server.receive(guest, &message(op::READ, 1, 0, b"x\0"));
    rig.server.receive(guest, &message(op::READ, 1, 0, b"x\0")[..9]);
    rig.server.reconnect(guest);
    assert_eq!(rig.server.output(guest), b"");
    rig.write(host, 0, "/local/domain/1/x", "").unwrap();
    assert_eq!(rig.commit(guest, tx), Err("ENOENT".into()));
    assert_eq!(rig.heard(guest), [""; 0]);
    assert_eq!(rig.server.ring(DomId(1)), Some(guest));
}
