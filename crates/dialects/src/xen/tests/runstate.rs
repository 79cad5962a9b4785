//! Time that the host took, in the guest's memory.

use abi::xen::hypercall::errno::EFAULT;
use abi::xen::hypercall::{VM_ASSIST_ENABLE, VM_ASSIST_RUNSTATE_UPDATE, vcpu};
use abi::xen::shared_info::{RUNNABLE, RUNNING, RUNSTATE_UPDATE, Runstate};

use super::*;

/// Across the end of a page.
const AREA: u64 = 0x7fe8;

impl Guest {
    fn register(&self, vcpu: u64, area: u64) -> i64 {
        self.memory.write_obj(area, GuestAddress(ARGUMENT)).unwrap();
        self.call(number::VCPU_OP, [vcpu::REGISTER_RUNSTATE, vcpu, ARGUMENT, 0])
    }

    /// Entry time, running and runnable of the area.
    fn runstate(&self) -> [u64; 3] {
        let mut bytes = [0; size_of::<Runstate>()];
        self.memory.read_slice(&mut bytes, GuestAddress(AREA)).unwrap();
        let state = Runstate::read_from_bytes(&bytes).unwrap();
        [state.state_entry_time.get(), state.time[RUNNING].get(), state.time[RUNNABLE].get()]
    }

    /// The host takes time, and some more passes.
    fn steal(&self, nanoseconds: u64) {
        self.host.0.fetch_add(nanoseconds, Ordering::Relaxed);
        self.clock.advance_to(self.clock.now() + 1_000_000_000);
        self.timers.run_due();
    }
}

#[test]
fn time_that_the_host_takes_is_runnable_time() {
    let guest = Guest::running();
    guest.steal(70);
    assert_eq!(guest.register(1, AREA), 0);
    let now = guest.clock.now();
    assert_eq!(guest.runstate(), [now, now - 70, 70]);
    guest.steal(30);
    assert_eq!(guest.runstate(), [now + 1_000_000_000, now + 1_000_000_000 - 100, 100]);
    // It can be asked for, too, and of whom nothing was taken, nothing is told.
    assert_eq!(guest.call(number::VCPU_OP, [vcpu::GET_RUNSTATE_INFO, 0, AREA, 0]), 0);
    assert_eq!(guest.runstate()[2], 0);
}

#[test]
fn quiet_area_is_left_alone_and_one_that_is_withdrawn_is_not_written_any_more() {
    let guest = Guest::running();
    assert_eq!(guest.register(1, AREA), 0);
    let before = guest.runstate();
    guest.steal(0);
    assert_eq!(guest.runstate(), before);
    assert_eq!(guest.register(1, 0), 0);
    guest.steal(50);
    assert_eq!(guest.runstate(), before);
    assert_eq!(guest.register(1, AREA), 0);
    guest.xen.reset();
    let before = guest.runstate();
    guest.steal(50);
    assert_eq!(guest.runstate(), before);
}

#[test]
fn mark_of_change_is_gone_after_it() {
    let guest = Guest::running();
    assert_eq!(guest.call(number::VM_ASSIST, [VM_ASSIST_ENABLE, VM_ASSIST_RUNSTATE_UPDATE, 0, 0]), 0);
    assert_eq!(guest.register(1, AREA), 0);
    guest.steal(50);
    let [entered, _, runnable] = guest.runstate();
    assert_eq!((entered & RUNSTATE_UPDATE, runnable), (0, 50));
}

#[test]
fn area_outside_memory_or_between_words_is_refused() {
    let guest = Guest::running();
    for area in [RAM, RAM - 8, AREA + 4, u64::MAX - 7] {
        assert_eq!(guest.register(1, area), -EFAULT, "{area:#x}");
    }
    guest.steal(50);
}
