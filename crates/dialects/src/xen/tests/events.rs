use std::sync::atomic::AtomicUsize;

use abi::xen::event_channel::{BindIpi, BindVirq, VIRQ_TIMER};
use abi::xen::hypercall::{RegisterVcpuInfo, SetSingleshot, errno, vcpu};
use abi::xen::shared_info as layout;

use super::*;

fn ipi(guest: &Guest, vcpu: u32) -> u32 {
    let (answer, bind) = guest.call_with(number::EVENT_CHANNEL_OP, evtchn::op::BIND_IPI, &BindIpi { vcpu: vcpu.into(), port: 0.into() });
    assert_eq!(answer, 0);
    bind.port.get()
}

fn timer(guest: &Guest, vcpu: u32) -> (i64, u32) {
    let bind = BindVirq { virq: VIRQ_TIMER.into(), vcpu: vcpu.into(), port: 0.into() };
    let (answer, bind) = guest.call_with(number::EVENT_CHANNEL_OP, evtchn::op::BIND_VIRQ, &bind);
    (answer, bind.port.get())
}

/// What a processor's vcpu info at `info` says: upcall pending, and the selector.
fn waiting(guest: &Guest, info: u64) -> (u8, u64) {
    (guest.memory.read_obj(GuestAddress(info)).unwrap(), guest.u64_at(info + 8))
}

#[test]
fn shared_info_has_the_time_at_the_moment_it_is_mapped() {
    let guest = Guest::new();
    guest.clock.advance_to(5_000);
    assert_eq!(guest.place(memory::SPACE_SHARED_INFO, 0, SHARED_INFO), 0);
    let time = SHARED_INFO + 64 + 32;
    assert_eq!(guest.u32_at(time) & 1, 0, "complete");
    assert_eq!((guest.u64_at(time + 8), guest.u64_at(time + 16)), (5_000, 5_000));
    assert_ne!(guest.u32_at(time + 24), 0, "Linux divides by it");
    assert_eq!(guest.u32_at(SHARED_INFO + layout::WALL_CLOCK + 4), 1_000_000);
}

#[test]
fn event_sets_its_bits_and_interrupts_once() {
    let guest = Guest::running();
    let port = ipi(&guest, 1);
    for _ in 0..3 {
        assert_eq!(guest.port_call(evtchn::op::SEND, port), 0);
    }
    assert_eq!(guest.u64_at(SHARED_INFO + layout::EVTCHN_PENDING), 1 << port);
    assert_eq!(waiting(&guest, SHARED_INFO + 64), (1, 1));
    assert_eq!(guest.interrupts(), [(0xfee0_1000, VECTOR.into())]);
}

#[test]
fn masked_event_waits_for_unmask() {
    let guest = Guest::running();
    let port = ipi(&guest, 0);
    guest.memory.write_obj(1u64 << port, GuestAddress(SHARED_INFO + layout::EVTCHN_MASK)).unwrap();
    assert_eq!(guest.port_call(evtchn::op::SEND, port), 0);
    assert_eq!((waiting(&guest, SHARED_INFO), guest.interrupts().len()), ((0, 0), 0));
    assert_eq!(guest.port_call(evtchn::op::UNMASK, port), 0);
    assert_eq!((waiting(&guest, SHARED_INFO), guest.interrupts().len()), ((1, 1), 1));
    assert_eq!(guest.u64_at(SHARED_INFO + layout::EVTCHN_MASK), 0);
}

#[test]
fn vcpu_info_moves_with_what_waits_and_its_vector_comes_at_once() {
    let guest = Guest::new();
    assert_eq!(guest.place(memory::SPACE_SHARED_INFO, 0, SHARED_INFO), 0);
    let port = ipi(&guest, 0);
    assert_eq!(guest.port_call(evtchn::op::SEND, port), 0);
    let place = RegisterVcpuInfo { mfn: 6.into(), offset: 0x40.into(), reserved: 0.into() };
    guest.memory.write_slice(place.as_bytes(), GuestAddress(ARGUMENT)).unwrap();
    assert_eq!(guest.call(number::VCPU_OP, [vcpu::REGISTER_VCPU_INFO, 0, ARGUMENT, 0]), 0);
    assert_eq!(waiting(&guest, 0x6040), (1, 1));
    assert!(guest.interrupts().is_empty());
    let set = UpcallVector { vcpu: 0.into(), vector: VECTOR, pad: [0; 3] };
    assert_eq!(guest.call_with(number::HVM_OP, words::op::SET_UPCALL_VECTOR, &set).0, 0);
    assert_eq!(guest.interrupts().len(), 1);
    for (mfn, offset) in [(6u64, 0xfc1u32), (6, 0xffff_ffff), (RAM / PAGE_SIZE, 0), (u64::MAX, 0)] {
        let place = RegisterVcpuInfo { mfn: mfn.into(), offset: offset.into(), reserved: 0.into() };
        guest.memory.write_slice(place.as_bytes(), GuestAddress(ARGUMENT)).unwrap();
        assert_eq!(guest.call(number::VCPU_OP, [vcpu::REGISTER_VCPU_INFO, 0, ARGUMENT, 0]), -errno::EINVAL);
    }
}

#[test]
fn timer_fires_when_due_and_at_once_when_late() {
    let guest = Guest::running();
    let (answer, port) = timer(&guest, 0);
    assert_eq!(answer, 0);
    assert_eq!(timer(&guest, 0).0, -errno::EEXIST);
    let set = |timeout: u64, flags: u32| {
        let timer = SetSingleshot { timeout: timeout.into(), flags: flags.into(), pad: 0.into() };
        guest.memory.write_slice(timer.as_bytes(), GuestAddress(ARGUMENT)).unwrap();
        guest.call(number::VCPU_OP, [vcpu::SET_SINGLESHOT_TIMER, 0, ARGUMENT, 0])
    };
    assert_eq!(set(1_000, 0), 0);
    guest.timers.run_due();
    assert!(guest.interrupts().is_empty());
    guest.clock.advance_to(2_000);
    guest.timers.run_due();
    assert_eq!(guest.interrupts().len(), 1);
    assert_eq!(guest.u64_at(SHARED_INFO + layout::EVTCHN_PENDING), 1 << port);
    assert_eq!(set(1_000, vcpu::SINGLESHOT_FUTURE), -errno::ETIME);
    assert_eq!(set(1_000, 0), 0);
    assert_eq!(guest.timers.next_deadline(), Some(1_000));
}

#[test]
fn backend_hears_the_guest_until_it_unbinds() {
    let guest = Guest::running();
    let (port, heard) = (guest.port(), Arc::new(AtomicUsize::new(0)));
    let sink = heard.clone();
    guest
        .xen
        .bind(
            port,
            Arc::new(move || {
                sink.fetch_add(1, Ordering::Relaxed);
            }),
        )
        .unwrap();
    assert_eq!(guest.xen.bind(port, Arc::new(|| {})), Err(PortError::Invalid), "it is taken");
    assert_eq!(guest.port_call(evtchn::op::SEND, port), 0);
    guest.xen.unbind(port);
    assert_eq!(guest.port_call(evtchn::op::SEND, port), 0);
    assert_eq!(heard.load(Ordering::Relaxed), 1);
}

#[test]
fn ports_that_are_not_the_guests_to_use_are_refused() {
    let guest = Guest::running();
    let closed = guest.port();
    assert_eq!(guest.port_call(evtchn::op::CLOSE, closed), 0);
    for port in [0, closed, 4095, 4096, u32::MAX] {
        for operation in [evtchn::op::CLOSE, evtchn::op::SEND, evtchn::op::UNMASK] {
            assert_eq!(guest.port_call(operation, port), -errno::EINVAL, "{operation} {port}");
        }
        assert!(guest.xen.bind(port, Arc::new(|| {})).is_err());
        guest.xen.notify(port);
    }
    assert_eq!(timer(&guest, 2).0, -errno::ENOENT, "there are two processors");
}

#[test]
fn guest_that_takes_all_ports_is_told_that_there_are_no_more() {
    let guest = Guest::running();
    while guest.call_with(number::EVENT_CHANNEL_OP, evtchn::op::BIND_IPI, &BindIpi::default()).0 == 0 {}
    assert_eq!(guest.call_with(number::EVENT_CHANNEL_OP, evtchn::op::BIND_IPI, &BindIpi::default()).0, -errno::ENOSPC);
    assert_eq!(guest.port_call(evtchn::op::SEND, 4095), 0);
}

#[test]
fn events_before_the_shared_info_go_nowhere() {
    let guest = Guest::new();
    let port = ipi(&guest, 0);
    assert_eq!(guest.port_call(evtchn::op::SEND, port), 0);
    assert!(guest.interrupts().is_empty());
}

#[test]
fn reset_forgets_all_but_the_builders_ports() {
    let guest = Guest::running();
    let store = guest.xen.open_store(Arc::new(|| {})).unwrap();
    let other = guest.port();
    guest.xen.reset();
    assert_eq!(guest.port_call(evtchn::op::SEND, store), 0);
    assert_eq!(guest.port_call(evtchn::op::SEND, other), -errno::EINVAL);
    assert_eq!(guest.xen.map(8, Access::Read), Err(GrantError::BadReference(8)));
}
