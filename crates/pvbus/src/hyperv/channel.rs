//! An open channel: packets to the host and from it.
//!
//! Packets are sent and taken one by one and never wait. Whoever finds no room keeps its packet and tries again when it is polled next: the host
//! signals when it has made room.

use alloc::sync::Arc;
use alloc::vec::Vec;

use abi::hyperv::ring::{ALIGN, COMPLETION_REQUESTED, CONTROL_BYTES, Descriptor, GpaDirect, GpaRange, TransferPages, TransferRange, kind};
use zerocopy::{FromBytes, IntoBytes};

use super::Platform;
use super::ring::{BrokenRing, DESCRIPTOR, Reader, Sent, Taken, Writer};
use crate::hal::{Dma, HalError};

/// Bytes of a page, as VMBus counts them.
pub(super) const PAGE: usize = 4096;
const _: () = assert!(CONTROL_BYTES == PAGE as u64);

/// A channel.
pub(super) struct Channel<'h> {
    platform: Arc<Platform<'h>>,
    connection: u32,
    writer: Writer,
    reader: Reader,
    /// The packet that is being made.
    packet: Vec<u8>,
}

impl<'h> Channel<'h> {
    /// A channel whose rings fill `memory`, half and half, and whose host is signalled at `connection`.
    pub fn new(platform: &Arc<Platform<'h>>, connection: u32, memory: &Arc<Dma>) -> Result<Channel<'h>, HalError> {
        let half = memory.words().len() * 4 / 2;
        let size = half.checked_sub(PAGE).ok_or(HalError::Fault)?;
        let (writer, reader) = (Writer::new(memory, 0, size)?, Reader::new(memory, half, size)?);
        Ok(Channel { platform: Arc::clone(platform), connection, writer, reader, packet: Vec::new() })
    }

    /// Sends a request whose payload is all there is; `false` when there is no room.
    pub fn request(&mut self, transaction: u64, payload: &[u8]) -> Result<bool, BrokenRing> {
        self.send(kind::IN_BAND, COMPLETION_REQUESTED, transaction, &[], payload)
    }

    /// Sends a request about `length` bytes at the beginning of `data`, which does not change until it is completed.
    pub fn request_about(&mut self, transaction: u64, data: &Dma, length: usize, payload: &[u8]) -> Result<bool, BrokenRing> {
        let byte_count = u32::try_from(length).map_err(|_| BrokenRing)?;
        let mut head = Vec::from(GpaDirect { reserved: 0.into(), range_count: 1.into() }.as_bytes());
        head.extend(GpaRange { byte_count: byte_count.into(), byte_offset: 0.into() }.as_bytes());
        head.extend(page_numbers(data).take(length.div_ceil(PAGE)).flat_map(u64::to_le_bytes));
        self.send(kind::GPA_DIRECT, COMPLETION_REQUESTED, transaction, &head, payload)
    }

    /// Sends a packet that wants no answer.
    pub fn tell(&mut self, transaction: u64, payload: &[u8]) -> Result<bool, BrokenRing> {
        self.send(kind::IN_BAND, 0, transaction, &[], payload)
    }

    /// Completes a packet of the host's.
    pub fn complete(&mut self, transaction: u64, payload: &[u8]) -> Result<bool, BrokenRing> {
        self.send(kind::COMPLETION, 0, transaction, &[], payload)
    }

    /// The host's next packet.
    pub fn receive(&mut self) -> Result<Option<Packet>, BrokenRing> {
        let Some(Taken { descriptor, bytes, payload_at, signal }) = self.reader.next()? else { return Ok(None) };
        if signal {
            self.signal()?;
        }
        Ok(Some(Packet { kind: descriptor.kind.get(), transaction: descriptor.transaction.get(), bytes, payload_at }))
    }

    fn send(&mut self, kind: u16, flags: u16, transaction: u64, head: &[u8], payload: &[u8]) -> Result<bool, BrokenRing> {
        let eighths = |bytes: usize| u16::try_from(bytes.div_ceil(ALIGN)).map_err(|_| BrokenRing);
        let descriptor = Descriptor {
            kind: kind.into(),
            data_offset8: eighths(DESCRIPTOR + head.len())?.into(),
            total_length8: eighths(DESCRIPTOR + head.len() + payload.len())?.into(),
            flags: flags.into(),
            transaction: transaction.into(),
        };
        self.packet.clear();
        [descriptor.as_bytes(), head, payload].iter().for_each(|part| self.packet.extend_from_slice(part));
        self.packet.resize(self.packet.len().next_multiple_of(ALIGN), 0);
        match self.writer.push(&self.packet)? {
            Sent::Full => return Ok(false),
            Sent::Signal => self.signal()?,
            Sent::Quietly => {}
        }
        Ok(true)
    }

    fn signal(&self) -> Result<(), HalError> {
        // A host that takes the channel away says so by a message; its refusal here says nothing more.
        self.platform.calls.signal_event(self.connection).map(drop)
    }
}

/// Numbers of the pages of `memory`.
pub(super) fn page_numbers(memory: &Dma) -> impl Iterator<Item = u64> {
    let first = memory.gpa() / CONTROL_BYTES;
    (first..).take(memory.words().len() * 4 / PAGE)
}

/// A packet from the host.
pub(super) struct Packet {
    /// One of [`kind`].
    pub kind: u16,
    /// The sender's number for it, or the guest's for what it completes.
    pub transaction: u64,
    bytes: Vec<u8>,
    payload_at: usize,
}

impl Packet {
    /// What it is about, with up to 7 bytes of padding.
    pub fn payload(&self) -> &[u8] {
        self.bytes.get(self.payload_at..).unwrap_or_default()
    }

    /// Of a transfer-page packet the buffer and the ranges in it; `None` when there are not as many ranges as it says.
    pub fn transfer(&self) -> Option<(u16, &[TransferRange])> {
        let head = self.bytes.get(DESCRIPTOR..self.payload_at)?;
        let (pages, rest) = TransferPages::ref_from_prefix(head).ok()?;
        let count = usize::try_from(pages.range_count.get()).ok()?;
        let (ranges, _) = <[TransferRange]>::ref_from_prefix_with_elems(rest, count).ok()?;
        Some((pages.set_id.get(), ranges))
    }
}
