//! From the guest to the network.
//!
//! One packet of the channel at a time: what it carries is copied here, its RNDIS messages are taken one after another, frames go to the network
//! where they lie, and everything else is left to the caller. A network that is full keeps the packet, and with it the guest's answer, waiting.

use std::io;
use std::ops::Range;

use abi::hyperv::netvsc::{NO_SECTION, RndisPacket, status};
use abi::hyperv::rndis::{HEADER_SIZE, Header, message};
use vmm::GuestMemory;
use zerocopy::FromBytes;

use super::buffers::SendBuffer;
use super::control::{MAX_PACKETS, MAX_TRANSFER};
use super::packet;
use crate::hyperv::vmbus::{GpaRanges, NotMemory};
use crate::network::Network;

pub(super) struct Transmitter {
    buffer: Box<[u8]>,
    /// What of it has not been looked at yet.
    rest: Range<usize>,
    /// How many messages there were.
    messages: u32,
    /// A packet that the network did not take yet.
    waiting: Option<Range<usize>>,
    /// [`status`] for the guest.
    status: u32,
}

/// What came of going on.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// All was taken; the guest is told this status.
    Done(u32),
    /// The network is full.
    Blocked,
    /// A message that is no packet, at this place; there may be more.
    Control(Range<usize>),
}

impl Transmitter {
    pub fn new() -> Transmitter {
        let buffer = vec![0; MAX_TRANSFER].into_boxed_slice();
        Transmitter { buffer, rest: 0..0, messages: 0, waiting: None, status: status::SUCCESS }
    }

    /// Forgets what is under way.
    pub fn clear(&mut self) {
        (self.rest, self.waiting) = (0..0, None);
    }

    /// Copies what a packet carries: bytes of a section of the send buffer, and of pages.
    pub fn load(&mut self, memory: &GuestMemory, packet: &RndisPacket, send: Option<&SendBuffer>, pages: Option<GpaRanges<'_>>) {
        self.clear();
        (self.messages, self.status) = (0, status::SUCCESS);
        match self.copy(memory, packet, send, pages) {
            Ok(length) => self.rest = 0..length,
            Err(NotMemory) => self.status = status::FAILURE,
        }
    }

    fn copy(
        &mut self,
        memory: &GuestMemory,
        packet: &RndisPacket,
        send: Option<&SendBuffer>,
        pages: Option<GpaRanges<'_>>,
    ) -> Result<usize, NotMemory> {
        let mut length = 0;
        if packet.section_index.get() != NO_SECTION {
            length = packet.section_size.get() as usize;
            let room = self.buffer.get_mut(..length).ok_or(NotMemory)?;
            send.ok_or(NotMemory)?.read(memory, packet.section_index.get(), room)?;
        }
        for range in pages.iter().flat_map(GpaRanges::iter) {
            let end = length + range.len() as usize;
            range.read(memory, self.buffer.get_mut(length..end).ok_or(NotMemory)?)?;
            length = end;
        }
        Ok(length)
    }

    /// Goes on with what was loaded. Without a network, frames go nowhere.
    ///
    /// # Errors
    /// The network's: it is gone.
    pub fn pump(&mut self, mut network: Option<&mut (dyn Network + '_)>) -> io::Result<Progress> {
        loop {
            if let Some(packet) = self.waiting.take() {
                let bytes = self.buffer.get(packet.clone()).unwrap_or_default();
                let sent = network.as_mut().map_or(Ok(()), |network| network.send(bytes));
                match sent {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        self.waiting = Some(packet);
                        return Ok(Progress::Blocked);
                    }
                    // A header that the host does not take: that packet is lost.
                    Err(error) if error.kind() != io::ErrorKind::InvalidInput => return Err(error),
                    _ => {}
                }
            }
            let Some((kind, message)) = self.next() else { return Ok(Progress::Done(self.status)) };
            if kind != message::PACKET {
                return Ok(Progress::Control(message));
            }
            self.waiting = packet::unwrap(&mut self.buffer, message);
            if self.waiting.is_none() {
                self.status = status::INVALID_RNDIS_PACKET;
            }
        }
    }

    /// The bytes at a place that [`Progress::Control`] told.
    pub fn message(&self, place: Range<usize>) -> &[u8] {
        self.buffer.get(place).unwrap_or_default()
    }

    /// Kind and place of the next message; what makes no sense ends it all.
    fn next(&mut self) -> Option<(u32, Range<usize>)> {
        let start = self.rest.start;
        let rest = self.buffer.get(self.rest.clone()).filter(|rest| !rest.is_empty())?;
        let header = Header::read_from_prefix(rest).map(|(header, _)| header).ok();
        let length = header.map_or(0, |header| header.length.get() as usize);
        self.messages += 1;
        match header {
            Some(header) if (HEADER_SIZE..=rest.len()).contains(&length) && self.messages <= MAX_PACKETS => {
                self.rest.start += length;
                Some((header.kind.get(), start..start + length))
            }
            _ => {
                self.rest = 0..0;
                self.status = status::INVALID_RNDIS_PACKET;
                None
            }
        }
    }
}
