//! How a controller and its driver begin, and what they say besides SCSI commands.
//!
//! ```text
//!   New --BEGIN--> Begun --QUERY_VERSION, until one is known--> Agreed --QUERY_PROPERTIES, END--> Ready --CREATE_SUB_CHANNELS, EXECUTE_SRB ...
//! ```

use abi::hyperv::storvsc::{BODY_SIZE, MULTI_CHANNEL, PACKET_SIZE, Packet, Properties, Version, operation, status, version};
use zerocopy::{FromBytes, IntoBytes};

/// Most channels besides the first.
pub(super) const MAX_SUBCHANNELS: u16 = 4;
/// Most bytes of one request. A multiple of a page; what Linux' block layer asks for at once is limited by it.
pub(super) const MAX_TRANSFER: u32 = 1 << 20;

/// How far they are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum State {
    /// Nothing was said yet.
    #[default]
    New,
    /// The guest has begun.
    Begun,
    /// Both know the version.
    Agreed,
    /// Commands are done.
    Ready,
}

/// What a packet asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wish {
    /// Nothing but this answer, an `NTSTATUS`.
    Answer(u32),
    /// An answer, and this many channels besides the first.
    Subchannels(u16),
    /// A SCSI command.
    Command,
}

impl State {
    /// Takes a packet, which becomes its own answer as far as that is more than a status.
    pub fn on(&mut self, packet: &mut Packet) -> Wish {
        let done = match (packet.operation.get(), *self) {
            (operation::BEGIN_INITIALIZATION, _) => {
                *self = State::Begun;
                status::SUCCESS
            }
            (operation::QUERY_PROTOCOL_VERSION, State::Begun | State::Agreed) => {
                let known = Version::read_from_prefix(&packet.body).is_ok_and(|(asked, _)| version::ALL.contains(&asked.major_minor.get()));
                if known {
                    *self = State::Agreed;
                    status::SUCCESS
                } else {
                    status::REVISION_MISMATCH
                }
            }
            (operation::QUERY_PROPERTIES, State::Agreed) => {
                let properties = Properties {
                    max_subchannels: MAX_SUBCHANNELS.into(),
                    flags: MULTI_CHANNEL.into(),
                    max_transfer_bytes: MAX_TRANSFER.into(),
                    ..Properties::default()
                };
                packet.body.fill(0);
                // It is shorter than the body.
                let _ = properties.write_to_prefix(&mut packet.body);
                status::SUCCESS
            }
            (operation::END_INITIALIZATION, State::Agreed) => {
                *self = State::Ready;
                status::SUCCESS
            }
            (operation::CREATE_SUB_CHANNELS, State::Ready) => {
                let [low, high, ..] = packet.body;
                match u16::from_le_bytes([low, high]) {
                    count @ 1..=MAX_SUBCHANNELS => return Wish::Subchannels(count),
                    _ => status::INVALID_PARAMETER,
                }
            }
            (operation::EXECUTE_SRB, State::Ready) => return Wish::Command,
            // Commands are done one after another, so that there is nothing to be given up.
            (operation::RESET_LUN | operation::RESET_ADAPTER | operation::RESET_BUS, State::Ready) => status::SUCCESS,
            (
                operation::QUERY_PROTOCOL_VERSION
                | operation::QUERY_PROPERTIES
                | operation::END_INITIALIZATION
                | operation::CREATE_SUB_CHANNELS
                | operation::EXECUTE_SRB
                | operation::RESET_LUN
                | operation::RESET_ADAPTER
                | operation::RESET_BUS,
                _,
            ) => status::INVALID_DEVICE_STATE,
            _ => status::INVALID_DEVICE_REQUEST,
        };
        Wish::Answer(done)
    }
}

/// A packet of the guest; those of old versions, and those without a body, are shorter than a whole one.
pub(super) fn parse(payload: &[u8]) -> Option<Packet> {
    let mut bytes = [0; PACKET_SIZE];
    let given = payload.get(..PACKET_SIZE).unwrap_or(payload);
    bytes.get_mut(..given.len())?.copy_from_slice(given);
    (given.len() >= PACKET_SIZE - BODY_SIZE).then(|| zerocopy::transmute!(bytes))
}
