//! The dialect through its doors.

use std::time::Duration;

use abi::kvm::ClockPairing;
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};
use vmm::backend::EoiFlag;
use vmm::registers::{RAX, RBX, RCX, RDX, RSI};
use vmm::time::{Clock, StepClock};
use zerocopy::FromBytes;

use super::*;

const PROCESSORS: u32 = 3;

/// What was done to the processors.
#[derive(Default)]
struct Recorder {
    messages: Mutex<Vec<(u64, u32)>>,
    woken: Mutex<Vec<VcpuId>>,
    flags: Mutex<Vec<(VcpuId, bool)>>,
}

impl Processors for Recorder {
    fn signal_msi(&self, address: u64, data: u32) {
        self.messages.lock().unwrap().push((address, data));
    }
    fn wake(&self, id: VcpuId) {
        self.woken.lock().unwrap().push(id);
    }
    fn set_eoi_flag(&self, id: VcpuId, flag: Option<Arc<dyn EoiFlag>>) {
        self.flags.lock().unwrap().push((id, flag.is_some()));
    }
}

/// A host that takes a tenth of all time from every processor.
struct Tenth(Arc<StepClock>);

impl StealSource for Tenth {
    fn stolen(&self, _vcpu: VcpuId) -> u64 {
        self.0.now() / 10
    }
    fn ran(&self, vcpu: VcpuId) -> u64 {
        self.0.now() - self.stolen(vcpu)
    }
}

struct Machine {
    memory: GuestMemory,
    clock: Arc<StepClock>,
    timers: Arc<Timers>,
    processors: Arc<Recorder>,
    kvm: Arc<Kvm>,
}

fn machine() -> Machine {
    let memory = vmm::memory::map(&[(0, 0x10000)]).unwrap();
    let clock = Arc::new(StepClock::new(Duration::from_secs(1_000_000)));
    let timers = Timers::new(clock.clone());
    let pvclock = Arc::new(PvClock::new(memory.clone(), clock.clone(), 1_000_000_000, PROCESSORS));
    let kvm = Kvm::new(memory.clone(), pvclock, timers.clone(), Some(Arc::new(Tenth(clock.clone()))), PROCESSORS);
    let processors = Arc::new(Recorder::default());
    kvm.connect(processors.clone());
    Machine { memory, clock, timers, processors, kvm }
}

impl Machine {
    fn call(&self, number: u64, arguments: [u64; 4]) -> i64 {
        let mut call = Hypercall { long_mode: true, ..Hypercall::default() };
        call.gpr[RAX] = number;
        for (register, value) in [RBX, RCX, RDX, RSI].into_iter().zip(arguments) {
            call.gpr[register] = value;
        }
        assert!(self.kvm.hypercall(0, &mut call));
        call.gpr[RAX].cast_signed()
    }

    fn advance(&self, ns: u64) {
        self.clock.advance_to(self.clock.now() + ns);
        self.timers.run_due();
    }
}

#[test]
fn without_hypercalls_none_is_promised_or_answered() {
    let Machine { memory, clock, timers, .. } = machine();
    let pvclock = Arc::new(PvClock::new(memory.clone(), clock, 1_000_000_000, 1));
    let kvm = Kvm::without_hypercalls(memory, pvclock, timers, None, 1);
    let mut table = CpuidTable::default();
    kvm.add_cpuid(0x4000_0000, &mut table);
    assert_eq!(table.get(0x4000_0001, 0).unwrap().eax, FEATURES);
    assert!(!kvm.hypercall(0, &mut Hypercall::default()));
}

#[test]
fn leaf_carries_signature_and_features() {
    let mut table = CpuidTable::default();
    machine().kvm.add_cpuid(0x4000_0100, &mut table);
    let base = table.get(0x4000_0100, 0).unwrap();
    assert_eq!((base.eax, base.ebx, base.ecx, base.edx), (0x4000_0101, 0x4b4d_564b, 0x564b_4d56, 0x4d));
    let features = table.get(0x4000_0101, 0).unwrap();
    assert_eq!((features.eax, features.edx), (0x0100_28eb, 0));
}

#[test]
fn host_without_numbers_has_no_steal_time() {
    let Machine { memory, timers, clock, .. } = machine();
    let pvclock = Arc::new(PvClock::new(memory.clone(), clock, 1_000_000_000, 1));
    let kvm = Kvm::new(memory, pvclock, timers, None, 1);
    assert_eq!(kvm.leaf.features & feature::STEAL_TIME, 0);
    assert_eq!(kvm.write_msr(0, words::MSR_STEAL_TIME, 0x1001), None);
}

#[test]
fn steal_time_grows_while_it_is_enabled() {
    let machine = machine();
    machine.kvm.write_msr(0, words::MSR_STEAL_TIME, 0x1001).unwrap().unwrap();
    assert_eq!(machine.kvm.read_msr(0, words::MSR_STEAL_TIME), Some(Ok(0x1001)));
    for _ in 0..100 {
        machine.advance(10_000_000);
    }
    let stolen = machine.memory.read_obj::<u64>(GuestAddress(0x1000)).unwrap();
    assert!((98_000_000..=100_000_000).contains(&stolen), "{stolen}");
    machine.kvm.write_msr(0, words::MSR_STEAL_TIME, 0).unwrap().unwrap();
    assert_eq!(machine.timers.next_deadline(), None, "nobody wants to know");
}

#[test]
fn clock_pairing_gives_time_of_day_and_tsc_of_one_moment() {
    let machine = machine();
    machine.advance(5_000_000_001);
    assert_eq!(machine.call(words::HC_CLOCK_PAIRING, [0x1000, 0, 0, 0]), 0);
    let mut bytes = [0; 64];
    machine.memory.read_slice(&mut bytes, GuestAddress(0x1000)).unwrap();
    let pair = ClockPairing::read_from_bytes(&bytes).unwrap();
    assert_eq!((pair.sec.get(), pair.nsec.get(), pair.tsc.get()), (1_000_005, 1, 5_000_000_001));
    assert_eq!(machine.call(words::HC_CLOCK_PAIRING, [0x1000, 1, 0, 0]), words::EOPNOTSUPP);
    assert_eq!(machine.call(words::HC_CLOCK_PAIRING, [0xfff0, 0, 0, 0]), words::EFAULT);
}

#[test]
fn interrupt_goes_to_the_processors_of_the_bitmap() {
    let machine = machine();
    // Bits 0 and 1 of a map that begins at APIC id 1, and one that stands for no processor.
    assert_eq!(machine.call(words::HC_SEND_IPI, [0b1011, 0, 1, 0xfd]), 2);
    assert_eq!(*machine.processors.messages.lock().unwrap(), [(0xfee0_1000, 0xfd), (0xfee0_2000, 0xfd)]);
    // NMI.
    assert_eq!(machine.call(words::HC_SEND_IPI, [1, 0, 0, 0x400]), 1);
    assert_eq!(machine.processors.messages.lock().unwrap()[2], (0xfee0_0000, 0x400));
    // Logical destinations, shorthands, INIT.
    for icr in [0x8fd, 0x800fd, 0x500] {
        assert_eq!(machine.call(words::HC_SEND_IPI, [1, 0, 0, icr]), words::EINVAL, "{icr:#x}");
    }
}

#[test]
fn kick_wakes_the_processor_with_that_apic_id() {
    let machine = machine();
    assert_eq!(machine.call(words::HC_KICK_CPU, [0, 2, 0, 0]), 0);
    assert_eq!(*machine.processors.woken.lock().unwrap(), [2]);
    assert_eq!(machine.call(words::HC_KICK_CPU, [0, u64::MAX, 0, 0]), 0);
}

#[test]
fn calls_without_effect_answer_zero() {
    assert_eq!(machine().call(words::HC_SCHED_YIELD, [1, 0, 0, 0]), 0);
    assert_eq!(machine().call(words::HC_VAPIC_POLL_IRQ, [0; 4]), 0);
}

#[test]
fn unknown_hypercalls_answer_enosys_and_user_mode_eperm() {
    let machine = machine();
    assert_eq!(machine.call(2, [0; 4]), -1000);
    let mut call = Hypercall { cpl: 3, ..Hypercall::default() };
    call.gpr[RAX] = words::HC_VAPIC_POLL_IRQ;
    assert!(machine.kvm.hypercall(0, &mut call));
    assert_eq!(call.gpr[RAX], 0xffff_ffff);
}

#[test]
fn outside_64_bit_mode_upper_halves_do_not_count() {
    let machine = machine();
    let mut call = Hypercall::default();
    call.gpr[RAX] = 0xdead_0000_0000 | words::HC_SEND_IPI;
    // Bit 0 of the upper half of 32 bits is APIC id 32, which is not there.
    (call.gpr[RBX], call.gpr[RCX], call.gpr[RSI]) = (1 << 40 | 0b10, 1, 0xfd);
    machine.kvm.hypercall(0, &mut call);
    assert_eq!(call.gpr[RAX], 1);
}

#[test]
fn word_for_ends_of_interrupts_reaches_the_local_apic() {
    let machine = machine();
    machine.kvm.write_msr(1, words::MSR_PV_EOI, 0x2001).unwrap().unwrap();
    assert_eq!(machine.kvm.read_msr(1, words::MSR_PV_EOI), Some(Ok(0x2001)));
    assert_eq!(machine.kvm.write_msr(1, words::MSR_PV_EOI, 0x1_0001), Some(Err(MsrFault)));
    machine.kvm.write_msr(1, words::MSR_PV_EOI, 0).unwrap().unwrap();
    assert_eq!(*machine.processors.flags.lock().unwrap(), [(1, true), (1, false)]);
}

#[test]
fn foreign_msrs_are_left_to_others() {
    let machine = machine();
    assert_eq!(machine.kvm.read_msr(0, 0x10), None);
    assert_eq!(machine.kvm.write_msr(0, 0x4b56_4d02, 1), None);
}

#[test]
fn reset_forgets_what_the_guest_registered() {
    let machine = machine();
    for (index, value) in [(words::MSR_SYSTEM_TIME, 0x2001), (words::MSR_STEAL_TIME, 0x3001), (words::MSR_PV_EOI, 0x4001)] {
        machine.kvm.write_msr(0, index, value).unwrap().unwrap();
        machine.kvm.reset();
        assert_eq!(machine.kvm.read_msr(0, index), Some(Ok(0)));
    }
    assert_eq!(machine.timers.next_deadline(), None);
    assert_eq!(machine.processors.flags.lock().unwrap().last(), Some(&(2, false)));
}

#[test]
fn state_survives_a_restore() {
    let before = machine();
    before.kvm.write_msr(1, words::MSR_STEAL_TIME, 0x3001).unwrap().unwrap();
    before.kvm.write_msr(2, words::MSR_PV_EOI, 0x4001).unwrap().unwrap();
    let after = machine();
    after.kvm.restore(&before.kvm.state()).unwrap();
    assert_eq!(after.kvm.state(), before.kvm.state());
    assert_eq!(*after.processors.flags.lock().unwrap(), [(0, false), (1, false), (2, true)]);
    assert!(after.timers.next_deadline().is_some());
}

proptest! {
    #[test]
    fn no_hypercall_panics(number in 0u64..16, arguments: [u64; 4], long_mode: bool) {
        let machine = machine();
        let mut call = Hypercall { long_mode, ..Hypercall::default() };
        (call.gpr[RAX], call.gpr[RBX], call.gpr[RCX], call.gpr[RDX], call.gpr[RSI]) =
            (number, arguments[0], arguments[1], arguments[2], arguments[3]);
        machine.kvm.hypercall(0, &mut call);
    }

    #[test]
    fn no_msr_panics(vcpu in 0..PROCESSORS + 1, index in 0x4b56_4d00_u32..0x4b56_4d09, value: u64) {
        let machine = machine();
        let _ = machine.kvm.write_msr(vcpu, index, value);
        machine.advance(1_000_000_000);
    }
}
