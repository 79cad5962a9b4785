//! A driver that is none, against the card.

mod channel;
mod control;
mod packets;

use abi::hyperv::rndis::{self, HEADER_SIZE};
use zerocopy::IntoBytes;

const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];
const TCP: u8 = 6;

/// An IPv4 frame of TCP or UDP without checksums.
fn frame(protocol: u8, payload: usize) -> Vec<u8> {
    let header = if protocol == TCP { 20 } else { 8 };
    let length = (20 + header + payload) as u16;
    let mut frame = [MAC.as_slice(), &[2, 0, 0, 0, 0, 1, 8, 0, 0x45, 0]].concat();
    frame.extend(length.to_be_bytes());
    frame.extend([0, 0, 0, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2, 0, 1, 0, 2]);
    if protocol == TCP {
        frame.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x10, 1, 0, 0, 0, 0, 0]);
    } else {
        frame.extend((8 + payload as u16).to_be_bytes());
        frame.extend([0, 0]);
    }
    frame.extend((0..payload).map(|n| n as u8));
    frame
}

/// A frame in its message, with facts.
fn message(frame: &[u8], facts: &[u8]) -> Vec<u8> {
    let packet = rndis::Packet {
        data_offset: ((36 + facts.len()) as u32).into(),
        data_length: (frame.len() as u32).into(),
        info_offset: 36.into(),
        info_length: (facts.len() as u32).into(),
        ..rndis::Packet::default()
    };
    let length = HEADER_SIZE + 36 + facts.len() + frame.len();
    let header = rndis::Header { kind: rndis::message::PACKET.into(), length: (length as u32).into() };
    [header.as_bytes(), packet.as_bytes(), facts, frame].concat()
}
