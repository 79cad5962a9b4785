//! From the network to the guest.
//!
//! The guest has put buffers of a page each into the ring; a packet takes as many as it needs, and one slot more when it says how to be cut. Slots are
//! answered in the order of their requests. Packets of one flow stay in one queue, so that they stay in order.

use abi::virtio::net::{GSO_TCPV6, HDR_F_DATA_VALID, HDR_F_NEEDS_CSUM, HEADER_BYTES, Header};
use abi::xen::io::netif::{Extra, RX_SLOT, RxRequest, RxResponse, extra, rx_flag, status};
use frames::MAX_PACKET;
use vm_memory::{Bytes, GuestAddress};
use vmm::memory::PAGE_SIZE;
use zerocopy::{FromBytes, IntoBytes};

use super::super::{Access, Xen};
use super::{NetError, Queue};
use crate::network::{BUDGET, Network, Worked, flow};

pub(super) struct Receiver {
    packet: Box<[u8]>,
    /// A packet that found no room yet: its length.
    waiting: Option<usize>,
    /// Whether the guest takes packets in several buffers.
    scatter: bool,
}

impl Receiver {
    pub fn new() -> Receiver {
        Receiver { packet: vec![0; MAX_PACKET].into_boxed_slice(), waiting: None, scatter: false }
    }

    /// Whether the guest takes packets in several buffers.
    pub fn set_scatter(&mut self, scatter: bool) {
        self.scatter = scatter;
    }

    /// Gives the guest what comes from the network.
    pub fn pump(&mut self, xen: &Xen, queues: &mut [Queue], network: &mut dyn Network) -> Result<Worked, NetError> {
        let result = self.fill(xen, queues, network);
        for queue in queues.iter_mut() {
            if queue.rx.publish() {
                xen.notify(queue.rx_port);
            }
        }
        result
    }

    fn fill(&mut self, xen: &Xen, queues: &mut [Queue], network: &mut dyn Network) -> Result<Worked, NetError> {
        for _ in 0..BUDGET {
            let length = match self.waiting.take() {
                Some(length) => length,
                None => match network.receive(&mut self.packet).map_err(NetError::Network)? {
                    Some(length) => length,
                    None => return Ok(Worked { has_room: true, ..Worked::default() }),
                },
            };
            let Some((header, frame)) = self.packet.get(..length).and_then(|packet| packet.split_at_checked(HEADER_BYTES)) else {
                continue;
            };
            let Ok((header, _)) = Header::read_from_prefix(header) else { continue };
            let pages = frame.len().div_ceil(PAGE_SIZE as usize);
            // A packet that the guest said it cannot take, as on a wire with a smaller MTU.
            if pages == 0 || pages > 1 && !self.scatter {
                continue;
            }
            let chosen = flow(frame) % queues.len().max(1);
            let Some(queue) = queues.get_mut(chosen) else { return Ok(Worked::default()) };
            let needed = pages as u32 + u32::from(header.gso_type != 0);
            if needed > queue.rx.slots() {
                continue;
            }
            if queue.rx.waiting()? < needed && !queue.rx.ask_for_event_at(needed)? {
                self.waiting = Some(length);
                return Ok(Worked::default());
            }
            deliver(xen, queue, &header, frame)?;
        }
        Ok(Worked { more: true, ..Worked::default() })
    }
}

/// Copies a frame into the next slots, of which there are enough.
fn deliver(xen: &Xen, queue: &mut Queue, header: &Header, frame: &[u8]) -> Result<(), NetError> {
    let pieces = frame.chunks(PAGE_SIZE as usize);
    let last = pieces.len() - 1;
    let mut request = [0; RX_SLOT];
    for (number, piece) in pieces.enumerate() {
        if !queue.rx.next(&mut request)? {
            return Ok(());
        }
        let buffer: RxRequest = zerocopy::transmute!(request);
        let mut flags = if number < last { rx_flag::MORE_DATA } else { 0 };
        if number == 0 {
            if header.flags & HDR_F_NEEDS_CSUM != 0 {
                flags |= rx_flag::CSUM_BLANK | rx_flag::DATA_VALIDATED;
            }
            if header.flags & HDR_F_DATA_VALID != 0 {
                flags |= rx_flag::DATA_VALIDATED;
            }
            if header.gso_type != 0 {
                flags |= rx_flag::EXTRA_INFO;
            }
        }
        let grant = buffer.gref.get();
        let written = xen.map(grant, Access::Write).ok().and_then(|gpa| {
            let written = xen.memory().write_slice(piece, GuestAddress(gpa));
            xen.unmap(grant, Access::Write);
            written.ok()
        });
        let status = if written.is_some() { piece.len() as i16 } else { status::ERROR };
        let response = RxResponse { id: buffer.id, offset: 0.into(), flags: flags.into(), status: status.cast_unsigned().into() };
        queue.rx.respond(response.as_bytes());
        if number == 0 && header.gso_type != 0 {
            // It takes a slot, whose buffer the guest keeps.
            if !queue.rx.next(&mut request)? {
                return Ok(());
            }
            let gso_type = if header.gso_type == GSO_TCPV6 { extra::GSO_TCPV6 } else { extra::GSO_TCPV4 };
            let info = Extra { kind: extra::GSO, gso_size: header.gso_size.get().into(), gso_type, ..Extra::default() };
            queue.rx.respond(info.as_bytes());
        }
    }
    Ok(())
}
