//! RNDIS messages, made and taken apart ([`abi::hyperv::rndis`]). Offsets in them are the host's and count from behind the header; whatever is not inside of
//! the message is not there.

use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

use abi::hyperv::rndis::{HEADER_SIZE, Header, PACKET_INFO_SIZE, Packet, PacketInfo, Query, QueryComplete, checksum, info, message};
use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

use crate::hal::{Dma, HalError};
use crate::net::checksum::place;
use crate::net::{Checksum, ETHERNET_HEADER};

/// Most facts of a packet that are looked at.
const FACTS: usize = 16;
/// Where the offset of the transport header is in a checksum fact.
const TRANSPORT_SHIFT: u32 = 16;

/// A message of some kind, with a structure and bytes behind it.
pub(super) fn make(kind: u32, body: &(impl IntoBytes + Immutable + ?Sized), rest: &[&[u8]]) -> Vec<u8> {
    let rest = rest.concat();
    let length = bytes(HEADER_SIZE + size_of_val(body) + rest.len());
    [Header { kind: kind.into(), length }.as_bytes(), body.as_bytes(), &rest].concat()
}

/// Asks for an object, or sets it, whose value is, or is filled into, `value`.
pub(super) fn query(kind: u32, request_id: u32, oid: u32, value: &[u8]) -> Vec<u8> {
    let query = Query {
        request_id: request_id.into(),
        oid: oid.into(),
        length: bytes(value.len()),
        offset: bytes(size_of::<Query>()),
        vc_handle: 0.into(),
    };
    make(kind, &query, &[value])
}

/// A frame, with the fact of its blank checksum if that is known to the host.
pub(super) fn packet(frame: &[u8], blank: Option<u32>) -> Vec<u8> {
    let fact = blank.map(|word| {
        let head =
            PacketInfo { size: bytes(PACKET_INFO_SIZE + size_of::<U32>()), kind: info::CHECKSUM.into(), offset: bytes(PACKET_INFO_SIZE) };
        [head.as_bytes(), &word.to_le_bytes()].concat()
    });
    let fact = fact.unwrap_or_default();
    let head = Packet {
        data_offset: bytes(size_of::<Packet>() + fact.len()),
        data_length: bytes(frame.len()),
        info_offset: if fact.is_empty() { 0.into() } else { bytes(size_of::<Packet>()) },
        info_length: bytes(fact.len()),
        ..Packet::default()
    };
    make(message::PACKET, &head, &[&fact, frame])
}

/// A number of bytes; messages have a page at most.
fn bytes(count: usize) -> U32 {
    U32::new(u32::try_from(count).unwrap_or(u32::MAX))
}

/// What the host has to know to complete the blank checksum of a frame; `None` for one that it cannot.
pub(super) fn blank_checksum(frame: &[u8]) -> Option<u32> {
    let (transport, offset, _) = place(frame)?;
    let ip = match frame.get(ETHERNET_HEADER - 2..ETHERNET_HEADER)? {
        [0x08, 0x00] => checksum::IPV4,
        [0x86, 0xdd] => checksum::IPV6,
        _ => return None,
    };
    let protocol = if offset == crate::net::checksum::TCP_CHECKSUM { checksum::TCP } else { checksum::UDP };
    Some(ip | protocol | u32::try_from(transport).ok()? << TRANSPORT_SHIFT)
}

/// A message of the host's in memory that it has, too.
pub(super) struct Message<'a> {
    memory: &'a Dma,
    /// Where it is, header and all.
    place: Range<usize>,
    kind: u32,
}

impl<'a> Message<'a> {
    /// The message at the beginning of `place`, which is inside of the memory; `None` when it is longer than that.
    pub fn read(memory: &'a Dma, place: Range<usize>) -> Result<Option<Message<'a>>, HalError> {
        if place.len() < HEADER_SIZE {
            return Ok(None);
        }
        let mut header = Header::new_zeroed();
        memory.read(place.start, header.as_mut_bytes())?;
        let length = usize::try_from(header.length.get()).unwrap_or(usize::MAX);
        if !(HEADER_SIZE..=place.len()).contains(&length) {
            return Ok(None);
        }
        Ok(Some(Message { memory, place: place.start..place.start + length, kind: header.kind.get() }))
    }

    /// One of [`message`].
    pub const fn kind(&self) -> u32 {
        self.kind
    }

    /// The structure behind the header, if it is there as a whole.
    pub fn body<T: FromBytes + FromZeros + IntoBytes>(&self) -> Result<Option<T>, HalError> {
        let mut body = T::new_zeroed();
        let Some(place) = self.piece(0, size_of::<T>()) else { return Ok(None) };
        self.memory.read(place.start, body.as_mut_bytes())?;
        Ok(Some(body))
    }

    /// The value in an answer to a query.
    pub fn value(&self, answer: &QueryComplete) -> Result<Option<Vec<u8>>, HalError> {
        let Some(place) = self.named(answer.offset, answer.length) else { return Ok(None) };
        let mut value = vec![0; place.len()];
        self.memory.read(place.start, &mut value)?;
        Ok(Some(value))
    }

    /// Copies a packet's frame to the beginning of `buffer`: its length and what is known of its checksum. `None` for no packet, and for a frame that is
    /// too short, or longer than the buffer.
    pub fn frame(&self, buffer: &mut [u8]) -> Result<Option<(usize, Checksum)>, HalError> {
        let Some(packet) = self.body::<Packet>()?.filter(|_| self.kind == message::PACKET) else { return Ok(None) };
        let Some(place) = self.named(packet.data_offset, packet.data_length) else { return Ok(None) };
        let Some(to) = buffer.get_mut(..place.len()).filter(|to| to.len() >= ETHERNET_HEADER) else { return Ok(None) };
        self.memory.read(place.start, to)?;
        let right = checksum::TCP_SUCCEEDED | checksum::UDP_SUCCEEDED;
        let is_right = self.checksum(&packet)?.is_some_and(|word| word & right != 0);
        Ok(Some((place.len(), if is_right { Checksum::Verified } else { Checksum::Complete })))
    }

    /// The fact about the checksum.
    fn checksum(&self, packet: &Packet) -> Result<Option<u32>, HalError> {
        let Some(mut facts) = self.named(packet.info_offset, packet.info_length) else { return Ok(None) };
        for _ in 0..FACTS {
            if facts.len() < PACKET_INFO_SIZE {
                break;
            }
            let mut fact = PacketInfo::new_zeroed();
            self.memory.read(facts.start, fact.as_mut_bytes())?;
            let size = usize::try_from(fact.size.get()).unwrap_or(usize::MAX);
            let offset = usize::try_from(fact.offset.get()).unwrap_or(usize::MAX);
            if !(PACKET_INFO_SIZE..=facts.len()).contains(&size) {
                break;
            }
            if fact.kind.get() == info::CHECKSUM && offset.checked_add(4).is_some_and(|end| end <= size) {
                let mut word = U32::new(0);
                self.memory.read(facts.start + offset, word.as_mut_bytes())?;
                return Ok(Some(word.get()));
            }
            facts.start += size;
        }
        Ok(None)
    }

    /// What an offset and a length of the host's name.
    fn named(&self, offset: U32, length: U32) -> Option<Range<usize>> {
        self.piece(usize::try_from(offset.get()).ok()?, usize::try_from(length.get()).ok()?)
    }

    /// A piece behind the header, if it is inside of the message.
    fn piece(&self, offset: usize, length: usize) -> Option<Range<usize>> {
        let start = (self.place.start + HEADER_SIZE).checked_add(offset)?;
        let end = start.checked_add(length).filter(|end| *end <= self.place.end)?;
        Some(start..end)
    }
}
