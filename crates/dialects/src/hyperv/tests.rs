//! The platform through its doors: honest guests, and guests that lie.

mod hypercalls;
mod interrupts;
mod platform;
mod testdev;

use std::time::Duration;

use abi::apic::{MSI_ADDRESS_BASE, MSI_DESTINATION_SHIFT};
use abi::hyperv::hypercall::{Status, control};
use vm_memory::{Bytes, GuestAddress};
use vmm::Paging;
use vmm::backend::EoiFlag;
use vmm::registers::{RAX, RCX, RDX};
use vmm::time::StepClock;

use super::*;

const PROCESSORS: u32 = 3;
const RAM: u64 = 0x4_0000;
/// Pages of the guest.
const HYPERCALL_PAGE: u64 = 0x1000;
const INPUT: u64 = 0x2000;
const OUTPUT: u64 = 0x3000;
const MESSAGES: u64 = 0x4000;
const FLAGS: u64 = 0x5000;
/// What Linux has in GUEST_OS_ID.
const LINUX: u64 = 0x8100 << 48;

/// Who asked, which processors, which pages.
type Flushed = (VcpuId, u64, Option<Vec<u64>>);

/// What was done to the processors and the machine.
#[derive(Default)]
struct Recorder {
    interrupts: Mutex<Vec<(VcpuId, u8)>>,
    auto_eoi: Mutex<Vec<(VcpuId, u8, bool)>>,
    flag: Mutex<Option<Arc<dyn EoiFlag>>>,
    flushes: Mutex<Vec<Flushed>>,
    local_apic: Mutex<Vec<(u64, u64)>>,
    ended: Mutex<Vec<u8>>,
    crashes: Mutex<Vec<Crash>>,
    resets: Mutex<u32>,
    /// What the guest said at connections.
    heard: Mutex<Vec<(u32, u32, Vec<u8>)>>,
    signals: Mutex<Vec<(u32, u16)>>,
}

impl Processors for Recorder {
    fn signal_msi(&self, address: u64, data: u32) {
        let vp = (address - MSI_ADDRESS_BASE) >> MSI_DESTINATION_SHIFT;
        self.interrupts.lock().unwrap().push((vp as VcpuId, data as u8));
    }
    fn wake(&self, _id: VcpuId) {}
    fn set_eoi_flag(&self, _id: VcpuId, flag: Option<Arc<dyn EoiFlag>>) {
        *self.flag.lock().unwrap() = flag;
    }
    fn set_auto_eoi(&self, id: VcpuId, vector: u8, ends_by_itself: bool) -> bool {
        self.auto_eoi.lock().unwrap().push((id, vector, ends_by_itself));
        true
    }
    fn read_local_apic(&self, _id: VcpuId, offset: u64) -> Result<u64, MsrFault> {
        Ok(offset)
    }
    fn write_local_apic(&self, _id: VcpuId, offset: u64, value: u64) -> Result<Option<u8>, MsrFault> {
        self.local_apic.lock().unwrap().push((offset, value));
        Ok((offset == offset::EOI).then_some(0x55))
    }
    fn flush_translations(&self, caller: VcpuId, processors: u64, pages: Option<&[u64]>) {
        self.flushes.lock().unwrap().push((caller, processors, pages.map(<[u64]>::to_vec)));
    }
}

impl super::Machine for Recorder {
    fn reset(&self) {
        *self.resets.lock().unwrap() += 1;
    }
    fn end_of_interrupt(&self, vector: u8) {
        self.ended.lock().unwrap().push(vector);
    }
    fn crashed(&self, crash: &Crash) {
        self.crashes.lock().unwrap().push(crash.clone());
    }
}

/// Knows connection 1.
impl Connections for Recorder {
    fn post_message(&self, connection: u32, kind: u32, payload: &[u8]) -> Status {
        self.heard.lock().unwrap().push((connection, kind, payload.to_vec()));
        if connection == 1 { Status::SUCCESS } else { Status::INVALID_CONNECTION_ID }
    }
    fn signal_event(&self, connection: u32, flag: u16) -> Status {
        self.signals.lock().unwrap().push((connection, flag));
        if connection == 1 { Status::SUCCESS } else { Status::INVALID_CONNECTION_ID }
    }
    fn reset(&self) {
        self.heard.lock().unwrap().clear();
    }
}

/// A host on which processor n has run for n seconds.
struct RunTime;

impl StealSource for RunTime {
    fn stolen(&self, _vcpu: VcpuId) -> u64 {
        0
    }
    fn ran(&self, vcpu: VcpuId) -> u64 {
        u64::from(vcpu) * 1_000_000_000
    }
}

struct Machine {
    memory: GuestMemory,
    clock: Arc<StepClock>,
    timers: Arc<Timers>,
    recorder: Arc<Recorder>,
    hyperv: Arc<Hyperv>,
}

/// A machine whose TSC counts nanoseconds.
fn machine() -> Machine {
    let memory = vmm::memory::map(&[(0, RAM)]).unwrap();
    let clock = Arc::new(StepClock::new(Duration::ZERO));
    let timers = Timers::new(clock.clone());
    let frequencies = Frequencies { tsc_hz: 1_000_000_000, apic_hz: 1_000_000_000 };
    let hyperv = Hyperv::new(memory.clone(), timers.clone(), frequencies, Some(Arc::new(RunTime)), PROCESSORS);
    let recorder = Arc::new(Recorder::default());
    hyperv.connect(recorder.clone(), recorder.clone());
    hyperv.serve(recorder.clone());
    Machine { memory, clock, timers, recorder, hyperv }
}

impl Machine {
    fn read(&self, vcpu: VcpuId, index: u32) -> u64 {
        self.hyperv.read_msr(vcpu, index).unwrap().unwrap()
    }

    fn write(&self, vcpu: VcpuId, index: u32, value: u64) {
        self.hyperv.write_msr(vcpu, index, value).unwrap().unwrap();
    }

    /// Moves time to `time` (100 ns) and a little on, as deadlines are.
    fn pass(&self, time: u64) {
        vmm::time::Clock::advance_to(self.clock.as_ref(), (time + 1) * 100);
        self.timers.run_due();
    }

    /// Turns a processor's controller on, with this interrupt source.
    fn turn_on(&self, vp: VcpuId, sint: u32, config: u64) {
        self.write(vp, msr::SIMP, MESSAGES | msr::PAGE_ENABLE);
        self.write(vp, msr::SIEFP, FLAGS | msr::PAGE_ENABLE);
        self.write(vp, msr::SINT0 + sint, config);
        self.write(vp, msr::SCONTROL, msr::SCONTROL_ENABLE);
    }

    fn put(&self, gpa: u64, words: &[u64]) {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.memory.write_slice(&bytes, GuestAddress(gpa)).unwrap();
    }

    fn word(&self, gpa: u64) -> u64 {
        u64::from_le(self.memory.read_obj(GuestAddress(gpa)).unwrap())
    }

    /// A hypercall from ring 0 in 64-bit mode: status, and elements done.
    fn call(&self, vcpu: VcpuId, word: u64, input: u64, output: u64) -> (u16, u64) {
        let mut call = from_ring(0);
        (call.gpr[RCX], call.gpr[RDX], call.gpr[8]) = (word, input, output);
        self.hyperv.port_call(vcpu, &mut call);
        assert!(!call.undefined);
        (call.gpr[RAX] as u16, call.gpr[RAX] >> control::COUNT_SHIFT)
    }

    fn interrupts(&self) -> Vec<(VcpuId, u8)> {
        std::mem::take(&mut self.recorder.interrupts.lock().unwrap())
    }

    /// All of memory.
    fn content(&self) -> Vec<u8> {
        let mut all = vec![0; RAM as usize];
        self.memory.read_slice(&mut all, GuestAddress(0)).unwrap();
        all
    }
}

/// What the hypercall page does at a privilege level, before registers are set.
fn from_ring(cpl: u8) -> PortCall {
    let paging = Paging { cr0: PROTECTED_MODE, ..Paging::default() };
    PortCall { port: HYPERCALL_PORT, size: 4, write: true, cpl, long_mode: true, paging, ..PortCall::default() }
}
