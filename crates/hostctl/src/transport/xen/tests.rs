//! Watches, with a scripted host.

use alloc::collections::VecDeque;
use alloc::string::String;
use alloc::vec::Vec;

use abi::xen::xenstore::{Header, OK, op};
use zerocopy::IntoBytes;

use super::*;

/// Says what the script says.
struct Script(VecDeque<u8>);

impl Peer for Script {
    fn deadline(&self) -> Nanos {
        0
    }

    fn is_numbered(&self) -> bool {
        false
    }

    fn send(&mut self, _: &[u8], _: Nanos) -> Result<(), StoreError> {
        Ok(())
    }

    fn receive(&mut self, buffer: &mut [u8], _: Option<Nanos>) -> Result<usize, StoreError> {
        let count = buffer.len().min(self.0.len());
        for (to, from) in buffer.iter_mut().zip(self.0.drain(..count)) {
            *to = from;
        }
        if count == 0 { Err(StoreError::Timeout) } else { Ok(count) }
    }
}

fn message(op: u32, payload: &[u8]) -> Vec<u8> {
    let header = Header { op: op.into(), req_id: 0.into(), tx_id: 0.into(), len: (payload.len() as u32).into() };
    [header.as_bytes(), payload].concat()
}

fn whole(messages: &[Vec<u8>]) -> Client<Script> {
    Client::new(Script(messages.concat().into()), 0)
}

#[test]
fn watch_without_its_beginning_is_a_timeout() {
    assert_eq!(whole(&[message(op::WATCH, OK)]).subscribe(b"k"), Err(StoreError::Timeout));
}

#[test]
fn watch_tells_changes_and_not_its_own_beginning() {
    let event = |path: &str| message(op::WATCH_EVENT, format!("{path}\0hostctl\0").as_bytes());
    // The event of the beginning may come before the answer, and those of other watches in between.
    for order in [[event("k"), event("other"), message(op::WATCH, OK)], [message(op::WATCH, OK), event("other"), event("k")]] {
        let mut store = whole(&[order.concat(), event("k/a"), event("k")]);
        store.subscribe(b"k").unwrap();
        let mut seen = Vec::new();
        while let Event::Changed(path) = store.wait(Some(time::now())).unwrap() {
            seen.push(String::from_utf8(path).unwrap());
        }
        assert_eq!(seen, ["other", "k/a", "k"]);
    }
}
