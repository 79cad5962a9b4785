//! Long packets against a model that cuts them again.

use abi::virtio::net::{HDR_F_NEEDS_CSUM, Header};
use proptest::prelude::*;

use super::*;
use crate::MAX_FRAME;

const ALL: Offloads = Offloads { checksum: true, tso4: true, tso6: true };

/// What varies between connections.
#[derive(Debug, Clone)]
struct Stream {
    is_v6: bool,
    options: usize,
    sequence: u32,
}

impl Stream {
    /// The segment with `data` that begins at byte `at` of the stream.
    fn segment(&self, at: usize, data: &[u8], flags: u8) -> Vec<u8> {
        let tcp = TCP_HEADER + self.options;
        let mut frame = vec![2; 12];
        if self.is_v6 {
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 0, TCP, 64]);
            frame.extend([7; 32]);
        } else {
            frame.extend([8, 0, IPV4_PLAIN, 0, 0, 0, 0, 0, 0x40, 0, 64, TCP, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        }
        frame.extend([0, 80, 0, 81]);
        frame.extend(self.sequence.wrapping_add(at as u32).to_be_bytes());
        frame.extend([0, 0, 0, 9, (tcp as u8 / 4) << 4, flags, 1, 0, 0, 0, 0, 0]);
        frame.extend(vec![1; self.options]);
        frame.extend(data);
        checksum::set_length(&mut frame).unwrap();
        complete(&mut frame);
        frame
    }
}

fn complete(frame: &mut [u8]) {
    let place = checksum::place(frame).unwrap();
    checksum::prepare(frame, place).unwrap();
    checksum::complete(frame, place);
}

/// Puts as many as belong together into one packet; how many these were.
fn merge(segments: &[Vec<u8>], offloads: Offloads) -> (usize, Option<Header>, Vec<u8>) {
    let mut room = vec![0; MAX_FRAME];
    room[..segments[0].len()].copy_from_slice(&segments[0]);
    let Some(mut long) = LongPacket::begin(&mut room, segments[0].len(), offloads) else { return (1, None, segments[0].clone()) };
    let count = 1 + segments[1..].iter().take_while(|next| long.push(next)).count();
    let length = long.frame_length();
    let header = long.finish();
    (count, header, room[..length].to_vec())
}

/// Cuts a long packet as its header says.
fn cut(header: &Header, frame: &[u8]) -> Vec<Vec<u8>> {
    let (head, data) = frame.split_at(header.hdr_len.get().into());
    let tcp = usize::from(header.csum_start.get());
    let pieces = data.chunks(header.gso_size.get().into());
    let last = pieces.len() - 1;
    let mut sequence = u32::from_be_bytes(head[tcp + 4..tcp + 8].try_into().unwrap());
    let cut = |(number, piece): (usize, &[u8])| {
        let mut segment = [head, piece].concat();
        segment[tcp + 4..tcp + 8].copy_from_slice(&sequence.to_be_bytes());
        sequence = sequence.wrapping_add(piece.len() as u32);
        if number < last {
            segment[tcp + FLAGS] &= !PSH;
        }
        checksum::set_length(&mut segment).unwrap();
        complete(&mut segment);
        segment
    };
    pieces.enumerate().map(cut).collect()
}

fn stream() -> impl Strategy<Value = Stream> {
    (any::<bool>(), 0..=10usize, any::<u32>()).prop_map(|(is_v6, words, sequence)| Stream { is_v6, options: words * 4, sequence })
}

proptest! {
    #[test]
    fn long_packet_cut_again_is_what_was_merged(
        stream in stream(),
        size in 1..2000usize,
        lengths in prop::collection::vec((1..2000usize, any::<bool>(), 0..20u8), 1..60),
    ) {
        let mut at = 0;
        let mut segments = Vec::new();
        for (other, is_short, luck) in lengths {
            let data: Vec<u8> = (0..if is_short && luck == 0 { other } else { size }).map(|n| (n * 7 + at) as u8).collect();
            segments.push(stream.segment(at, &data, if luck == 1 { ACK | PSH } else { ACK }));
            at += data.len();
        }
        let (count, header, frame) = merge(&segments, ALL);
        prop_assert!(frame.len() - ETHERNET <= MAX_IP);
        match header {
            Some(header) => prop_assert_eq!(cut(&header, &frame), &segments[..count]),
            None => prop_assert_eq!((count, &frame), (1, &segments[0])),
        }
    }

    #[test]
    fn whatever_differs_is_not_merged_or_comes_out_again(stream in stream(), at in 0..74usize, bit in 0..8u8) {
        let segments = [stream.segment(0, &[1; 100], ACK), stream.segment(100, &[2; 100], ACK)];
        let mut other = segments.clone();
        other[1][at] ^= 1 << bit;
        let (count, header, frame) = merge(&other, ALL);
        if count == 2 {
            // Its checksum is the network's to vouch for.
            complete(&mut other[1]);
            prop_assert_eq!(cut(&header.unwrap(), &frame), other);
        }
    }

    #[test]
    fn any_bytes_are_a_frame_or_none(first in prop::collection::vec(any::<u8>(), 0..200), next in prop::collection::vec(any::<u8>(), 0..200)) {
        merge(&[first, next], ALL);
    }
}

#[test]
fn segments_that_came_together_are_one_packet() {
    for is_v6 in [false, true] {
        let stream = Stream { is_v6, options: 12, sequence: u32::MAX - 2000 };
        let segments: Vec<Vec<u8>> = (0..50).map(|n| stream.segment(n * 1448, &[n as u8; 1448], ACK)).collect();
        let (count, header, frame) = merge(&segments, ALL);
        let header = header.unwrap();
        // As many as IP's length has room for.
        assert_eq!((count, frame.len()), (45, 14 + if is_v6 { 40 } else { 20 } + 32 + 45 * 1448));
        assert_eq!((header.flags, header.gso_size.get()), (HDR_F_NEEDS_CSUM, 1448));
        assert_eq!(header.gso_type, if is_v6 { GSO_TCPV6 } else { GSO_TCPV4 });
        assert_eq!(cut(&header, &frame), &segments[..45]);
    }
}

#[test]
fn guest_gets_long_packets_of_the_kind_that_it_takes() {
    for is_v6 in [false, true] {
        let stream = Stream { is_v6, options: 0, sequence: 1 };
        let segments = [0, 1].map(|n| stream.segment(n * 100, &[0; 100], ACK));
        let takes = |checksum, tso4, tso6| merge(&segments, Offloads { checksum, tso4, tso6 }).0 == 2;
        assert_eq!([takes(true, true, false), takes(true, false, true)], [!is_v6, is_v6]);
        assert!(!takes(false, true, true), "a long packet has a blank checksum");
    }
}

#[test]
fn what_ends_a_packet_is_its_last_segment() {
    let stream = Stream { is_v6: false, options: 0, sequence: 5 };
    let next = stream.segment(100, &[1; 100], ACK);
    for (first, second, count) in [
        (stream.segment(0, &[0; 100], ACK), next.clone(), 2),
        (stream.segment(0, &[0; 100], ACK | PSH), next.clone(), 1),
        (stream.segment(0, &[0; 100], ACK), stream.segment(100, &[1; 101], ACK), 1),
        (stream.segment(0, &[0; 100], ACK), stream.segment(101, &[1; 100], ACK), 1),
        (stream.segment(0, &[0; 100], ACK), stream.segment(100, &[], ACK), 1),
        (stream.segment(0, &[0; 100], ACK | 1), next.clone(), 1),
        (stream.segment(0, &[0; 100], ACK), stream.segment(100, &[1; 100], ACK | 1), 1),
    ] {
        assert_eq!(merge(&[first, second], ALL).0, count);
    }
    // Padding, as short frames have it on a wire.
    assert_eq!(merge(&[stream.segment(0, &[0; 100], ACK), [next, vec![0; 4]].concat()], ALL).0, 1);
}
