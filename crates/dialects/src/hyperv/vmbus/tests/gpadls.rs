//! Memory that the guest lends.

use abi::hyperv::vmbus::{GpadlBody, GpadlCreated, GpadlHeader, GpadlTorndown, Header, message};
use vmm::memory::PAGE_SIZE;
use zerocopy::IntoBytes;

use super::super::testing::MEMORY;
use super::*;

/// A bench whose echo has its channel open, and the channel's number.
fn bench() -> (Bench, u32) {
    let (bench, channel) = Bench::open();
    (bench, channel.relid)
}

fn header(relid: u32, gpadl: u32, ranges: u16, buflen: u16, (count, offset): (u32, u32)) -> GpadlHeader {
    GpadlHeader {
        header: Header::new(message::GPADL_HEADER),
        relid: relid.into(),
        gpadl: gpadl.into(),
        range_buflen: buflen.into(),
        range_count: ranges.into(),
        byte_count: count.into(),
        byte_offset: offset.into(),
    }
}

#[test]
fn long_list_comes_in_several_messages() {
    let (mut bench, relid) = bench();
    let pfns = bench.guest.pages(4096);
    let (gpadl, is_lent) = bench.guest.lend(relid, &pfns);
    assert!(is_lent);
    let buffer = bench.echo.device().channels[&0].gpadl(gpadl).unwrap();
    assert_eq!(u64::from(buffer.range().len()), 4096 * PAGE_SIZE);
    let part = buffer.range().part(4095 * PAGE_SIZE as u32, 8).unwrap();
    part.write(&bench.guest.memory, b"the last").unwrap();
    let mut bytes = [0; 8];
    vm_memory::Bytes::read_slice(bench.guest.memory.as_ref(), &mut bytes, vm_memory::GuestAddress(pfns[4095] * PAGE_SIZE)).unwrap();
    assert_eq!(&bytes, b"the last");
}

#[test]
fn pages_that_are_not_memory_are_refused() {
    let (mut bench, relid) = bench();
    for wild in [MEMORY / PAGE_SIZE, u64::MAX / PAGE_SIZE, u64::MAX] {
        let mut pfns = bench.guest.pages(40);
        pfns[39] = wild;
        assert!(!bench.guest.lend(relid, &pfns).1, "{wild:#x}");
    }
}

#[test]
fn lists_that_contradict_themselves_are_refused() {
    let (bench, relid) = bench();
    for (ranges, buflen, bytes) in [
        (0, 16, (4096, 0)),
        (2, 24, (4096, 0)),
        // Fewer pages than the bytes need.
        (1, 16, (4097, 0)),
        (1, 16, (4096, 1)),
        (1, 16, (u32::MAX, u32::MAX)),
        (1, 0, (4096, 0)),
        (1, 7, (1, 0)),
    ] {
        let header = header(relid, 1, ranges, buflen, bytes);
        bench.guest.post([header.as_bytes(), &1u64.to_le_bytes()].concat().as_slice());
        assert_ne!(bench.guest.expect::<GpadlCreated>(message::GPADL_CREATED).status.get(), 0, "{header:?}");
        assert!(bench.guest.next().is_none());
    }
}

#[test]
fn channel_that_is_not_there_is_lent_nothing() {
    let (mut bench, relid) = bench();
    let pfns = bench.guest.pages(2);
    assert!(!bench.guest.lend(relid + 1, &pfns).1);
}

#[test]
fn number_is_used_once() {
    let (mut bench, relid) = bench();
    let pfns = bench.guest.pages(2);
    let (gpadl, _) = bench.guest.lend(relid, &pfns);
    bench.guest.lend_as(gpadl, relid, &pfns);
    assert_ne!(bench.guest.expect::<GpadlCreated>(message::GPADL_CREATED).status.get(), 0);
    let buffer = bench.echo.device().channels[&0].gpadl(gpadl).unwrap();
    bench.guest.tear_down(relid, gpadl);
    bench.guest.lend_as(gpadl, relid, &pfns);
    assert_ne!(bench.guest.expect::<GpadlCreated>(message::GPADL_CREATED).status.get(), 0, "in use still");
    drop(buffer);
    assert_eq!(bench.guest.expect::<GpadlTorndown>(message::GPADL_TORNDOWN).gpadl.get(), gpadl);
    bench.guest.lend_as(gpadl, relid, &pfns);
    assert_eq!(bench.guest.expect::<GpadlCreated>(message::GPADL_CREATED).status.get(), 0);
}

#[test]
fn teardown_is_answered_when_nobody_uses_the_memory_any_more() {
    let (mut bench, relid) = bench();
    let pfns = bench.guest.pages(2);
    let (gpadl, _) = bench.guest.lend(relid, &pfns);
    let buffers = [0; 2].map(|_| bench.echo.device().channels[&0].gpadl(gpadl).unwrap());
    bench.guest.tear_down(relid, gpadl);
    assert!(bench.echo.device().channels[&0].gpadl(gpadl).is_none());
    for buffer in buffers {
        assert_eq!(bench.guest.next(), None);
        buffer.range().write(&bench.guest.memory, b"still in use").unwrap();
        drop(buffer);
    }
    assert_eq!(bench.guest.expect::<GpadlTorndown>(message::GPADL_TORNDOWN).gpadl.get(), gpadl);
    bench.guest.tear_down(relid, gpadl);
    assert_eq!(bench.guest.next(), None, "it is not there");
}

#[test]
fn rings_that_are_torn_down_while_the_channel_is_open_stay_until_it_is_closed() {
    let (mut bench, channel) = Bench::open();
    bench.guest.tear_down(channel.relid, channel.gpadl);
    bench.echo.work();
    assert_eq!(bench.guest.next(), None);
    bench.guest.post_relid(message::CLOSE, channel.relid);
    bench.echo.work();
    bench.guest.expect::<GpadlTorndown>(message::GPADL_TORNDOWN);
}

#[test]
fn bodies_without_a_header_are_ignored_and_pages_beyond_the_end_too() {
    let (bench, relid) = bench();
    let body = |gpadl: u32| GpadlBody { header: Header::new(message::GPADL_BODY), message_number: 0.into(), gpadl: gpadl.into() };
    let page = 1u64.to_le_bytes();
    bench.guest.post([body(5).as_bytes(), &page].concat().as_slice());
    assert_eq!(bench.guest.next(), None);
    bench.guest.post(header(relid, 5, 1, 8 + 24, (3 * 4096, 0)).as_bytes());
    bench.guest.post([body(5).as_bytes(), &page, &page].concat().as_slice());
    assert_eq!(bench.guest.next(), None);
    bench.guest.post([body(5).as_bytes(), &page, &page, &page].concat().as_slice());
    assert_eq!(bench.guest.expect::<GpadlCreated>(message::GPADL_CREATED).status.get(), 0);
}

#[test]
fn guest_that_lends_without_end_is_refused_and_can_give_back() {
    let (bench, relid) = bench();
    let pages = 8190;
    let begin = |gpadl: u32| bench.guest.post(&header(relid, gpadl, 1, 8 + 8 * pages, (u32::from(pages) * 4096, 0)));
    let mut gpadl = 1;
    // None of these is ever finished.
    while bench.guest.next().is_none() {
        gpadl += 1;
        assert!(gpadl < 1000, "no end");
        begin(gpadl);
    }
    bench.guest.tear_down(relid, 2);
    begin(gpadl);
    assert_eq!(bench.guest.next(), None, "there is room again");
}
