use abi::xen::grant_table as grant;
use abi::xen::hvm::Param;
use abi::xen::hypercall::{Features, errno, reason, sched, version};

use super::*;

#[test]
fn version_and_features_are_those_of_a_guest_that_translates_by_itself() {
    let guest = Guest::new();
    assert_eq!(guest.call(number::XEN_VERSION, [version::VERSION, 0, 0, 0]), 0x4_0011);
    let (answer, features) = guest.call_with(number::XEN_VERSION, version::GET_FEATURES, &Features::default());
    assert_eq!((answer, features.bits.get() & 0x304), (0, 0x304));
    assert_eq!(guest.call_with(number::XEN_VERSION, version::GUEST_HANDLE, &[0u8; 16]), (0, [7; 16]));
}

#[test]
fn calls_from_user_mode_unknown_calls_and_bad_pointers_are_refused() {
    let guest = Guest::new();
    let mut call = Hypercall { cpl: 3, long_mode: true, ..Hypercall::default() };
    call.gpr[0] = number::XEN_VERSION;
    assert!(guest.xen.hypercall(0, &mut call));
    assert_eq!(call.gpr[0].cast_signed(), -errno::EPERM);
    assert_eq!(guest.call(999, [0; 4]), -errno::ENOSYS);
    for number in [number::MEMORY_OP, number::EVENT_CHANNEL_OP, number::HVM_OP, number::GRANT_TABLE_OP, number::VCPU_OP] {
        for operation in 0..24 {
            // Whatever it is, it ends.
            guest.call(number, [operation, u64::MAX - 3, 1, 0]);
            guest.call(number, [operation, 1, u64::MAX - 3, 0]);
        }
    }
    assert_eq!(guest.call(number::HVM_OP, [words::op::GET_PARAM, RAM, 0, 0]), -errno::EFAULT);
}

#[test]
fn entries_of_the_hypercall_page_lead_to_the_same_door() {
    let guest = Guest::new();
    assert_eq!(guest.xen.write_msr(0, cpuid::MSR_HYPERCALL_PAGE, 0x5000), Some(Ok(())));
    let mut entry = [0; 9];
    guest.memory.read_slice(&mut entry, GuestAddress(0x5000 + 17 * 32)).unwrap();
    assert_eq!(entry, [0xb8, 17, 0, 0, 0, 0xe7, HYPERCALL_PORT as u8, 0xc3, 0xcc]);
    assert!(guest.xen.takes_registers(HYPERCALL_PORT));
    let mut call = PortCall { port: HYPERCALL_PORT, size: 4, write: true, long_mode: true, ..PortCall::default() };
    call.gpr[0] = number::XEN_VERSION;
    guest.xen.port_call(0, &mut call);
    assert_eq!(call.gpr[0], 0x4_0011);
    for bad in [0x5001, RAM, !0xfff] {
        assert_eq!(guest.xen.write_msr(0, cpuid::MSR_HYPERCALL_PAGE, bad), Some(Err(MsrFault)), "{bad:#x}");
    }
}

#[test]
fn pages_are_placed_in_memory_only() {
    let guest = Guest::new();
    for (space, index, gpa) in [(0, 1, 0x2000), (0, 0, RAM), (1, 64, 0x2000), (1, 0, !0xfff), (9, 0, 0x2000)] {
        assert_eq!(guest.place(space, index, gpa), -errno::EINVAL, "{space} {index} {gpa:#x}");
    }
}

#[test]
fn grant_table_has_64_frames_of_version_1() {
    let guest = Guest::running();
    let query = grant::QuerySize { dom: abi::xen::hypercall::DOMID_SELF.into(), ..Default::default() };
    let (answer, query) = guest.call_with(number::GRANT_TABLE_OP, grant::op::QUERY_SIZE, &query);
    assert_eq!((answer, query.nr_frames.get(), query.max_nr_frames.get(), query.status.get()), (0, 1, 64, 0));
    let (answer, _) = guest.call_with(number::GRANT_TABLE_OP, grant::op::SET_VERSION, &grant::SetVersion { version: 2.into() });
    assert_eq!(answer, -errno::ENOSYS);
}

#[test]
fn parameters_name_the_rings_that_are_there() {
    let guest = Guest::new();
    let get = |index: u32| {
        let param = Param { domid: DOMAIN.into(), index: index.into(), ..Param::default() };
        guest.call_with(number::HVM_OP, words::op::GET_PARAM, &param).1.value.get()
    };
    assert_eq!(get(words::param::STORE_EVTCHN), 0, "no store, no port");
    let port = guest.xen.open_store(Arc::new(|| {})).unwrap();
    assert_eq!((get(words::param::STORE_EVTCHN), get(words::param::STORE_PFN)), (port.into(), 0xf_effc));
}

fn set_callback(guest: &Guest, value: u64) -> i64 {
    let param = Param { domid: DOMAIN.into(), index: words::param::CALLBACK_IRQ.into(), value: value.into(), ..Param::default() };
    guest.call_with(number::HVM_OP, words::op::SET_PARAM, &param).0
}

/// An event of `vcpu` for itself.
fn send_to_itself(guest: &Guest, vcpu: u32) {
    let (_, bind) = guest.call_with(number::EVENT_CHANNEL_OP, evtchn::op::BIND_IPI, &evtchn::BindIpi { vcpu: vcpu.into(), port: 0.into() });
    assert_eq!(guest.port_call(evtchn::op::SEND, bind.port.get()), 0);
}

#[test]
fn callback_line_is_up_while_the_first_processor_has_something_to_look_at() {
    // A GSI, and INTB of device 3; the bus is nobody's.
    for (value, wire) in [(9, Wire::Gsi(9)), (1 << 56 | 3 << 11 | 1, Wire::Intx { slot: 3, pin: 1 })] {
        let guest = Guest::new();
        assert_eq!(guest.place(memory::SPACE_SHARED_INFO, 0, SHARED_INFO), 0);
        let levels = || std::mem::take(&mut *guest.ended.2.lock().unwrap());
        assert_eq!(set_callback(&guest, value), 0);
        send_to_itself(&guest, 1);
        assert_eq!(levels(), [], "of others it tells nothing");
        send_to_itself(&guest, 0);
        assert_eq!(levels(), [(wire, true)]);
        guest.xen.end_of_interrupt();
        assert_eq!(levels(), [], "the guest has not looked");
        guest.memory.write_obj(0u8, GuestAddress(SHARED_INFO)).unwrap();
        guest.xen.end_of_interrupt();
        assert_eq!(levels(), [(wire, false)]);
        assert!(!guest.xen.port_out(0, 0x20, 1, 0x20), "the controller's register is the controller's");
        assert_eq!(levels(), [(wire, false)]);
        assert_eq!(guest.interrupts(), []);
    }
}

#[test]
fn callback_line_of_processors_with_vectors_stays_down() {
    let guest = Guest::running();
    assert_eq!(set_callback(&guest, 1), 0);
    send_to_itself(&guest, 0);
    assert_eq!((guest.interrupts().len(), guest.ended.2.lock().unwrap().len()), (1, 0));
}

#[test]
fn callback_vector_is_for_processors_without_their_own_and_ends_by_itself() {
    let guest = Guest::new();
    assert_eq!(guest.place(memory::SPACE_SHARED_INFO, 0, SHARED_INFO), 0);
    assert_eq!(set_callback(&guest, 2 << 56 | 0xf3), 0);
    assert_eq!(*guest.interrupts.1.lock().unwrap(), [(0, 0xf3, true), (1, 0xf3, true)]);
    let own = UpcallVector { vcpu: 1.into(), vector: 0xf4, pad: [0; 3] };
    assert_eq!(guest.call_with(number::HVM_OP, words::op::SET_UPCALL_VECTOR, &own).0, 0);
    for vcpu in 0..2u32 {
        send_to_itself(&guest, vcpu);
    }
    assert_eq!(guest.interrupts().into_iter().map(|(_, data)| data).collect::<Vec<_>>(), [0xf3, 0xf4]);
    for bad in [2 << 56 | 3, 24, 9 << 56, u64::MAX] {
        assert_eq!(set_callback(&guest, bad), -errno::EINVAL, "{bad:#x}");
    }
}

#[test]
fn shutdown_tells_the_machine_why() {
    let guest = Guest::new();
    for (word, reason) in [(reason::POWER_OFF, Shutdown::PowerOff), (reason::REBOOT, Shutdown::Reboot), (reason::CRASH, Shutdown::Crash)] {
        assert_eq!(guest.call_with(number::SCHED_OP, sched::SHUTDOWN, &word).0, 0);
        assert_eq!(guest.ended.0.lock().unwrap().pop(), Some(reason));
    }
    assert_eq!(guest.call_with(number::SCHED_OP, sched::SHUTDOWN, &77u32).0, -errno::EINVAL);
}

#[test]
fn unplug_ports_welcome_the_driver() {
    let guest = Guest::new();
    assert_eq!(guest.xen.port_in(0, 0x10, 2), Some(0x49d2));
    assert_eq!(guest.xen.port_in(0, 0x12, 1), Some(1));
    assert_eq!(guest.xen.port_in(0, 0x14, 2), None);
    // Network cards, all disks, all but the first; a build number is no mask.
    for (mask, size) in [(2, 2), (3, 2), (4, 2), (1, 4)] {
        assert!(guest.xen.port_out(0, 0x10, size, mask));
    }
    assert_eq!(*guest.ended.1.lock().unwrap(), [true, false]);
}
