//! A host that the test is: it lets the guest find together with it and open one device's channel, and then says what the test likes.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use abi::hyperv::hypercall::Status;
use abi::hyperv::ic::{self, Pipe, Version};
use abi::hyperv::ring::{CONTROL_BYTES, Descriptor, control};
use abi::hyperv::vmbus::{
    GpadlCreated, GpadlHeader, GpadlTeardown, GpadlTorndown, Guid, Header, InitiateContact, MESSAGE_CONNECTION_5, MESSAGE_TYPE, Offer,
    Open, OpenResult, SINT, USER_BYTES, VersionResponse, message, version,
};
use dialects::hyperv::Hyperv;
use dialects::hyperv::connections::{Connections, Synic};
use vm_memory::{Bytes, GuestAddress};
use vmm::GuestMemory;
use zerocopy::{FromBytes, IntoBytes};

use super::{Rig, VP};

/// The channel's number.
pub const RELID: u32 = 5;

/// The host.
pub struct Liar {
    memory: GuestMemory,
    hyperv: Arc<Hyperv>,
    class: Guid,
    /// Newest version that it speaks.
    newest: AtomicU32,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// First page and number of pages of each GPADL.
    gpadls: HashMap<u32, (u64, u64)>,
    /// GPADL of the rings, when they are open.
    rings: Option<u32>,
    /// Kinds of messages that the guest sent.
    heard: Vec<u32>,
    /// Where the host goes on in both rings.
    read: u64,
    written: u64,
}

impl Rig {
    /// A machine whose host offers one device, and lies.
    pub fn with_liar(class: Guid) -> (Rig, Arc<Liar>) {
        let rig = Rig::silent();
        let liar = Arc::new(Liar {
            memory: rig.machine.memory.clone(),
            hyperv: Arc::clone(&rig.hyperv),
            class,
            newest: AtomicU32::new(u32::MAX),
            state: Mutex::default(),
        });
        rig.hyperv.serve(liar.clone());
        (rig, liar)
    }
}

impl Liar {
    /// Speaks no newer version than this; before 5.0 there is no connection for the others' first message.
    pub fn set_newest(&self, version: u32) {
        self.newest.store(version, Ordering::Relaxed);
    }

    /// Sends a message.
    pub fn say(&self, message: &[u8]) {
        assert!(self.hyperv.post_message(VP, SINT, MESSAGE_TYPE, message), "the guest takes messages");
    }

    pub fn offer(&self, relid: u32) -> Offer {
        Offer {
            header: Header::new(message::OFFER),
            class: self.class,
            instance: Guid::from_u128(relid.into()),
            reserved: [0.into(); 2],
            flags: 0.into(),
            mmio_megabytes: 0.into(),
            user_defined: [0; USER_BYTES],
            sub_channel_index: 0.into(),
            reserved2: 0.into(),
            relid: relid.into(),
            monitor_id: 0,
            monitor_allocated: 0,
            is_dedicated_interrupt: 1.into(),
            connection_id: 0x2000.into(),
        }
    }

    /// Whether the guest has sent a message of this kind.
    pub fn has_heard(&self, kind: u32) -> bool {
        self.state.lock().unwrap().heard.contains(&kind)
    }

    /// GPADL and address of the memory that was shared last, of so many pages.
    pub fn shared(&self, pages: u64) -> (u32, u64) {
        let state = self.state.lock().unwrap();
        let (number, (first, _)) = state.gpadls.iter().find(|(_, (_, count))| *count == pages).expect("memory of this size");
        (*number, first * CONTROL_BYTES)
    }

    /// Addresses of the rings, to the host and to the guest, and bytes of data in each.
    pub fn rings(&self) -> (u64, u64, u64) {
        let state = self.state.lock().unwrap();
        let (first, pages) = state.gpadls[&state.rings.expect("an open channel")];
        let half = pages / 2 * CONTROL_BYTES;
        (first * CONTROL_BYTES, first * CONTROL_BYTES + half, half - CONTROL_BYTES)
    }

    /// Writes a word of the control page of the ring to the guest, or to the host.
    pub fn set_to_guest(&self, which: u64, value: u32) {
        self.memory.write_obj(value, GuestAddress(self.rings().1 + which)).unwrap();
    }

    pub fn set_to_host(&self, which: u64, value: u32) {
        self.memory.write_obj(value, GuestAddress(self.rings().0 + which)).unwrap();
    }

    /// Puts a packet into the ring to the guest: kind, transaction, what is before the payload, and the payload.
    pub fn put(&self, kind: u16, transaction: u64, head: &[u8], payload: &[u8]) {
        let head_bytes = size_of::<Descriptor>() + head.len();
        let mut packet = Vec::new();
        let total = (head_bytes + payload.len()).next_multiple_of(8);
        self.put_raw(&{
            let descriptor = Descriptor {
                kind: kind.into(),
                data_offset8: (head_bytes as u16 / 8).into(),
                total_length8: (total as u16 / 8).into(),
                flags: 1.into(),
                transaction: transaction.into(),
            };
            packet.extend_from_slice(descriptor.as_bytes());
            packet.extend_from_slice(head);
            packet.extend_from_slice(payload);
            packet.resize(total + 8, 0);
            packet
        });
    }

    /// Puts bytes into the ring to the guest.
    pub fn put_raw(&self, bytes: &[u8]) {
        let (_, base, size) = self.rings();
        let mut state = self.state.lock().unwrap();
        for byte in bytes {
            self.memory.write_obj(*byte, GuestAddress(base + CONTROL_BYTES + state.written)).unwrap();
            state.written = (state.written + 1) % size;
        }
        self.memory.write_obj(state.written as u32, GuestAddress(base + control::WRITE_INDEX)).unwrap();
        self.hyperv.signal_event(VP, SINT, RELID as u16);
    }

    /// Takes the guest's next packet: transaction and payload.
    pub fn take(&self) -> Option<(u64, Vec<u8>)> {
        let (base, _, size) = self.rings();
        let mut state = self.state.lock().unwrap();
        let written: u32 = self.memory.read_obj(GuestAddress(base + control::WRITE_INDEX)).unwrap();
        if u64::from(written) == state.read {
            return None;
        }
        let byte = |at: u64| self.memory.read_obj::<u8>(GuestAddress(base + CONTROL_BYTES + at % size)).unwrap();
        let begin: Vec<u8> = (0..16).map(|at| byte(state.read + at)).collect();
        let descriptor = Descriptor::read_from_bytes(&begin).unwrap();
        let total = u64::from(descriptor.total_length8.get()) * 8;
        let payload = (u64::from(descriptor.data_offset8.get()) * 8..total).map(|at| byte(state.read + at)).collect();
        state.read = (state.read + total + 8) % size;
        self.memory.write_obj(state.read as u32, GuestAddress(base + control::READ_INDEX)).unwrap();
        Some((descriptor.transaction.get(), payload))
    }

    fn hear(&self, bytes: &[u8]) {
        let (header, _) = Header::read_from_prefix(bytes).unwrap();
        self.state.lock().unwrap().heard.push(header.kind.get());
        match header.kind.get() {
            message::INITIATE_CONTACT => self.say(
                VersionResponse {
                    header: Header::new(message::VERSION_RESPONSE),
                    supported: (InitiateContact::read_from_prefix(bytes).unwrap().0.version.get() <= self.newest.load(Ordering::Relaxed))
                        .into(),
                    connection_state: 0,
                    padding: 0.into(),
                    message_connection: 7.into(),
                }
                .as_bytes(),
            ),
            message::REQUEST_OFFERS => {
                self.say(self.offer(RELID).as_bytes());
                self.say(Header::new(message::ALL_OFFERS_DELIVERED).as_bytes());
            }
            message::GPADL_HEADER => {
                let (gpadl, rest) = GpadlHeader::read_from_prefix(bytes).unwrap();
                let first = u64::from_le_bytes(*rest.first_chunk().unwrap());
                let pages = u64::from(gpadl.byte_count.get()) / CONTROL_BYTES;
                self.state.lock().unwrap().gpadls.insert(gpadl.gpadl.get(), (first, pages));
                let header = Header::new(message::GPADL_CREATED);
                self.say(GpadlCreated { header, relid: gpadl.relid, gpadl: gpadl.gpadl, status: 0.into() }.as_bytes());
            }
            message::OPEN => {
                let (open, _) = Open::read_from_prefix(bytes).unwrap();
                self.state.lock().unwrap().rings = Some(open.ring_gpadl.get());
                let header = Header::new(message::OPEN_RESULT);
                self.say(OpenResult { header, relid: open.relid, open_id: open.open_id, status: 0.into() }.as_bytes());
            }
            message::GPADL_TEARDOWN => {
                let (gpadl, _) = GpadlTeardown::read_from_prefix(bytes).unwrap();
                self.say(GpadlTorndown { header: Header::new(message::GPADL_TORNDOWN), gpadl: gpadl.gpadl }.as_bytes());
            }
            message::UNLOAD => self.say(Header::new(message::UNLOAD_RESPONSE).as_bytes()),
            _ => {}
        }
    }
}

impl Connections for Liar {
    fn post_message(&self, connection: u32, _kind: u32, payload: &[u8]) -> Status {
        if connection == MESSAGE_CONNECTION_5 && self.newest.load(Ordering::Relaxed) < version::WIN10_V5 {
            return Status::INVALID_CONNECTION_ID;
        }
        self.hear(payload);
        Status::SUCCESS
    }
    fn signal_event(&self, _connection: u32, _flag: u16) -> Status {
        Status::SUCCESS
    }
    fn reset(&self) {}
}

/// A packet of a component.
pub fn packet(kind: u16, body: &[u8]) -> Vec<u8> {
    let message = ic::Message {
        framework: Version::new(3, 0),
        kind: kind.into(),
        version: Version::new(4, 0),
        size: (body.len() as u16).into(),
        status: 0.into(),
        transaction: 1,
        flags: ic::flags::TRANSACTION | ic::flags::REQUEST,
        reserved: 0.into(),
    };
    let pipe = Pipe { flags: ic::PIPE_DATA.into(), length: ((size_of::<ic::Message>() + body.len()) as u32).into() };
    [pipe.as_bytes(), message.as_bytes(), body].concat()
}

/// The status of an answer.
pub fn status(answer: &[u8]) -> u32 {
    ic::Message::read_from_prefix(&answer[size_of::<Pipe>()..]).unwrap().0.status.get()
}
