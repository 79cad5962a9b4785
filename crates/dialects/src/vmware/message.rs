//! GuestRPC's transport: channels of messages, four bytes a call or a byte an element of a string.
//!
//! Steps, status bits and limits: open-vm-tools `lib/include/guest_msg_def.h`; what clients do: `lib/message/message.c`, OpenBSD
//! `sys/dev/pv/vmt.c`, and those named at the tests. What is in the messages is a [`Service`]'s business.
//!
//! ```text
//!   OPEN ----> SENDSIZE, payload... --complete--> Service::received --reply--+
//!                                   RECVSIZE <-- Service::offer <------------+--> payload..., RECVSTATUS
//!   CLOSE <--- any time; also by the host, when it needs the room: the step after that has status CLOSED
//! ```
//!
//! A guest's mistakes cost it the message or the channel. A step that the channel's state does not fit, which is what a client sees after
//! its machine moved, has status CHECKPOINT: clients begin the message again.

use std::collections::BTreeMap;

use abi::vmware::message::{self as words, status};
use serde::{Deserialize, Serialize};

use super::backdoor::{Frame, high, with_high};

/// Most bytes in all channels together, announced or waiting. When more is needed the channels that were not used for longest go.
pub(super) const MAX_HELD: usize = 4 << 20;

/// What a channel is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Protocol {
    /// The guest asks, the host replies.
    Rpci,
    /// The host asks, the guest replies.
    Tclo,
}

/// Number of a channel.
pub(super) type ChannelId = u16;

/// Who sends and receives the messages.
pub(super) trait Service {
    /// A channel was opened.
    fn opened(&mut self, id: ChannelId, protocol: Protocol);
    /// A channel is gone.
    fn closed(&mut self, id: ChannelId);
    /// A message came; the answer goes back on the same channel.
    fn received(&mut self, id: ChannelId, protocol: Protocol, message: &[u8]) -> Option<Vec<u8>>;
    /// The guest asks for a message and there is no answer waiting.
    fn offer(&mut self, id: ChannelId) -> Option<Vec<u8>>;
}

/// All channels of a machine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Channels {
    open: BTreeMap<ChannelId, Channel>,
    /// Counts steps; says which channel was not used for longest.
    steps: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Channel {
    protocol: Protocol,
    /// What the guest shows with every step, high and low, when it asked for that.
    cookie: Option<[u32; 2]>,
    incoming: Option<Incoming>,
    outgoing: Option<Outgoing>,
    used: u64,
}

/// A message on its way from the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Incoming {
    length: usize,
    bytes: Vec<u8>,
}

/// A message on its way to the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Outgoing {
    bytes: Vec<u8>,
    taken: usize,
}

impl Outgoing {
    fn new(bytes: Vec<u8>) -> Outgoing {
        Outgoing { bytes, taken: 0 }
    }

    /// At most `count` of the bytes that are left.
    fn take(&mut self, count: usize) -> &[u8] {
        let left = self.bytes.get(self.taken..).unwrap_or_default();
        let piece = left.get(..count).unwrap_or(left);
        self.taken += piece.len();
        piece
    }
}

impl Channel {
    fn held(&self) -> usize {
        self.incoming.as_ref().map_or(0, |m| m.length) + self.outgoing.as_ref().map_or(0, |m| m.bytes.len())
    }
}

impl Channels {
    /// Backdoor command MESSAGE.
    pub fn low_bandwidth(&mut self, frame: &mut Frame, service: &mut dyn Service, random: &mut dyn FnMut() -> u64) {
        let status = match high(frame.ecx) {
            words::OPEN => self.open(frame, service, random),
            step => self.step(step, frame, service),
        };
        frame.ecx = with_high(frame.ecx, status);
    }

    /// A byte of REP OUTSB.
    pub fn high_bandwidth_out(&mut self, frame: &mut Frame, byte: u8, service: &mut dyn Service) {
        let (id, cookie) = (high(frame.edx), [frame.ebp, frame.edi]);
        let status = match self.find(id, cookie) {
            _ if frame.ebx as u16 != words::HB_MESSAGE => 0,
            Some(_) => self.append(id, &[byte], service),
            None => status::CLOSED,
        };
        frame.ebx = with_high(frame.ebx, status);
    }

    /// A byte of REP INSB.
    pub fn high_bandwidth_in(&mut self, frame: &mut Frame) -> u8 {
        let (id, cookie) = (high(frame.edx), [frame.esi, frame.ebp]);
        let (byte, status) = match self.find(id, cookie).map(|channel| &mut channel.outgoing) {
            _ if frame.ebx as u16 != words::HB_MESSAGE => (None, 0),
            Some(Some(message)) => match message.take(1).first() {
                Some(byte) => (Some(*byte), status::SUCCESS),
                None => (None, 0),
            },
            Some(None) => (None, status::CHECKPOINT),
            None => (None, status::CLOSED),
        };
        frame.ebx = with_high(frame.ebx, status);
        byte.unwrap_or(u8::MAX)
    }

    /// Whether guests could have brought it to this.
    pub fn is_within_limits(&self) -> bool {
        let mut incoming = self.open.values().filter_map(|channel| channel.incoming.as_ref());
        // In this order, so that the sum cannot overflow.
        self.open.len() <= words::MAX_CHANNELS
            && incoming.all(|message| message.length <= words::MAX_GUEST_MESSAGE && message.bytes.len() < message.length)
            && self.held() <= MAX_HELD
    }

    fn open(&mut self, frame: &mut Frame, service: &mut dyn Service, random: &mut dyn FnMut() -> u64) -> u16 {
        let protocol = match frame.ebx & !words::COOKIE {
            words::RPCI => Protocol::Rpci,
            words::TCLO => Protocol::Tclo,
            _ => return 0,
        };
        if self.open.len() >= words::MAX_CHANNELS {
            self.close_oldest(None, service);
        }
        let Some(id) = (0..).find(|id| !self.open.contains_key(id)) else { return 0 };
        let cookie = (frame.ebx & words::COOKIE != 0).then(|| {
            let random = random();
            [(random >> 32) as u32, random as u32]
        });
        if let Some(cookie) = cookie {
            [frame.esi, frame.edi] = cookie;
        }
        frame.edx = with_high(frame.edx, id);
        self.steps += 1;
        self.open.insert(id, Channel { protocol, cookie, incoming: None, outgoing: None, used: self.steps });
        service.opened(id, protocol);
        status::SUCCESS
    }

    fn step(&mut self, step: u16, frame: &mut Frame, service: &mut dyn Service) -> u16 {
        let id = high(frame.edx);
        let Some(channel) = self.find(id, [frame.esi, frame.edi]) else { return status::CLOSED };
        match step {
            words::SENDSIZE => {
                let length = frame.ebx as usize;
                // An answer that the guest did not fetch it does not want.
                (channel.incoming, channel.outgoing) = (None, None);
                if length > words::MAX_GUEST_MESSAGE {
                    return 0;
                }
                self.make_room(length, id, service);
                if let Some(channel) = self.open.get_mut(&id) {
                    channel.incoming = Some(Incoming { length, bytes: Vec::new() });
                }
                self.append(id, &[], service) | status::HB
            }
            words::SENDPAYLOAD => self.append(id, &frame.ebx.to_le_bytes(), service),
            words::RECVSIZE => {
                if channel.protocol == Protocol::Tclo && channel.outgoing.is_none() {
                    channel.outgoing = service.offer(id).map(Outgoing::new);
                }
                let Some(message) = &mut channel.outgoing else {
                    frame.ebx = 0;
                    return status::SUCCESS;
                };
                message.taken = 0;
                // A message is a value of the store and two bytes at most.
                frame.ebx = message.bytes.len() as u32;
                frame.edx = with_high(frame.edx, words::TYPE_SENDSIZE);
                status::SUCCESS | status::DORECV | status::HB
            }
            words::RECVPAYLOAD => {
                let Some(message) = &mut channel.outgoing else { return status::CHECKPOINT };
                let piece = message.take(size_of::<u32>());
                // Without the status of the step before, the guest gives the message up (`Message_Receive`, error_quit).
                if piece.is_empty() || frame.ebx as u16 & status::SUCCESS == 0 {
                    channel.outgoing = None;
                    return 0;
                }
                let mut word = [0; size_of::<u32>()];
                word.iter_mut().zip(piece).for_each(|(to, from)| *to = *from);
                frame.ebx = u32::from_le_bytes(word);
                frame.edx = with_high(frame.edx, words::TYPE_SENDPAYLOAD);
                status::SUCCESS
            }
            words::RECVSTATUS => match channel.outgoing.take() {
                Some(_) => status::SUCCESS,
                None => status::CHECKPOINT,
            },
            words::CLOSE => {
                self.close(id, service);
                status::SUCCESS
            }
            _ => 0,
        }
    }

    /// The channel, when the guest knows its cookie.
    fn find(&mut self, id: ChannelId, cookie: [u32; 2]) -> Option<&mut Channel> {
        self.steps += 1;
        let channel = self.open.get_mut(&id).filter(|channel| channel.cookie.is_none_or(|wanted| wanted == cookie))?;
        channel.used = self.steps;
        Some(channel)
    }

    /// Takes more of the message under way, and hands it over when it is whole. What is beyond its length is padding.
    fn append(&mut self, id: ChannelId, bytes: &[u8], service: &mut dyn Service) -> u16 {
        let Some(channel) = self.open.get_mut(&id) else { return status::CLOSED };
        let Some(message) = &mut channel.incoming else { return status::CHECKPOINT };
        let missing = message.length - message.bytes.len();
        message.bytes.extend_from_slice(bytes.get(..missing).unwrap_or(bytes));
        if message.bytes.len() < message.length {
            return status::SUCCESS;
        }
        let message = channel.incoming.take().map(|message| message.bytes).unwrap_or_default();
        if let Some(reply) = service.received(id, channel.protocol, &message) {
            self.make_room(reply.len(), id, service);
            if let Some(channel) = self.open.get_mut(&id) {
                channel.outgoing = Some(Outgoing::new(reply));
            }
        }
        status::SUCCESS
    }

    fn close(&mut self, id: ChannelId, service: &mut dyn Service) {
        if self.open.remove(&id).is_some() {
            service.closed(id);
        }
    }

    /// Closes the channel that was not used for longest, other than `keep`. `false` when there is none.
    fn close_oldest(&mut self, keep: Option<ChannelId>, service: &mut dyn Service) -> bool {
        let others = self.open.iter().filter(|(id, _)| Some(**id) != keep);
        let Some(oldest) = others.min_by_key(|(_, channel)| channel.used).map(|(id, _)| *id) else { return false };
        self.close(oldest, service);
        true
    }

    fn make_room(&mut self, bytes: usize, keep: ChannelId, service: &mut dyn Service) {
        while self.held() + bytes > MAX_HELD && self.close_oldest(Some(keep), service) {}
    }

    fn held(&self) -> usize {
        self.open.values().map(Channel::held).sum()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Answers with as many bytes as the request's first byte says, in units of 64 KiB; counts its channels.
    #[derive(Default)]
    struct Echo {
        channels: i32,
    }

    impl Service for Echo {
        fn opened(&mut self, _: ChannelId, _: Protocol) {
            self.channels += 1;
        }
        fn closed(&mut self, _: ChannelId) {
            self.channels -= 1;
        }
        fn received(&mut self, _: ChannelId, protocol: Protocol, message: &[u8]) -> Option<Vec<u8>> {
            let units = usize::from(*message.first().unwrap_or(&0)) % 17;
            (protocol == Protocol::Rpci).then(|| vec![7; units << 16])
        }
        fn offer(&mut self, _: ChannelId) -> Option<Vec<u8>> {
            Some(b"request".to_vec())
        }
    }

    fn step(channels: &mut Channels, service: &mut Echo, step: u16, id: ChannelId, ebx: u32) -> Frame {
        let mut frame = Frame { ebx, ecx: u32::from(step) << 16, edx: u32::from(id) << 16, ..Frame::default() };
        channels.low_bandwidth(&mut frame, service, &mut || 0);
        frame
    }

    #[test]
    fn channel_unused_for_longest_makes_way_when_all_are_taken() {
        let (mut channels, mut service) = (Channels::default(), Echo::default());
        for id in 0..words::MAX_CHANNELS as u16 {
            assert_eq!(high(step(&mut channels, &mut service, words::OPEN, 0, words::RPCI).edx), id);
        }
        assert_eq!(high(step(&mut channels, &mut service, words::SENDSIZE, 0, 4).ecx), status::SUCCESS | status::HB);
        assert_eq!(high(step(&mut channels, &mut service, words::OPEN, 0, words::RPCI).edx), 1);
        assert_eq!(service.channels, words::MAX_CHANNELS as i32);
    }

    #[test]
    fn channels_make_way_for_bytes() {
        let (mut channels, mut service) = (Channels::default(), Echo::default());
        // Four replies of a mebibyte would be all there is, without the request under way.
        for id in 0..5 {
            step(&mut channels, &mut service, words::OPEN, 0, words::RPCI);
            step(&mut channels, &mut service, words::SENDSIZE, id, 1);
            assert_eq!(high(step(&mut channels, &mut service, words::SENDPAYLOAD, id, 16).ecx), status::SUCCESS);
            assert!(channels.held() <= MAX_HELD);
        }
        assert_eq!(high(step(&mut channels, &mut service, words::RECVSIZE, 0, 0).ecx), status::CLOSED);
        assert_eq!(step(&mut channels, &mut service, words::RECVSIZE, 4, 0).ebx, 16 << 16);
    }

    /// One call: which, on what channel, with what in EBX and whether the cookie is right.
    fn any_call() -> impl Strategy<Value = (u16, u16, u32, bool)> {
        let ebx =
            prop_oneof![Just(words::RPCI), Just(words::TCLO | words::COOKIE), Just(1 << 16), 0..20u32, 65_530..65_540u32, any::<u32>()];
        (0..12u16, 0..6u16, ebx, prop::bool::weighted(0.95))
    }

    proptest! {
        #[test]
        fn any_sequence_of_calls_keeps_the_bounds(calls in prop::collection::vec(any_call(), 0..400)) {
            let (mut channels, mut service) = (Channels::default(), Echo::default());
            for (call, id, ebx, cookie_is_right) in calls {
                let cookie = if cookie_is_right { 0 } else { 1 };
                let mut frame = Frame { ebx, ecx: u32::from(call) << 16, edx: u32::from(id) << 16, esi: cookie, ..Frame::default() };
                match call {
                    10 => channels.high_bandwidth_out(&mut frame, ebx as u8, &mut service),
                    11 => { channels.high_bandwidth_in(&mut frame); }
                    _ => channels.low_bandwidth(&mut frame, &mut service, &mut || 0),
                }
                prop_assert!(channels.held() <= MAX_HELD);
                prop_assert_eq!(channels.open.len() as i32, service.channels);
                prop_assert!(channels.open.len() <= words::MAX_CHANNELS);
            }
        }
    }
}
