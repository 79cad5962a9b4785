//! Rings: signals, room, and what no honest guest writes.

use abi::hyperv::ring::{Descriptor, TRAILER_BYTES, TransferRange, control, kind};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};
use vmm::memory::PAGE_SIZE;
use zerocopy::IntoBytes;

use super::super::testing::MEMORY;
use super::*;

#[test]
fn packets_wrap_around() {
    let (mut bench, mut channel) = Bench::open();
    let payload = vec![0x5a; 1000];
    for transaction in 0..100 {
        channel.send(kind::IN_BAND, 1, transaction, &[], &payload);
        bench.signal(channel.relid);
        let answer = channel.receive().unwrap();
        assert_eq!((answer.transaction, answer.payload), (transaction, payload.clone()));
    }
}

#[test]
fn data_in_pages_is_found_wherever_they_are() {
    let (mut bench, mut channel) = Bench::open();
    let pfns = bench.guest.pages(3);
    bench.guest.memory.write_slice(b"first", GuestAddress(pfns[0] * PAGE_SIZE + 4091)).unwrap();
    bench.guest.memory.write_slice(b"second", GuestAddress(pfns[1] * PAGE_SIZE)).unwrap();
    bench.guest.memory.write_slice(b"third", GuestAddress(pfns[2] * PAGE_SIZE + 7)).unwrap();
    let wild = [MEMORY / PAGE_SIZE];
    channel.send_with_pages(1, &[(11, 4091, &pfns[..2]), (5, 7, &pfns[2..]), (8, 0, &wild), (0, 0, &[])], b"");
    bench.signal(channel.relid);
    assert_eq!(bench.echo.device().seen.pop().unwrap().1, b"firstsecondthirdwild");
}

#[test]
fn reader_that_sleeps_is_signalled_and_one_that_reads_is_not() {
    let (mut bench, channel) = Bench::open();
    let flag = channel.relid as u16;
    let host = bench.echo.device().channels.get_mut(&0).unwrap();
    let send = |host: &mut Channel| assert!(host.send(&Outgoing::in_band(0, b"event")).unwrap());
    send(host);
    send(host);
    assert_eq!(bench.guest.events(0, flag), 1, "the guest has not read yet");
    channel.to_guest.set_word(control::READ_INDEX, channel.to_guest.word(control::WRITE_INDEX));
    channel.to_guest.set_word(control::INTERRUPT_MASK, 1);
    send(host);
    assert_eq!(bench.guest.events(0, flag), 0, "the guest does not want to be");
}

#[test]
fn host_wants_signals_only_while_it_sleeps() {
    let (mut bench, mut channel) = Bench::open();
    let host = bench.echo.device().channels.get_mut(&0).unwrap();
    let mut buf = PacketBuf::default();
    for _ in 0..2 {
        channel.send(kind::IN_BAND, 0, 0, &[], b"");
    }
    assert_eq!(channel.to_host.word(control::INTERRUPT_MASK), 0);
    assert!(host.receive(&mut buf).unwrap().is_some());
    assert_eq!(channel.to_host.word(control::INTERRUPT_MASK), 1);
    assert!(host.receive(&mut buf).unwrap().is_some());
    assert!(host.receive(&mut buf).unwrap().is_none());
    assert_eq!(channel.to_host.word(control::INTERRUPT_MASK), 0);
}

#[test]
fn host_tells_how_much_room_it_waits_for() {
    let (mut bench, mut channel) = Bench::open();
    let host = bench.echo.device().channels.get_mut(&0).unwrap();
    let packet = Outgoing::in_band(1, &[0; 1000]);
    let need = size_of::<Descriptor>() + 1000 + TRAILER_BYTES;
    let mut sent = 0;
    while host.send(&packet).unwrap() {
        sent += 1;
    }
    assert_eq!(sent, (channel.to_guest.size() as usize - 1) / need, "a full ring would look empty");
    assert_eq!(channel.to_guest.word(control::PENDING_SEND_SIZE) as usize, need);
    assert!(channel.receive().is_some());
    assert!(host.send(&packet).unwrap());
    assert_eq!(channel.to_guest.word(control::PENDING_SEND_SIZE), 0);
    assert!(matches!(host.send(&Outgoing::in_band(1, &[0; 1 << 16])), Err(BrokenRing::TooSmall(..))));
}

#[test]
fn guest_that_waits_for_room_is_signalled_once_when_there_is() {
    let (mut bench, mut channel) = Bench::open();
    let flag = channel.relid as u16;
    let host = bench.echo.device().channels.get_mut(&0).unwrap();
    let size = (size_of::<Descriptor>() + 1000 + TRAILER_BYTES) as u32;
    let count = (channel.to_host.size() - 1) / size;
    (0..count).for_each(|_| channel.send(kind::IN_BAND, 0, 0, &[], &[0; 1000]));
    let free = channel.to_host.size() - count * size;
    channel.to_host.set_word(control::PENDING_SEND_SIZE, free + size);
    let mut buf = PacketBuf::default();
    let signals: Vec<usize> = (0..4)
        .map(|_| {
            host.receive(&mut buf).unwrap().unwrap();
            bench.guest.events(0, flag)
        })
        .collect();
    assert_eq!(signals, [0, 1, 0, 0], "when more is free than it waits for");
}

#[test]
fn data_in_a_lent_buffer_names_its_ranges() {
    let (mut bench, mut channel) = Bench::open();
    let host = bench.echo.device().channels.get_mut(&0).unwrap();
    let ranges = [TransferRange { byte_count: 60.into(), byte_offset: 1728.into() }];
    assert!(host.send(&Outgoing::transfer_pages(7, 0xcafe, &ranges, b"message!")).unwrap());
    let packet = channel.receive().unwrap();
    assert_eq!((packet.kind, packet.flags, packet.transaction), (kind::TRANSFER_PAGES, 1, 7));
    assert_eq!(packet.extra, [&[0xfe, 0xca, 0, 0, 1, 0, 0, 0][..], ranges.as_bytes()].concat());
    assert_eq!(packet.payload, b"message!");
    channel.send(kind::TRANSFER_PAGES, 0, 1, &packet.extra, b"");
    let mut buf = PacketBuf::default();
    let back = host.receive(&mut buf).unwrap().unwrap();
    assert!(matches!(back.kind, Kind::TransferPages { set_id: 0xcafe, ranges: &[range] } if range == ranges[0]));
}

/// What a host makes of a ring whose write index is `index` and whose first bytes are `bytes`.
fn receive(index: u32, bytes: &[u8]) -> Result<bool, BrokenRing> {
    let (mut bench, mut channel) = Bench::open();
    channel.to_host.write(bytes);
    channel.to_host.set_word(control::WRITE_INDEX, index);
    let host = bench.echo.device().channels.get_mut(&0).unwrap();
    host.receive(&mut PacketBuf::default()).map(|packet| packet.is_some())
}

fn descriptor(kind: u16, offset8: u16, total8: u16) -> Vec<u8> {
    Descriptor { kind: kind.into(), data_offset8: offset8.into(), total_length8: total8.into(), flags: 0.into(), transaction: 0.into() }
        .as_bytes()
        .to_vec()
}

#[test]
fn indices_that_lie_break_the_ring() {
    let size = (PAGES - 1) * PAGE_SIZE as u32;
    for index in [size, size + 8, 4, u32::MAX, u32::MAX - 7] {
        assert_eq!(receive(index, &[]), Err(BrokenRing::Index(index, size)));
    }
    let (mut bench, channel) = Bench::open();
    channel.to_guest.set_word(control::READ_INDEX, size);
    let host = bench.echo.device().channels.get_mut(&0).unwrap();
    assert_eq!(host.send(&Outgoing::in_band(0, b"")), Err(BrokenRing::Index(size, size)));
}

#[test]
fn lengths_that_lie_break_the_ring() {
    for (index, offset8, total8) in [(8, 2, 2), (16, 2, 2), (24, 2, 3), (24, 2, 0), (24, 2, 1), (24, 0, 2), (24, 3, 2), (24, 2, u16::MAX)] {
        let bytes = descriptor(kind::IN_BAND, offset8, total8);
        assert_eq!(receive(index, &bytes), Err(BrokenRing::Packet), "{index} {offset8} {total8}");
    }
    assert_eq!(receive(24, &descriptor(kind::IN_BAND, 2, 2)), Ok(true));
    assert_eq!(receive(24, &descriptor(5, 2, 2)), Err(BrokenRing::Packet), "no such kind");
}

#[test]
fn ranges_that_lie_break_the_ring() {
    let ranges = |count: u32, range: [u32; 2]| {
        let words = [0, count, range[0], range[1], 1, 0];
        [descriptor(kind::GPA_DIRECT, 5, 5), words.iter().flat_map(|word| word.to_le_bytes()).collect()].concat()
    };
    assert_eq!(receive(48, &ranges(1, [4096, 0])), Ok(true));
    for (count, range) in [(2, [4096, 0]), (u32::MAX, [4096, 0]), (1, [4097, 0]), (1, [4096, 1]), (1, [u32::MAX, u32::MAX]), (3, [0, 0])] {
        assert_eq!(receive(48, &ranges(count, range)), Err(BrokenRing::Packet), "{count} {range:?}");
    }
    let transfer = [descriptor(kind::TRANSFER_PAGES, 3, 3), vec![0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]].concat();
    assert_eq!(receive(32, &transfer), Err(BrokenRing::Packet));
}

proptest! {
    #[test]
    fn no_bytes_in_a_ring_break_the_host(bytes in prop::collection::vec(any::<u8>(), 24..256), kind in 5u16..12, index in 0u32..40) {
        let mut bytes = bytes;
        bytes[..2].copy_from_slice(&kind.to_le_bytes());
        // Lengths that are often possible.
        for at in [3, 5] {
            bytes[at] = 0;
        }
        let _ = receive(index * 8, &bytes);
    }
}
