//! Opens, closes, subchannels, moves between processors.

use abi::hyperv::ring::kind;
use abi::hyperv::vmbus::{Header, ModifyChannel, ModifyChannelResponse, Offer as OfferMessage, OpenResult, Relid, message, version};

use super::*;

#[test]
fn what_the_guest_asks_comes_back() {
    let (mut bench, mut channel) = Bench::open();
    channel.send(kind::IN_BAND, 1, 0x1234, &[], b"twelve bytes");
    bench.signal(channel.relid);
    let answer = channel.receive().unwrap();
    assert_eq!((answer.kind, answer.flags, answer.transaction), (kind::COMPLETION, 0, 0x1234));
    assert_eq!(answer.payload, b"twelve bytes\0\0\0\0");
    assert_eq!(bench.guest.events(0, channel.relid as u16), 1);
    channel.send(kind::IN_BAND, 0, 0, &[], b"no answer");
    bench.signal(channel.relid);
    assert_eq!(channel.receive(), None);
}

#[test]
fn channel_is_opened_once() {
    let (bench, channel) = Bench::open();
    assert!(!bench.guest.open_with(channel.relid, channel.gpadl, PAGES, 0));
    assert!(!bench.guest.open_with(channel.relid + 1, channel.gpadl, PAGES, 0), "no such channel");
    assert!(bench.guest.close(channel) || bench.guest.next().is_none());
}

#[test]
fn channel_cannot_be_opened_with_pages_that_are_no_rings() {
    let mut bench = Bench::new(0);
    let (late, _) = attach(&bench.guest, Echo { instance: 1, ..Echo::default() });
    let offers = bench.guest.connect();
    let [relid, other] = [0, 1].map(|index| offers[index].relid.get());
    let pfns = bench.guest.pages(4);
    let (gpadl, _) = bench.guest.lend(relid, &pfns);
    for downstream in [0, 1, 3, 4, 5, u32::MAX] {
        assert!(!bench.guest.open_with(relid, gpadl, downstream, 0), "{downstream}");
    }
    assert!(!bench.guest.open_with(relid, gpadl + 1, 2, 0), "no such pages");
    assert!(!bench.guest.open_with(other, gpadl, 2, 0), "another channel's pages");
    assert!(bench.guest.open_with(relid, gpadl, 2, 0));
    drop(late);
}

#[test]
fn close_waits_for_the_device_before_pages_are_given_back() {
    let (mut bench, channel) = Bench::open();
    let gpadl = channel.gpadl;
    assert!(!bench.guest.close(channel), "the device has the rings");
    bench.echo.work();
    let torn: abi::hyperv::vmbus::GpadlTorndown = bench.guest.expect(message::GPADL_TORNDOWN);
    assert_eq!(torn.gpadl.get(), gpadl);
}

#[test]
fn open_right_after_close_waits_for_the_device() {
    let (mut bench, channel) = Bench::open();
    bench.guest.post_relid(message::CLOSE, channel.relid);
    bench.guest.post_open(channel.relid, channel.gpadl, PAGES, 0);
    assert_eq!(bench.guest.next(), None);
    bench.echo.work();
    assert_eq!(bench.guest.expect::<OpenResult>(message::OPEN_RESULT).status.get(), 0);
    assert!(bench.echo.device().channels.is_empty(), "the bell rang for it");
    bench.echo.work();
    assert_eq!(bench.echo.device().channels.len(), 1);
}

#[test]
fn flood_of_closes_and_opens_is_one_close_and_one_open() {
    let (mut bench, channel) = Bench::open();
    bench.rings();
    for _ in 0..10_000 {
        bench.guest.post_relid(message::CLOSE, channel.relid);
        bench.guest.post_open(channel.relid, channel.gpadl, PAGES, 0);
    }
    assert_eq!(bench.rings(), 1);
    bench.echo.work();
    assert_eq!(bench.guest.expect::<OpenResult>(message::OPEN_RESULT).status.get(), 0);
    assert_eq!(bench.guest.next(), None);
}

#[test]
fn broken_ring_is_dead_until_it_is_opened_again() {
    let (mut bench, mut channel) = Bench::open();
    channel.to_host.set_word(abi::hyperv::ring::control::WRITE_INDEX, 3);
    bench.signal(channel.relid);
    assert!(bench.echo.device().channels.is_empty());
    channel.send(kind::IN_BAND, 1, 1, &[], b"too late");
    bench.signal(channel.relid);
    assert_eq!(channel.receive(), None);
    let relid = channel.relid;
    assert!(bench.guest.close(channel), "the device has let go already");
    let mut channel = bench.guest.open(relid, PAGES);
    bench.echo.work();
    channel.send(kind::IN_BAND, 1, 1, &[], b"in time.");
    bench.signal(relid);
    assert!(channel.receive().is_some());
}

#[test]
fn subchannels_come_when_the_device_asks_and_go_with_the_first_channel() {
    let mut bench = Bench::new(2);
    let relid = bench.guest.connect()[0].relid.get();
    let first = bench.guest.open(relid, PAGES);
    bench.echo.work();
    for count in [1, 5, 5] {
        bench.echo.device().channels[&0].offer_sub_channels(count);
    }
    let [one, two] = [1, 2].map(|index| {
        let offer: OfferMessage = bench.guest.expect(message::OFFER);
        assert_eq!((offer.sub_channel_index.get(), offer.instance), (index, Guid([0; 16])));
        offer.relid.get()
    });
    assert_eq!(bench.guest.next(), None, "the device has two at most, and each is offered once");
    let mut sub = bench.guest.open(two, PAGES);
    bench.echo.work();
    sub.send(kind::IN_BAND, 1, 5, &[], b"sub");
    bench.signal(two);
    assert!(sub.receive().is_some());
    bench.echo.device().channels[&2].offer_sub_channels(2);
    assert_eq!(bench.guest.next(), None, "only the first channel can ask");

    bench.guest.post_relid(message::CLOSE, first.relid);
    for expected in [one, two] {
        assert_eq!(bench.guest.expect::<Relid>(message::RESCIND).relid.get(), expected);
    }
    assert!(!bench.guest.open_with(one, first.gpadl, PAGES, 0), "it is gone");
    bench.guest.close(sub);
    bench.echo.work();
    bench.guest.post_relid(message::RELID_RELEASED, one);
    bench.guest.post_relid(message::RELID_RELEASED, two);
    assert!(bench.echo.device().channels.is_empty());
}

#[test]
fn device_that_goes_takes_its_open_channels_along() {
    let (bench, channel) = Bench::open();
    let Bench { guest, echo, .. } = bench;
    drop(echo);
    assert_eq!(guest.expect::<Relid>(message::RESCIND).relid.get(), channel.relid);
    let relid = channel.relid;
    assert!(guest.close(channel));
    guest.post_relid(message::RELID_RELEASED, relid);
    assert_eq!(guest.bus.signal_event(CHANNEL_CONNECTIONS + relid, 0), Status::INVALID_CONNECTION_ID);
}

#[test]
fn events_follow_the_channel_to_another_processor() {
    let (mut bench, mut channel) = Bench::open();
    let modify = |relid: u32| ModifyChannel { header: Header::new(message::MODIFY_CHANNEL), relid: relid.into(), target_vp: 2.into() };
    bench.guest.post(&modify(channel.relid));
    assert_eq!(bench.guest.expect::<ModifyChannelResponse>(message::MODIFY_CHANNEL_RESPONSE).status.get(), 0);
    bench.guest.post(&modify(channel.relid + 1));
    assert_ne!(bench.guest.expect::<ModifyChannelResponse>(message::MODIFY_CHANNEL_RESPONSE).status.get(), 0);
    channel.send(kind::IN_BAND, 1, 1, &[], b"");
    bench.signal(channel.relid);
    assert_eq!((bench.guest.events(0, channel.relid as u16), bench.guest.events(2, channel.relid as u16)), (0, 1));
}

#[test]
fn older_guests_hear_nothing_of_their_channel_s_move() {
    let mut bench = Bench::new(0);
    bench.guest.contact(version::WIN10_RS3);
    let relid = bench.guest.offers()[0].relid.get();
    bench.guest.open(relid, PAGES);
    bench.guest.post(&ModifyChannel { header: Header::new(message::MODIFY_CHANNEL), relid: relid.into(), target_vp: 2.into() });
    assert_eq!(bench.guest.next(), None);
}
