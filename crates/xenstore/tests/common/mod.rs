//! Clients on the wire of a server in the same process, each of which sends and reads everything at once unless a test says otherwise.
#![allow(dead_code, clippy::unwrap_used, reason = "for tests, each of which uses its own part")]

use abi::xen::xenstore::{HEADER_SIZE, Header, op};
use xenstore::{ClientId, Config, DomId, Host, NoHost, Quota, Ring, Server, Store};
use zerocopy::{FromBytes, IntoBytes};

/// A message from the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    pub op: u32,
    pub req_id: u32,
    pub tx_id: u32,
    pub payload: Vec<u8>,
}

/// What a request was answered with: the payload, or the error's name.
pub type Answer = Result<Vec<u8>, String>;

/// A server, and what its clients heard of their watches.
pub struct Rig {
    pub server: Server,
    pub events: Vec<(ClientId, String, String)>,
}

impl Rig {
    pub fn new() -> Rig {
        Rig::with_host(Box::new(NoHost))
    }

    pub fn with_host(host: Box<dyn Host>) -> Rig {
        Rig { server: Server::new(Store::new(Config::default()), host), events: Vec::new() }
    }

    pub fn of(server: Server) -> Rig {
        Rig { server, events: Vec::new() }
    }

    /// A connection of the host's.
    pub fn socket(&mut self) -> ClientId {
        self.server.connect(DomId::HOST, true)
    }

    /// An introduced domain with a home of its own.
    pub fn guest(&mut self, domain: u16) -> ClientId {
        let host = self.socket();
        let home = format!("/local/domain/{domain}");
        self.ok(host, op::MKDIR, 0, &[&home, ""]);
        self.ok(host, op::SET_PERMS, 0, &[&home, &format!("n{domain}"), ""]);
        self.server.disconnect(host);
        self.server.introduce(DomId(domain), Ring { gfn: 1, port: 1 }).unwrap()
    }

    pub fn quota(&mut self, domain: u16, quota: Quota, limit: u32) {
        self.server.store().set_quota(Some(DomId(domain)), quota, limit);
    }

    /// Takes all that waits for a client.
    pub fn messages(&mut self, client: ClientId) -> Vec<Message> {
        let mut messages = Vec::new();
        loop {
            let bytes = self.server.output(client).to_vec();
            if bytes.is_empty() {
                return messages;
            }
            self.server.sent(client, bytes.len());
            messages.append(&mut parse(&bytes));
        }
    }

    /// Notes the events that wait for a client, and gives back the replies.
    pub fn replies(&mut self, client: ClientId) -> Vec<Message> {
        let messages = self.messages(client);
        let (events, replies): (Vec<_>, Vec<_>) = messages.into_iter().partition(|message| message.op == op::WATCH_EVENT);
        for event in events {
            let text = String::from_utf8(event.payload).unwrap();
            let [path, token, ""] = text.split('\0').collect::<Vec<_>>()[..] else { panic!("event {text:?}") };
            assert_eq!((event.req_id, event.tx_id), (0, 0));
            self.events.push((client, path.to_owned(), token.to_owned()));
        }
        replies
    }

    /// A request whose strings are joined by zero bytes.
    pub fn call(&mut self, client: ClientId, op: u32, tx: u32, strings: &[&str]) -> Answer {
        self.call_bytes(client, op, tx, strings.join("\0").as_bytes())
    }

    pub fn call_bytes(&mut self, client: ClientId, op: u32, tx: u32, payload: &[u8]) -> Answer {
        self.server.receive(client, &message(op, 77, tx, payload));
        let mut replies = self.replies(client);
        let reply = replies.pop().expect("a reply");
        assert!(replies.is_empty(), "more than one reply");
        assert_eq!((reply.req_id, reply.tx_id), (77, tx));
        answer(op, reply)
    }

    /// A request that succeeds, and its reply as text.
    pub fn ok(&mut self, client: ClientId, op: u32, tx: u32, strings: &[&str]) -> String {
        String::from_utf8(self.call(client, op, tx, strings).unwrap()).unwrap()
    }

    /// A request that fails, and the error's name.
    pub fn error(&mut self, client: ClientId, op: u32, tx: u32, strings: &[&str]) -> String {
        self.call(client, op, tx, strings).unwrap_err()
    }

    pub fn write(&mut self, client: ClientId, tx: u32, path: &str, value: &str) -> Answer {
        self.call(client, op::WRITE, tx, &[path, value])
    }

    pub fn read(&mut self, client: ClientId, tx: u32, path: &str) -> Answer {
        self.call(client, op::READ, tx, &[path, ""])
    }

    pub fn start(&mut self, client: ClientId) -> u32 {
        self.ok(client, op::TRANSACTION_START, 0, &["", ""]).trim_end_matches('\0').parse().unwrap()
    }

    pub fn commit(&mut self, client: ClientId, tx: u32) -> Answer {
        self.call(client, op::TRANSACTION_END, tx, &["T", ""])
    }

    /// Watches, and drops the initial event.
    pub fn watch(&mut self, client: ClientId, path: &str, token: &str) {
        self.ok(client, op::WATCH, 0, &[path, token, ""]);
        self.events.pop().expect("an initial event");
    }

    /// Paths of the events that a client heard of since the last call.
    pub fn heard(&mut self, client: ClientId) -> Vec<String> {
        let leftover = self.replies(client);
        assert_eq!(leftover, []);
        let (own, others) = std::mem::take(&mut self.events).into_iter().partition(|(whose, ..)| *whose == client);
        self.events = others;
        let own: Vec<_> = own;
        own.into_iter().map(|(_, path, _)| path).collect()
    }

    /// Asserts that nothing is left of a domain, and that the accounts are right.
    pub fn assert_nothing_left(&mut self, domain: u16) {
        assert_eq!(self.server.store().usage(DomId(domain)), xenstore::Usage::default());
        assert_eq!(self.server.store().open_counts(DomId(domain)), (0, 0));
        assert!(self.server.store().is_consistent());
    }
}

pub fn answer(op: u32, reply: Message) -> Answer {
    if reply.op == op::ERROR {
        return Err(String::from_utf8(reply.payload).unwrap().trim_end_matches('\0').to_owned());
    }
    assert_eq!(reply.op, op);
    Ok(reply.payload)
}

pub fn message(op: u32, req_id: u32, tx_id: u32, payload: &[u8]) -> Vec<u8> {
    let len = u32::try_from(payload.len()).unwrap();
    let header = Header { op: op.into(), req_id: req_id.into(), tx_id: tx_id.into(), len: len.into() };
    [header.as_bytes(), payload].concat()
}

/// Whole messages of a stream of bytes.
pub fn parse(mut bytes: &[u8]) -> Vec<Message> {
    let mut messages = Vec::new();
    while !bytes.is_empty() {
        let header = Header::read_from_bytes(&bytes[..HEADER_SIZE]).unwrap();
        let (payload, rest) = bytes[HEADER_SIZE..].split_at(header.len.get() as usize);
        assert!(payload.len() <= 4096);
        messages.push(Message { op: header.op.get(), req_id: header.req_id.get(), tx_id: header.tx_id.get(), payload: payload.to_vec() });
        bytes = rest;
    }
    messages
}
