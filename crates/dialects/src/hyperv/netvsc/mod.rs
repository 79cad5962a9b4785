//! Netvsc: a network card for the guest's network driver.
//!
//! ```text
//!   channel --NVSP--> nvsp.rs --RNDIS messages--> transmit.rs --> packet.rs --frame--> network
//!                                       |--objects--> control.rs
//!           <--transfer pages-- buffers.rs (the guest's receive buffer) <-- packet.rs <--frame-- network
//! ```
//!
//! Outside, a packet is a virtio network header and a frame, as the host's networks take it ([`crate::network`]). What is sent
//! leaves checksums and segmentation to the network; checksums of what is received are completed or looked at here. Specification: Linux `drivers/net/hyperv`, OpenVMM `netvsp`, as
//! [`abi::hyperv::netvsc`] and [`abi::hyperv::rndis`] have them.

mod buffers;
mod control;
mod nvsp;
mod packet;
#[cfg(test)]
mod tests;
mod transmit;

use std::collections::VecDeque;

use abi::hyperv::netvsc::{CHANNEL_CONTROL, CHANNEL_DATA, ReceiveBufferComplete, SendBufferComplete, Subchannel, kind, status, version};
use abi::hyperv::vmbus::{Guid, USER_BYTES, guid};
use abi::virtio::net::HEADER_BYTES;
use frames::{MAX_FRAME, MAX_PACKET, Offloads};

use self::buffers::{ReceiveBuffer, SECTION_SIZE, SendBuffer};
use self::control::Adapter;
use self::nvsp::Message;
use self::transmit::{Progress, Transmitter};
use super::vmbus::{BrokenRing, Channel, Kind, Offer, Outgoing, Packet, PacketBuf};
use crate::network::{BUDGET, Network, Worked, flow};

/// Most subchannels.
const MAX_SUBCHANNELS: u16 = 3;
/// Longest frame, until the guest says another: Ethernet's.
const DEFAULT_MTU: u32 = 1514;
/// Shortest that a guest may say: IPv4's least.
const MIN_MTU: u32 = 68 + 14;
/// Most answers to control messages that wait for room; a guest that asks more before it reads loses them.
const MAX_ANSWERS: usize = 32;

/// What ends the work on a card.
pub type NetError = crate::network::NetError<BrokenRing>;

/// A card.
pub struct Netvsc {
    instance: Guid,
    adapter: Adapter,
    channels: Vec<Queue>,
    /// The version of NVSP, once it is agreed on.
    version: Option<u32>,
    send: Option<SendBuffer>,
    receive: Option<ReceiveBuffer>,
    transmitter: Transmitter,
    /// Whose packet is being transmitted: the channel's index, and the transaction if its end is to be told.
    transmitting: Option<(u16, Option<u64>)>,
    /// RNDIS messages for the guest.
    answers: VecDeque<Vec<u8>>,
    /// How many subchannels the guest was given, until it has opened them all and is told to send on them.
    sub_channels: u32,
    received: Box<[u8]>,
    /// Bytes in `received` that found no room yet.
    waiting: Option<usize>,
    packet: PacketBuf,
}

/// A channel, and an answer that found no room in it: its transaction and bytes.
struct Queue {
    channel: Channel,
    unsent: Option<(u64, Vec<u8>)>,
}

impl Queue {
    /// Sends the answer that waits; whether there is none any more.
    fn flush(&mut self) -> Result<bool, BrokenRing> {
        if let Some((transaction, bytes)) = self.unsent.take()
            && !self.channel.send(&Outgoing::completion(transaction, &bytes))?
        {
            self.unsent = Some((transaction, bytes));
        }
        Ok(self.unsent.is_none())
    }
}

impl Netvsc {
    /// A card of this name and address.
    pub fn new(instance: Guid, address: [u8; 6]) -> Netvsc {
        Netvsc {
            instance,
            adapter: Adapter::new(address, u32::from(MAX_SUBCHANNELS) + 1, DEFAULT_MTU),
            channels: Vec::new(),
            version: None,
            send: None,
            receive: None,
            transmitter: Transmitter::new(),
            transmitting: None,
            answers: VecDeque::new(),
            sub_channels: 0,
            received: vec![0; MAX_PACKET].into_boxed_slice(),
            waiting: None,
            packet: PacketBuf::default(),
        }
    }

    /// What the guest is told of the card.
    pub fn offer(&self) -> Offer {
        Offer { class: guid::NETWORK, instance: self.instance, flags: 0, user_defined: [0; USER_BYTES], sub_channels: MAX_SUBCHANNELS }
    }

    /// The guest has opened a channel.
    pub fn opened(&mut self, channel: Channel) {
        if channel.index() == 0 {
            self.reset();
        }
        self.channels.push(Queue { channel, unsent: None });
    }

    /// A channel is over.
    pub fn closed(&mut self, index: u16) {
        self.channels.retain(|queue| queue.channel.index() != index);
        if self.transmitting.is_some_and(|(channel, _)| channel == index) {
            self.transmitting = None;
        }
        if index == 0 {
            self.reset();
        }
    }

    /// What the guest can do itself with a received packet: what is left blank is completed before it gets there.
    pub fn guest_offloads(&self) -> Offloads {
        let [tso4, tso6] = self.adapter.coalesces;
        Offloads { checksum: self.version.is_some(), tso4, tso6 }
    }

    /// Whether a driver receives frames.
    pub fn is_in_use(&self) -> bool {
        self.receive.is_some()
    }

    /// The link is there or not; the guest is told.
    pub fn set_link(&mut self, is_up: bool) {
        if self.adapter.has_link != is_up {
            self.adapter.has_link = is_up;
            if self.receive.is_some() {
                self.answers.push_back(self.adapter.link_status());
            }
        }
    }

    /// Moves what can be moved, in both directions. `None` as network: frames go nowhere.
    ///
    /// # Errors
    /// [`NetError`].
    pub fn work(&mut self, mut network: Option<&mut (dyn Network + '_)>) -> Result<Worked, NetError> {
        let mut worked = self.transmit(network.as_deref_mut())?;
        self.send_answers()?;
        self.send_table()?;
        if let Some(network) = network
            && self.receive.is_some()
        {
            let moved = self.fill(network)?;
            worked.more |= moved.more;
            worked.has_room = moved.has_room;
        }
        Ok(worked)
    }

    /// Everything that the guest has said is forgotten.
    fn reset(&mut self) {
        (self.version, self.send, self.receive, self.waiting, self.transmitting) = (None, None, None, None, None);
        self.answers.clear();
        self.sub_channels = 0;
        self.transmitter.clear();
        self.adapter.reset();
        self.adapter.mtu = DEFAULT_MTU;
    }

    /// Takes what the guest sends.
    fn transmit(&mut self, mut network: Option<&mut (dyn Network + '_)>) -> Result<Worked, NetError> {
        let mut worked = Worked::default();
        for _ in 0..BUDGET {
            if self.transmitting.is_some() && !self.go_on(network.as_deref_mut())? {
                worked.blocked = true;
                return Ok(worked);
            }
            if !self.take()? {
                return Ok(worked);
            }
        }
        worked.more = true;
        Ok(worked)
    }

    /// Goes on with the packet under way; `false` when the network is full.
    fn go_on(&mut self, mut network: Option<&mut (dyn Network + '_)>) -> Result<bool, NetError> {
        loop {
            match self.transmitter.pump(network.as_deref_mut()).map_err(NetError::Network)? {
                Progress::Blocked => return Ok(false),
                Progress::Control(place) => {
                    if let Some(answer) = self.adapter.answer(self.transmitter.message(place))
                        && self.answers.len() < MAX_ANSWERS
                    {
                        self.answers.push_back(answer);
                    }
                }
                Progress::Done(status) => {
                    if let Some((index, Some(transaction))) = self.transmitting.take()
                        && let Some(queue) = self.channels.iter_mut().find(|queue| queue.channel.index() == index)
                    {
                        queue.unsent = Some((transaction, nvsp::taken(self.version, status)));
                    }
                    return Ok(true);
                }
            }
        }
    }

    /// Takes a packet from the next channel that has one and room for answers; `false` when none has.
    fn take(&mut self) -> Result<bool, NetError> {
        for _ in 0..self.channels.len() {
            // In turns, so that none waits for ever.
            self.channels.rotate_left(1);
            let Some(queue) = self.channels.last_mut() else { return Ok(false) };
            if !queue.flush()? {
                continue;
            }
            let mut buffer = std::mem::take(&mut self.packet);
            let packet = queue.channel.receive(&mut buffer)?;
            let taken = packet.is_some();
            if let Some(packet) = packet {
                let answer = self.on_packet(&packet);
                if let (Some(answer), true, Some(queue)) = (answer, packet.wants_completion, self.channels.last_mut()) {
                    queue.unsent = Some((packet.transaction, answer));
                }
            }
            self.packet = buffer;
            if taken {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Does what a packet of the last channel says; its answer, if that is known now.
    fn on_packet(&mut self, packet: &Packet<'_>) -> Option<Vec<u8>> {
        let channel = &self.channels.last()?.channel;
        if let Kind::Completion = packet.kind {
            if let Some(receive) = &mut self.receive {
                receive.complete(packet.transaction);
            }
            return None;
        }
        let mut message = Message::parse(packet.payload).unwrap_or(Message::Other);
        if channel.index() != 0 && !matches!(message, Message::Rndis(_)) {
            message = Message::Other;
        }
        match message {
            Message::Init(oldest, newest) => {
                self.reset();
                self.version = nvsp::choose(oldest, newest);
                return Some(nvsp::init_complete(self.version));
            }
            Message::Config(mtu) => self.adapter.mtu = mtu.clamp(MIN_MTU, MAX_FRAME as u32),
            Message::ReceiveBuffer(lent) => {
                let buffer = channel.gpadl(lent.gpadl.get());
                self.receive = buffer.and_then(|buffer| ReceiveBuffer::new(buffer, lent.id.get(), self.adapter.mtu));
                return Some(self.receive_buffer_complete());
            }
            Message::RevokeReceiveBuffer => (self.receive, self.waiting) = (None, None),
            Message::SendBuffer(lent) => {
                self.send = channel.gpadl(lent.gpadl.get()).map(SendBuffer);
                let status = if self.send.is_some() { status::SUCCESS } else { status::FAILURE };
                let answer = SendBufferComplete { status: status.into(), section_size: SECTION_SIZE.into() };
                return Some(nvsp::message(self.version, kind::SEND_SEND_BUFFER_COMPLETE, &answer));
            }
            Message::RevokeSendBuffer => self.send = None,
            Message::Rndis(rndis) => {
                let pages = if let Kind::GpaDirect(ranges) = packet.kind { Some(ranges) } else { None };
                self.transmitter.load(channel.memory(), &rndis, self.send.as_ref(), pages);
                self.transmitting = Some((channel.index(), packet.wants_completion.then_some(packet.transaction)));
                return None;
            }
            Message::Subchannels(count) => {
                let count = if self.version >= Some(version::V5) { count.min(MAX_SUBCHANNELS.into()) } else { 0 };
                channel.offer_sub_channels(count as u16);
                self.sub_channels = count;
                let answer = Subchannel { operation: status::SUCCESS.into(), count: count.into() };
                return Some(nvsp::message(self.version, kind::SUBCHANNEL, &answer));
            }
            Message::Other => {}
        }
        Some(nvsp::acknowledged(self.version))
    }

    fn receive_buffer_complete(&self) -> Vec<u8> {
        let (status, sections) = if self.receive.is_some() { (status::SUCCESS, 1) } else { (status::FAILURE, 0) };
        let (part_size, parts, end) = self.receive.as_ref().map_or((0, 0, 0), |receive| (receive.part_size, receive.parts, receive.end()));
        let answer = ReceiveBufferComplete {
            status: status.into(),
            sections: sections.into(),
            offset: 0.into(),
            part_size: part_size.into(),
            parts: parts.into(),
            end_offset: end.into(),
        };
        nvsp::message(self.version, kind::SEND_RECEIVE_BUFFER_COMPLETE, &answer)
    }

    /// Sends the RNDIS messages that wait, as far as there is room.
    fn send_answers(&mut self) -> Result<(), NetError> {
        while let Some(answer) = self.answers.front() {
            let (Some(receive), Some(queue)) = (&mut self.receive, self.channels.iter_mut().find(|queue| queue.channel.index() == 0))
            else {
                self.answers.clear();
                break;
            };
            if !deliver(receive, queue, self.version, CHANNEL_CONTROL, [[answer.as_slice(), &[], &[]]].into_iter())? {
                break;
            }
            self.answers.pop_front();
        }
        Ok(())
    }

    /// Tells the guest to send on all its channels, once it has opened them.
    fn send_table(&mut self) -> Result<(), NetError> {
        let channels = self.sub_channels + 1;
        if self.sub_channels > 0
            && self.channels.len() == channels as usize
            && let Some(first) = self.channels.iter_mut().find(|queue| queue.channel.index() == 0)
            && first.channel.send(&Outgoing::in_band(0, &nvsp::send_table(self.version, channels)))?
        {
            self.sub_channels = 0;
        }
        Ok(())
    }

    /// Gives the guest what comes from the network.
    fn fill(&mut self, network: &mut dyn Network) -> Result<Worked, NetError> {
        for _ in 0..BUDGET {
            let length = match self.waiting.take() {
                Some(length) => length,
                None => match network.receive(&mut self.received).map_err(NetError::Network)? {
                    Some(length) => length,
                    None => return Ok(Worked { has_room: true, ..Worked::default() }),
                },
            };
            let Some(packet) = self.received.get_mut(..length) else { continue };
            let frame = packet.get(HEADER_BYTES..).unwrap_or_default();
            if !self.adapter.accepts(frame) {
                continue;
            }
            let index = self.adapter.queue(flow(frame));
            let Some(received) = packet::Received::new(packet, self.adapter.trusts_checksums) else { continue };
            // A subchannel that the guest has not opened yet is the first's to replace.
            let place = self.channels.iter().position(|queue| usize::from(queue.channel.index()) == index);
            let place = place.or_else(|| self.channels.iter().position(|queue| queue.channel.index() == 0));
            let (Some(receive), Some(queue)) = (&mut self.receive, place.and_then(|place| self.channels.get_mut(place))) else { continue };
            let messages = received.messages(receive.part_size as usize);
            let messages = messages.iter().map(|(head, [first, rest])| [head.as_slice(), first, rest]);
            if !deliver(receive, queue, self.version, CHANNEL_DATA, messages)? {
                self.waiting = Some(length);
                return Ok(Worked::default());
            }
        }
        Ok(Worked { more: true, ..Worked::default() })
    }
}

/// Gives the guest RNDIS messages, each in pieces; `false` when there is no room in its buffer or ring. What can never have room is lost.
fn deliver<'p>(
    receive: &mut ReceiveBuffer,
    queue: &mut Queue,
    version: Option<u32>,
    channel: u32,
    messages: impl ExactSizeIterator<Item = [&'p [u8]; 3]>,
) -> Result<bool, BrokenRing> {
    if !receive.has_room(messages.len().min(receive.parts as usize)) {
        return Ok(false);
    }
    let Some((transaction, ranges)) = receive.put(queue.channel.memory(), messages)? else { return Ok(true) };
    let payload = nvsp::rndis(version, channel);
    let sent = queue.channel.send(&Outgoing::transfer_pages(transaction, receive.id, &ranges, &payload))?;
    if !sent {
        receive.complete(transaction);
    }
    Ok(sent)
}
