//! From the guest to the network.
//!
//! A packet is one or more slots that the guest shows all at once; the first says how long it is. Each slot gets an answer, in order. A packet that
//! makes no sense is answered as an error and goes nowhere.

use std::io;

use abi::virtio::net::{GSO_TCPV4, GSO_TCPV6, HDR_F_NEEDS_CSUM, HEADER_BYTES, Header};
use abi::xen::io::netif::{Extra, MAX_SLOTS, TX_SLOT, TxRequest, TxResponse, extra, status, tx_flag};
use frames::{MAX_FRAME, MAX_PACKET, MIN_FRAME, checksum};
use vm_memory::{Bytes, GuestAddress};
use vmm::memory::PAGE_SIZE;
use zerocopy::{FromBytes, IntoBytes};

use super::super::ring::BackRing;
use super::super::{Access, Xen};
use super::NetError;
use crate::network::{BUDGET, Network, Worked};

/// One answer; extras have no id.
type Answer = (u16, i16);

pub(super) struct Transmitter {
    packet: Box<[u8]>,
    /// A packet that the network did not take yet: its length, and what its slots are answered.
    waiting: Option<(usize, Vec<Answer>)>,
}

/// Slots of one packet.
#[derive(Default)]
struct Slots {
    data: Vec<TxRequest>,
    gso: Option<Extra>,
    answers: Vec<Answer>,
    malformed: bool,
}

impl Transmitter {
    pub fn new() -> Transmitter {
        Transmitter { packet: vec![0; MAX_PACKET].into_boxed_slice(), waiting: None }
    }

    /// Sends what is on `ring`.
    pub fn pump(&mut self, xen: &Xen, ring: &mut BackRing, mut network: Option<&mut (dyn Network + '_)>) -> Result<Worked, NetError> {
        for _ in 0..BUDGET {
            let (length, answers) = match self.waiting.take() {
                Some(waiting) => waiting,
                None => {
                    let Some(mut slots) = take(ring)? else { return Ok(Worked::default()) };
                    let length = self.assemble(xen, &slots);
                    if length.is_none() {
                        slots
                            .answers
                            .iter_mut()
                            .filter(|(_, status)| *status == status::OKAY)
                            .for_each(|(_, status)| *status = status::ERROR);
                    }
                    (length.unwrap_or(0), slots.answers)
                }
            };
            let packet = self.packet.get(..length).unwrap_or_default();
            let sent = match &mut network {
                Some(network) if !packet.is_empty() => network.send(packet),
                _ => Ok(()),
            };
            match sent {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.waiting = Some((length, answers));
                    return Ok(Worked { blocked: true, ..Worked::default() });
                }
                // A header that the host does not take: that packet is lost.
                Err(error) if error.kind() != io::ErrorKind::InvalidInput => return Err(NetError::Network(error)),
                _ => {}
            }
            for (id, status) in answers {
                ring.respond(TxResponse { id: id.into(), status: status.cast_unsigned().into() }.as_bytes());
            }
        }
        Ok(Worked { more: true, ..Worked::default() })
    }

    /// Copies the packet of `slots` together; its length, header and all.
    fn assemble(&mut self, xen: &Xen, slots: &Slots) -> Option<usize> {
        let (first, rest) = slots.data.split_first()?;
        let total = usize::from(first.size.get());
        let others: usize = rest.iter().map(|slot| usize::from(slot.size.get())).sum();
        if slots.malformed || !(MIN_FRAME..=MAX_FRAME).contains(&total) {
            return None;
        }
        let mut at = HEADER_BYTES;
        let sizes = std::iter::once(total.checked_sub(others)?).chain(rest.iter().map(|slot| usize::from(slot.size.get())));
        for (slot, size) in slots.data.iter().zip(sizes) {
            let offset = usize::from(slot.offset.get());
            if offset + size > PAGE_SIZE as usize {
                return None;
            }
            let piece = self.packet.get_mut(at..at + size)?;
            let gpa = xen.map(slot.gref.get(), Access::Read).ok()?;
            let copied = xen.memory().read_slice(piece, GuestAddress(gpa + offset as u64));
            xen.unmap(slot.gref.get(), Access::Read);
            copied.ok()?;
            at += size;
        }
        let (header, frame) = self.packet.get_mut(..at)?.split_at_mut(HEADER_BYTES);
        let described = describe(first, slots.gso.as_ref(), frame)?;
        header.copy_from_slice(described.as_bytes());
        Some(at)
    }
}

/// The virtio header of a frame.
fn describe(first: &TxRequest, gso: Option<&Extra>, frame: &[u8]) -> Option<Header> {
    let mut header = Header::default();
    let blank = first.flags.get() & tx_flag::CSUM_BLANK != 0;
    if let Some(place) = checksum::place(frame).filter(|_| blank) {
        place.leave_blank(&mut header);
    }
    if let Some(gso) = gso {
        // Only what has a checksum to be made can be cut.
        if header.flags & HDR_F_NEEDS_CSUM == 0 {
            return None;
        }
        header.gso_type = match gso.gso_type {
            extra::GSO_TCPV4 => GSO_TCPV4,
            extra::GSO_TCPV6 => GSO_TCPV6,
            _ => return None,
        };
        header.gso_size = gso.gso_size.get().into();
        header.hdr_len = u16::try_from(checksum::tcp_data(frame, header.csum_start.get().into())?).ok()?.into();
    }
    Some(header)
}

/// Takes the slots of the next packet from the ring.
fn take(ring: &mut BackRing) -> Result<Option<Slots>, NetError> {
    let mut bytes = [0; TX_SLOT];
    if !ring.next(&mut bytes)? {
        return Ok(None);
    }
    let mut slots = Slots::default();
    let first: TxRequest = zerocopy::transmute!(bytes);
    slots.answers.push((first.id.get(), status::OKAY));
    let mut more_extras = first.flags.get() & tx_flag::EXTRA_INFO != 0;
    let mut more_data = first.flags.get() & tx_flag::MORE_DATA != 0;
    slots.data.push(first);
    while more_extras || more_data {
        // What was announced is there, or the guest does not know what it does.
        if !ring.next(&mut bytes)? {
            slots.malformed = true;
            break;
        }
        if more_extras {
            let info = Extra::read_from_prefix(&bytes).map(|(info, _)| info).unwrap_or_default();
            slots.answers.push((0, status::NULL));
            more_extras = info.flags & extra::MORE != 0;
            if info.kind == extra::GSO {
                slots.gso = Some(info);
            }
        } else {
            let next: TxRequest = zerocopy::transmute!(bytes);
            slots.answers.push((next.id.get(), status::OKAY));
            more_data = next.flags.get() & tx_flag::MORE_DATA != 0;
            slots.malformed |= slots.data.len() >= MAX_SLOTS;
            slots.data.push(next);
        }
    }
    Ok(Some(slots))
}
