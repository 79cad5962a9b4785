//! Versions, offers, the end of a connection.

use std::time::Duration;

use abi::hyperv::ring::kind;
use abi::hyperv::vmbus::{GpadlTorndown, SINT, VersionResponse, interrupt_page, message, monitor, version};
use abi::hyperv::vmbus::{Header, InitiateContact, MAX_MESSAGE, MESSAGE_CONNECTION, MESSAGE_CONNECTION_5, Offer as OfferMessage, Relid};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};
use vmm::time::StepClock;
use zerocopy::{FromBytes, IntoBytes};

use super::*;

#[test]
fn versions_from_windows_server_2008_to_2022_are_spoken() {
    let guest = Guest::new();
    for unknown in [0, 0x000d_0000, 0x0005_0004, 0x0006_0000, u32::MAX] {
        assert_eq!(guest.contact(unknown).supported, 0, "{unknown:#x}");
    }
    for known in [version::WIN8, version::WIN8_1, version::WIN10, version::WIN10_RS3] {
        assert_eq!(guest.contact(known).supported, 1, "{known:#x}");
    }
    for known in [version::WIN10_V5, version::WIN10_V5_1, version::WIN10_V5_2, version::WIN10_V5_3] {
        let answer = guest.contact(known);
        assert_eq!((answer.supported, answer.message_connection.get()), (1, MESSAGE_CONNECTION_5), "{known:#x}");
    }
}

#[test]
fn offers_are_in_the_same_order_at_each_start() {
    let guest = Guest::new();
    let _echoes: Vec<_> = [3, 1, 2].map(|instance| attach(&guest, Echo { instance, ..Echo::default() })).into();
    for _ in 0..2 {
        let offers = guest.connect();
        assert_eq!(offers.iter().map(|offer| offer.instance.0[0]).collect::<Vec<_>>(), [1, 2, 3]);
        assert_eq!(offers.iter().map(|offer| offer.relid.get()).collect::<Vec<_>>(), [1, 2, 3]);
        assert!(offers.iter().all(|offer| offer.is_dedicated_interrupt.get() == 1 && offer.monitor_allocated == 0));
    }
    guest.post(&Header::new(message::REQUEST_OFFERS));
    assert_eq!(guest.next(), None, "a second request says nothing new");
}

#[test]
fn nothing_counts_before_contact() {
    let guest = Guest::new();
    guest.post(&Header::new(message::REQUEST_OFFERS));
    guest.post(&Header::new(message::UNLOAD));
    guest.lend_as(1, 1, &[1]);
    assert_eq!(guest.next(), None);
}

#[test]
fn device_that_comes_later_is_offered_and_one_that_goes_is_rescinded() {
    let bench = Bench::new(0);
    let guest = &bench.guest;
    assert_eq!(guest.connect().len(), 1);
    let (late, _) = attach(guest, Echo { instance: 1, ..Echo::default() });
    let offer: OfferMessage = guest.expect(message::OFFER);
    assert_eq!(offer.instance, Guid([1; 16]));
    drop(late);
    let rescind: Relid = guest.expect(message::RESCIND);
    assert_eq!(rescind.relid, offer.relid);
    let (_early, _) = attach(guest, Echo { instance: 2, ..Echo::default() });
    let other: OfferMessage = guest.expect(message::OFFER);
    assert_ne!(other.relid, offer.relid, "the guest still has the number");
    guest.post_relid(message::RELID_RELEASED, offer.relid.get());
    let (_last, _) = attach(guest, Echo { instance: 3, ..Echo::default() });
    assert_eq!(guest.expect::<OfferMessage>(message::OFFER).relid, offer.relid);
}

#[test]
fn number_of_a_device_that_is_there_cannot_be_released() {
    let mut bench = Bench::new(0);
    let relid = bench.guest.connect()[0].relid.get();
    bench.guest.post_relid(message::RELID_RELEASED, relid);
    bench.guest.open(relid, PAGES);
}

#[test]
fn unload_is_answered_when_devices_have_let_go() {
    let (mut bench, mut channel) = Bench::open();
    bench.guest.post(&Header::new(message::UNLOAD));
    assert_eq!(bench.guest.next(), None, "the device has the rings");
    channel.send(kind::IN_BAND, 1, 1, &[], b"too late");
    bench.echo.work();
    assert_eq!(bench.guest.expect::<Header>(message::UNLOAD_RESPONSE), Header::new(message::UNLOAD_RESPONSE));
    assert_eq!(channel.receive(), None);
    assert!(bench.echo.device().channels.is_empty());
}

#[test]
fn kernel_after_kexec_finds_everything_closed_and_as_it_was_offered() {
    let (mut bench, _) = Bench::open();
    let contact = InitiateContact {
        header: Header::new(message::INITIATE_CONTACT),
        version: version::WIN10.into(),
        target_vp: 3.into(),
        interrupt_page: 0.into(),
        monitor_to_guest: 0.into(),
        monitor_to_host: 0.into(),
    };
    bench.guest.post(&contact);
    // What is said before the answer does not count.
    bench.guest.post(&Header::new(message::REQUEST_OFFERS));
    assert_eq!(bench.guest.next(), None, "the device has the rings");
    bench.echo.work();
    let (target, answer) = bench.guest.next().unwrap();
    assert_eq!(target, 3);
    assert_eq!(VersionResponse::read_from_bytes(&answer).unwrap().supported, 1);
    let offers = bench.guest.offers();
    let mut channel = bench.guest.open(offers[0].relid.get(), PAGES);
    channel.send(kind::IN_BAND, 1, 9, &[], b"anew....");
    bench.echo.work();
    assert_eq!(channel.receive().map(|packet| packet.payload), Some(b"anew....".to_vec()));
}

#[test]
fn reset_closes_everything_without_a_word() {
    let (mut bench, _) = Bench::open();
    bench.guest.bus.reset();
    bench.echo.work();
    assert!(bench.echo.device().channels.is_empty());
    assert_eq!(bench.guest.next(), None);
    assert_eq!(bench.guest.connect().len(), 1);
}

#[test]
fn guests_of_the_interrupt_page_have_their_events_there() {
    let mut bench = Bench::new(0);
    let page = 0x3000;
    let contact = |interrupt_page: u64| InitiateContact {
        header: Header::new(message::INITIATE_CONTACT),
        version: version::WS2008.into(),
        target_vp: 0.into(),
        interrupt_page: interrupt_page.into(),
        monitor_to_guest: 0.into(),
        monitor_to_host: 0.into(),
    };
    for wild in [1 << 40, u64::MAX, page + 4] {
        bench.guest.post(&contact(wild));
        assert_eq!(bench.guest.expect::<VersionResponse>(message::VERSION_RESPONSE).supported, 0, "{wild:#x}");
    }
    bench.guest.post(&contact(page));
    assert_eq!(bench.guest.expect::<VersionResponse>(message::VERSION_RESPONSE).supported, 1);
    let relid = bench.guest.offers()[0].relid.get();
    let mut channel = bench.guest.open(relid, PAGES);
    channel.send(kind::IN_BAND, 1, 1, &[], b"question");
    bench.rings();
    bench.guest.memory.write_obj(1u32 << relid, GuestAddress(page + interrupt_page::TO_HOST)).unwrap();
    assert_eq!(bench.guest.bus.signal_event(EVENT_CONNECTION, 0), Status::SUCCESS);
    assert_eq!(bench.rings(), 1);
    bench.echo.work();
    assert_eq!(bench.guest.events(0, 0), 1, "flag 0 tells to look into the page");
    assert_eq!(bench.guest.memory.read_obj::<u32>(GuestAddress(page + interrupt_page::TO_GUEST)).unwrap(), 1 << relid);
}

/// Contact of a version, with a monitor page.
fn contact(version: u32, monitor_to_host: u64) -> InitiateContact {
    InitiateContact {
        header: Header::new(message::INITIATE_CONTACT),
        version: version.into(),
        target_vp: 0.into(),
        interrupt_page: u64::from(SINT).into(),
        monitor_to_guest: 0.into(),
        monitor_to_host: monitor_to_host.into(),
    }
}

#[test]
fn old_guests_signal_devices_by_the_monitor_page() {
    let mut bench = Bench::new(0);
    let timers = Timers::new(Arc::new(StepClock::new(Duration::ZERO)));
    bench.guest.bus.watch_monitor(&timers);
    let page = 0x3000;
    for (version, wild) in [(version::WIN10_RS3, page), (version::WIN10, 0), (version::WIN10, 1 << 40), (version::WIN10, page + 8)] {
        bench.guest.post(&contact(version, wild));
        assert_eq!(bench.guest.expect::<VersionResponse>(message::VERSION_RESPONSE).supported, 1);
        assert_eq!(bench.guest.offers()[0].monitor_allocated, 0, "{version:#x} {wild:#x}");
    }
    bench.guest.post(&contact(version::WIN10, page));
    bench.guest.expect::<VersionResponse>(message::VERSION_RESPONSE);
    let offer = bench.guest.offers()[0];
    assert_eq!((offer.monitor_allocated, u32::from(offer.monitor_id)), (1, offer.relid.get()));
    let later = || {
        timers.clock().advance_to(timers.clock().now() + MONITOR_PERIOD);
        timers.run_due();
    };
    let trigger = GuestAddress(page + monitor::TRIGGERS);
    let signal = |guest: &Guest| guest.memory.write_obj(1u32 << offer.monitor_id, trigger).unwrap();
    let channel = bench.guest.open(offer.relid.get(), PAGES);
    bench.rings();
    for _ in 0..2 {
        signal(&bench.guest);
        later();
        assert_eq!(bench.rings(), 1);
        later();
        assert_eq!(bench.rings(), 0, "it has been taken");
    }
    bench.guest.close(channel);
    bench.rings();
    signal(&bench.guest);
    (0..3).for_each(|_| later());
    assert_eq!(bench.guest.memory.read_obj::<u32>(trigger).unwrap(), 1 << offer.monitor_id, "nobody looks any more");
}

/// Linux' cards on hosts before Windows 10 take their buffers back while the channel is open, and wait: a device may let go while the page is looked at.
#[test]
fn memory_of_a_device_that_lets_go_while_the_monitor_page_is_looked_at_is_given_back() {
    let mut guest = Guest::new();
    let timers = Timers::new(Arc::new(StepClock::new(Duration::ZERO)));
    guest.bus.watch_monitor(&timers);
    let in_use = Arc::new(Mutex::new(None));
    let last = Arc::clone(&in_use);
    let mut echo = guest.bus.attach(Echo::default(), Arc::new(move || drop(last.lock().unwrap().take())));
    let page = 0x3000;
    guest.post(&contact(version::WIN8, page));
    guest.expect::<VersionResponse>(message::VERSION_RESPONSE);
    let offer = guest.offers()[0];
    let relid = offer.relid.get();
    let _channel = guest.open(relid, PAGES);
    echo.work();
    let pfns = guest.pages(2);
    let (gpadl, _) = guest.lend(relid, &pfns);
    *in_use.lock().unwrap() = echo.device().channels[&0].gpadl(gpadl);
    guest.tear_down(relid, gpadl);
    assert_eq!(guest.next(), None);
    guest.memory.write_obj(1u32 << offer.monitor_id, GuestAddress(page + monitor::TRIGGERS)).unwrap();
    timers.clock().advance_to(MONITOR_PERIOD);
    timers.run_due();
    assert_eq!(guest.expect::<GpadlTorndown>(message::GPADL_TORNDOWN).gpadl.get(), gpadl);
}

#[test]
fn connections_that_are_not_there_are_refused() {
    let bench = Bench::new(0);
    let relid = bench.guest.connect()[0].relid.get();
    let bus = &bench.guest.bus;
    assert_eq!(bus.post_message(2, MESSAGE_TYPE, &[0; 8]), Status::INVALID_CONNECTION_ID);
    assert_eq!(bus.post_message(MESSAGE_CONNECTION, 2, &[0; 8]), Status::INVALID_PARAMETER);
    for unknown in [0, 1, EVENT_CONNECTION, CHANNEL_CONNECTIONS, CHANNEL_CONNECTIONS + relid + 1, u32::MAX] {
        assert_eq!(bus.signal_event(unknown, 0), Status::INVALID_CONNECTION_ID, "{unknown:#x}");
    }
    assert_eq!(bus.signal_event(CHANNEL_CONNECTIONS + relid, 1), Status::INVALID_PARAMETER);
    assert_eq!(bus.signal_event(CHANNEL_CONNECTIONS + relid, 0), Status::SUCCESS);
    assert_eq!(bench.rings(), 0, "nobody has opened it");
}

proptest! {
    #[test]
    fn no_message_breaks_the_bus(messages in prop::collection::vec((0u32..26, prop::collection::vec(any::<u8>(), 0..MAX_MESSAGE)), 0..64)) {
        let mut bench = Bench::new(2);
        let relid = bench.guest.connect()[0].relid.get();
        bench.guest.open(relid, PAGES);
        for (kind, mut bytes) in messages {
            if let Some(place) = bytes.get_mut(..8) {
                place.copy_from_slice(Header::new(kind).as_bytes());
            }
            // Often about the channel that there is.
            if let Some(place) = bytes.get_mut(8..12).filter(|place| place[0] & 1 == 0) {
                place.copy_from_slice(&relid.to_le_bytes());
            }
            bench.guest.post(bytes.as_slice());
            bench.echo.work();
        }
        bench.guest.bus.reset();
        bench.echo.work();
        while bench.guest.next().is_some() {}
        prop_assert_eq!(bench.guest.connect().len(), 1);
    }
}
