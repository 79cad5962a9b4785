//! vmt0 against the scripted host.

use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;

use abi::vmware::message::TCLO;

use super::tests::{Script, TIME};
use super::*;
use crate::detect::{Interface, Kind, detect};
use crate::driver::{Driver, Event, GuestInfo, News};
use crate::hal::{Hal, Nanos, SECOND};
use crate::net::{Address, Nic};
use crate::testing::FakeHal;

fn machine(script: Script) -> (FakeHal<Script>, Interface) {
    let hal = FakeHal::new(script).base(0x4000_0000, 0x4000_0010, abi::hypervisor::VMWARE);
    let interface = detect(&hal).interfaces.remove(0);
    (hal, interface)
}

/// Polls as a kernel does, until `end`, and collects the events.
fn run(hal: &FakeHal<Script>, vmt: &mut Vmt<'_>, end: Nanos) -> Vec<Event> {
    let mut events = Vec::new();
    for _ in 0..10_000 {
        let next = vmt.poll(hal.now(), &mut events).unwrap();
        if next > end {
            return events;
        }
        hal.wait_until(next);
    }
    panic!("the device polls for ever");
}

/// A device that has heard these requests, with all that came of them.
fn after(requests: &[&'static str], news: &[News]) -> (Vec<Event>, Vec<String>, Vec<String>) {
    let (hal, interface) = machine(Script::default());
    let mut vmt = Vmt::attach(&hal, &interface).unwrap();
    news.iter().for_each(|news| vmt.hear(news, hal.now()));
    hal.host().tclo.extend(requests);
    let events = run(&hal, &mut vmt, 2 * SECOND);
    let events = events.into_iter().filter(|event| !matches!(event, Event::Time(_))).collect();
    let host = hal.host();
    let said = host.requests.iter().map(|request| String::from_utf8_lossy(request).into_owned()).collect();
    (events, host.tclo_replies.clone(), said)
}

fn guest() -> GuestInfo {
    let addresses = vec![Address { ip: "192.0.2.7".parse().unwrap(), prefix: 24 }];
    GuestInfo {
        hostname: "puffy".to_string(),
        os_name_full: "Unikernel 1.0".to_string(),
        os_name: "Unikernel".to_string(),
        os_version: "1.0".to_string(),
        started: 0,
        nics: vec![Nic { mac: [2, 0, 0, 0, 0, 1], addresses }],
    }
}

#[test]
fn attaching_tells_the_host_that_there_are_tools() {
    let (_, _, said) = after(&[], &[]);
    assert_eq!(said, ["tools.capability.hgfs_server toolbox 1"]);
}

#[test]
fn host_without_guest_rpc_has_no_vmt() {
    struct Version;
    impl crate::testing::Host for Version {
        fn call(&mut self, _: crate::hal::Gate, r: &mut crate::hal::Registers, _: crate::hal::Transfer<'_>) -> Result<(), crate::HalError> {
            use abi::vmware::backdoor as words;
            match r.rcx as u16 {
                words::GETVERSION => (r.rax, r.rbx) = (6, words::MAGIC.into()),
                words::GETMHZ => r.rax = 2000,
                _ => (r.rax, r.rcx) = (u32::MAX.into(), 0),
            }
            Ok(())
        }
    }
    let (_, interface) = machine(Script::default());
    assert!(matches!(Vmt::attach(&FakeHal::new(Version), &interface), Err(AttachError::Channel(ChannelError::Refused))));
}

#[test]
fn requests_are_answered_in_order_and_at_once() {
    let (events, replies, _) = after(&["reset", "ping", "Set_Option autohide 1", "ping\0"], &[]);
    assert_eq!(replies, ["OK ATR toolbox", "OK ", "ERROR Unknown command", "OK "]);
    assert_eq!(events, []);
}

#[test]
fn capabilities_are_registered_in_openbsds_words() {
    let (_, replies, said) = after(&["Capabilities_Register"], &[]);
    assert_eq!(replies, ["OK "]);
    assert_eq!(said[1..], ["vmx.capability.unified_loop toolbox", "tools.capability.statechange ", "tools.set.version 2147483647"]);
}

#[test]
fn power_requests_reach_the_kernel_and_their_number_the_host() {
    let requests = [
        ("OS_Halt", 1, Some(Event::Shutdown(Kind::Vmware))),
        ("OS_Reboot", 2, Some(Event::Reboot(Kind::Vmware))),
        ("OS_PowerOn", 3, None),
        ("OS_Resume", 4, Some(Event::Resume(Kind::Vmware))),
        ("OS_Suspend", 5, Some(Event::Suspend(Kind::Vmware))),
    ];
    for (request, number, event) in requests {
        let (events, replies, said) = after(&[request], &[]);
        assert_eq!(replies, ["OK "], "{request}");
        assert_eq!(said.last().unwrap(), &alloc::format!("tools.os.statechange.status 1 {number}"));
        assert_eq!(events, Vec::from_iter(event));
    }
}

#[test]
fn host_hears_what_the_guest_is_and_its_uptime() {
    let (_, _, said) = after(&[], &[News::Guest(guest())]);
    let texts = ["SetGuestInfo  1 puffy", "SetGuestInfo  5 Unikernel 1.0", "SetGuestInfo  6 Unikernel"];
    assert_eq!(said[1..4], texts);
    assert!(said[4].starts_with("SetGuestInfo  10 \0\0\0\u{3}\0\0\0\u{1}"), "{:?}", said[4]);
    assert_eq!(said[5], "SetGuestInfo  7 0");
}

#[test]
fn host_hears_of_changes_only_but_of_the_uptime_each_time() {
    let (hal, interface) = machine(Script::default());
    let mut vmt = Vmt::attach(&hal, &interface).unwrap();
    vmt.hear(&News::Guest(guest()), hal.now());
    run(&hal, &mut vmt, SECOND);
    hal.host().requests.clear();
    vmt.hear(&News::Guest(GuestInfo { hostname: "fishy".to_string(), ..guest() }), hal.now());
    run(&hal, &mut vmt, 15 * SECOND);
    assert_eq!(hal.host().requests, [b"SetGuestInfo  1 fishy".to_vec(), b"SetGuestInfo  7 1500".to_vec()]);
}

#[test]
fn more_addresses_than_a_message_holds_keep_nothing_else_back() {
    let mut guest = guest();
    guest.nics[0].addresses = vec![guest.nics[0].addresses[0]; 3000];
    guest.nics.push(guest.nics[0].clone());
    let (events, _, said) = after(&[], &[News::Guest(guest)]);
    assert_eq!((said[3].as_str(), said[4].as_str()), ("SetGuestInfo  6 Unikernel", "SetGuestInfo  7 0"));
    assert_eq!(events, []);
}

#[test]
fn address_is_published_on_request() {
    let (_, replies, said) = after(&["Set_Option broadcastIP 1"], &[News::Guest(guest())]);
    assert_eq!(replies, ["OK "]);
    assert!(said.contains(&"info-set guestinfo.ip 192.0.2.7".to_string()), "{said:?}");
    let (_, replies, _) = after(&["Set_Option broadcastIP 1"], &[]);
    assert_eq!(replies, ["ERROR Unable to find guest IP address"]);
}

#[test]
fn time_is_set_at_the_start_and_after_a_resume_and_a_sample_otherwise() {
    let (hal, interface) = machine(Script::default());
    let mut vmt = Vmt::attach(&hal, &interface).unwrap();
    let mut set = Vec::new();
    let mut times = |events: Vec<Event>| {
        for event in events {
            if let Event::Time(time) = event {
                assert_eq!((time.seconds, time.nanoseconds), (TIME.0, TIME.1 * 1000));
                set.push(time.set);
            }
        }
    };
    times(run(&hal, &mut vmt, 20 * SECOND));
    hal.host().tclo.push_back("OS_Resume");
    times(run(&hal, &mut vmt, 40 * SECOND));
    assert_eq!(set, [true, false, true, false]);
}

#[test]
fn backup_freezes_and_thaws() {
    let (hal, interface) = machine(Script::default());
    let mut vmt = Vmt::attach(&hal, &interface).unwrap();
    hal.host().tclo.extend(["vmbackup.snapshotDone", "vmbackup.start 1"]);
    assert!(run(&hal, &mut vmt, SECOND / 2).contains(&Event::Freeze(Kind::Vmware)));
    vmt.hear(&News::Frozen(true), hal.now());
    run(&hal, &mut vmt, 3 * SECOND);
    hal.host().tclo.push_back("vmbackup.snapshotDone");
    assert!(run(&hal, &mut vmt, 5 * SECOND).contains(&Event::Thaw(Kind::Vmware)));
    let host = hal.host();
    assert_eq!(host.tclo_replies, ["ERROR Unknown command", "OK ", "OK "]);
    let said: Vec<String> = host.requests[1..].iter().map(|request| String::from_utf8(request.clone()).unwrap()).collect();
    assert_eq!(said[..2], ["vmbackup.eventSet reset 0 ", "vmbackup.eventSet prov.snapshotCommit 0 "]);
    assert_eq!(said.last().unwrap(), "vmbackup.eventSet req.done 0 ");
    assert!(said.iter().filter(|said| *said == "vmbackup.eventSet req.keepAlive 0 ").count() >= 2, "{said:?}");
}

#[test]
fn another_client_of_tclo_is_noticed_and_left_alone() {
    let (hal, interface) = machine(Script::default());
    let mut vmt = Vmt::attach(&hal, &interface).unwrap();
    let mut events = Vec::new();
    while hal.now() < 30 * SECOND {
        hal.host().close_all(TCLO);
        let next = vmt.poll(hal.now(), &mut events).unwrap();
        hal.wait_until(next);
    }
    let messages: Vec<&Event> = events.iter().filter(|event| matches!(event, Event::Message(_))).collect();
    assert!(matches!(messages[..], [Event::Message(text)] if text.contains("vmtoolsd")), "{messages:?}");
}

#[test]
fn channel_lost_once_is_opened_again() {
    let (hal, interface) = machine(Script::default());
    let mut vmt = Vmt::attach(&hal, &interface).unwrap();
    run(&hal, &mut vmt, 10 * SECOND);
    hal.host().close_all(TCLO);
    run(&hal, &mut vmt, 13 * SECOND);
    hal.host().tclo.push_back("ping");
    run(&hal, &mut vmt, 15 * SECOND);
    assert_eq!(hal.host().tclo_replies, ["OK "]);
}

#[test]
fn host_that_falls_silent_is_told_once_and_nothing_hangs() {
    let (hal, interface) = machine(Script::default());
    let mut vmt = Vmt::attach(&hal, &interface).unwrap();
    vmt.hear(&News::Guest(guest()), hal.now());
    hal.host().silent = true;
    let events = run(&hal, &mut vmt, 60 * SECOND);
    let messages: Vec<&Event> = events.iter().filter(|event| matches!(event, Event::Message(_))).collect();
    assert_eq!(messages, [&Event::Message("vmt0: the host did not answer in time".to_string())]);
    // And when it is back, it hears everything again.
    hal.host().silent = false;
    hal.host().requests.clear();
    run(&hal, &mut vmt, 90 * SECOND);
    assert!(hal.host().requests.contains(&b"SetGuestInfo  1 puffy".to_vec()));
}

#[test]
fn machine_that_goes_down_takes_its_tools_with_it() {
    let (hal, interface) = machine(Script::default());
    let mut vmt = Vmt::attach(&hal, &interface).unwrap();
    run(&hal, &mut vmt, SECOND);
    vmt.hear(&News::GoingDown { reboot: false }, hal.now());
    assert_eq!(hal.host().requests.last().unwrap(), b"tools.capability.hgfs_server toolbox 0");
    assert_eq!(hal.host().open_channels(), 0);
}
