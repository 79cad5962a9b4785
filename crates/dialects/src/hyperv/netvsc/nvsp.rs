//! NVSP messages as bytes and as what they mean.

use abi::hyperv::netvsc::{
    IndirectionTable, Init, InitComplete, MAX_MDL_CHAIN_LENGTH, MESSAGE_SIZE, NO_SECTION, NdisConfig, OLD_MESSAGE_SIZE, RndisPacket,
    SEND_TABLE_ENTRIES, SendBuffer, Subchannel, kind, status, version,
};
use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Versions that are known, newest first.
const VERSIONS: [u32; 6] = [version::V61, version::V6, version::V5, version::V4, version::V2, version::V1];

/// What the guest says.
#[derive(Debug, Clone, Copy)]
pub(super) enum Message {
    /// Versions that it knows: oldest and newest.
    Init(u32, u32),
    /// Longest frame.
    Config(u32),
    /// A buffer to receive into.
    ReceiveBuffer(SendBuffer),
    /// It is the guest's again.
    RevokeReceiveBuffer,
    /// A buffer to send from.
    SendBuffer(SendBuffer),
    /// It is the guest's again.
    RevokeSendBuffer,
    /// RNDIS messages.
    Rndis(RndisPacket),
    /// So many channels besides the first.
    Subchannels(u32),
    /// Something that there is nothing to be done for.
    Other,
}

impl Message {
    /// Reads a message; `None` when it is cut short.
    pub fn parse(payload: &[u8]) -> Option<Message> {
        let (kind, body) = payload.split_first_chunk()?;
        Some(match u32::from_le_bytes(*kind) {
            kind::INIT => {
                let init = read::<Init>(body)?;
                Message::Init(init.min_version.get(), init.max_version.get())
            }
            kind::SEND_NDIS_CONFIG => Message::Config(read::<NdisConfig>(body)?.mtu.get()),
            kind::SEND_RECEIVE_BUFFER => Message::ReceiveBuffer(read(body)?),
            kind::REVOKE_RECEIVE_BUFFER => Message::RevokeReceiveBuffer,
            kind::SEND_SEND_BUFFER => Message::SendBuffer(read(body)?),
            kind::REVOKE_SEND_BUFFER => Message::RevokeSendBuffer,
            kind::SEND_RNDIS_PACKET => Message::Rndis(read(body)?),
            kind::SUBCHANNEL => Message::Subchannels(read::<Subchannel>(body)?.count.get()),
            _ => Message::Other,
        })
    }
}

fn read<T: FromBytes>(body: &[u8]) -> Option<T> {
    T::read_from_prefix(body).map(|(value, _)| value).ok()
}

/// The newest version that both know.
pub(super) fn choose(oldest: u32, newest: u32) -> Option<u32> {
    VERSIONS.into_iter().find(|version| (oldest..=newest).contains(version))
}

/// A message of ours, in a unit of the version's size.
pub(super) fn message(version: Option<u32>, kind: u32, body: &(impl IntoBytes + Immutable)) -> Vec<u8> {
    let size = if version.is_none_or(|version| version >= version::V61) { MESSAGE_SIZE } else { OLD_MESSAGE_SIZE };
    let mut message = [&kind.to_le_bytes(), body.as_bytes()].concat();
    message.resize(size, 0);
    message
}

/// The answer to [`Message::Init`].
pub(super) fn init_complete(version: Option<u32>) -> Vec<u8> {
    let status = if version.is_some() { status::SUCCESS } else { 0 };
    let negotiated = if version == Some(version::V1) { version::V1 } else { u32::MAX };
    let answer =
        InitComplete { negotiated_version: negotiated.into(), max_mdl_chain_length: MAX_MDL_CHAIN_LENGTH.into(), status: status.into() };
    message(version, kind::INIT_COMPLETE, &answer)
}

/// The answer where only that there is one matters. OpenBSD waits for one to its configuration, and takes it by this type.
pub(super) fn acknowledged(version: Option<u32>) -> Vec<u8> {
    message(version, kind::INIT_COMPLETE, &[U32::ZERO; 3])
}

/// The answer to [`Message::Rndis`].
pub(super) fn taken(version: Option<u32>, status: u32) -> Vec<u8> {
    message(version, kind::SEND_RNDIS_PACKET_COMPLETE, &U32::new(status))
}

/// Tells the guest to send on so many channels in turns. The table lies behind the message's unit, where Linux looks for it whatever the offset says.
pub(super) fn send_table(version: Option<u32>, channels: u32) -> Vec<u8> {
    let table = |offset: usize| IndirectionTable { count: SEND_TABLE_ENTRIES.into(), offset: (offset as u32).into() };
    let unit = message(version, kind::SEND_INDIRECTION_TABLE, &table(0)).len();
    let mut message = message(version, kind::SEND_INDIRECTION_TABLE, &table(unit));
    message.extend((0..SEND_TABLE_ENTRIES).flat_map(|entry| (entry % channels.max(1)).to_le_bytes()));
    message
}

/// RNDIS messages for the guest.
pub(super) fn rndis(version: Option<u32>, channel: u32) -> Vec<u8> {
    let packet = RndisPacket { channel: channel.into(), section_index: NO_SECTION.into(), section_size: 0.into() };
    message(version, kind::SEND_RNDIS_PACKET, &packet)
}
