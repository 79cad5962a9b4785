//! Host half of the KVM dialect, for backends that do not have it in the kernel.
//!
//! What Linux and the BSDs use of it at boot: the leaf `KVMKVMKVM` with its features, the paravirtual clock (one page per
//! processor from which the guest computes nanoseconds out of its TSC, [`clock`]), the wall clock, and hypercalls, of which
//! none is offered yet: all answer "no such call". Specification: Linux `Documentation/virt/kvm/x86/`.
//!
//! ```text
//!   WRMSR system time (address | 1) --> clock page written once, valid until the machine is reset:
//!                                       the TSC is stable and equal on all processors
//!   WRMSR wall clock (address)      --> time of day at system time zero
//! ```

pub mod clock;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use abi::kvm::{self as words, PvclockVcpuTimeInfo, PvclockWallClock, feature};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm::time::Clock;
use vmm::{CpuidEntry, CpuidTable, GuestMemory, Hypercall, MsrFault, VcpuId};
use zerocopy::IntoBytes;

use crate::Dialect;
use clock::{Scale, wall_clock};

/// What the leaf promises.
const FEATURES: u32 = feature::CLOCKSOURCE | feature::NOP_IO_DELAY | feature::CLOCKSOURCE2 | feature::CLOCKSOURCE_STABLE;

/// The KVM dialect of one machine.
pub struct Kvm {
    memory: GuestMemory,
    clock: Arc<dyn Clock>,
    tsc_hz: u64,
    scale: Scale,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Last value written to the wall-clock MSR.
    wall_clock: u64,
    processors: Vec<Processor>,
}

#[derive(Default, Clone, Copy)]
struct Processor {
    /// Last value written to the system-time MSR.
    system_time: u64,
    /// Version in the clock page.
    version: u32,
}

impl Kvm {
    /// The dialect for `vcpus` processors whose TSC is `clock` counted in ticks of `tsc_hz`.
    pub fn new(memory: GuestMemory, clock: Arc<dyn Clock>, tsc_hz: u64, vcpus: u32) -> Kvm {
        let processors = vec![Processor::default(); vcpus as usize];
        Kvm { memory, clock, tsc_hz, scale: Scale::from_hz(tsc_hz), state: Mutex::new(State { wall_clock: 0, processors }) }
    }

    /// Version and guest physical address of a processor's clock page, once the guest has enabled it.
    pub fn pvclock(&self, vcpu: VcpuId) -> Option<(u32, u64)> {
        let state = self.lock();
        let processor = state.processors.get(vcpu as usize)?;
        (processor.system_time & words::SYSTEM_TIME_ENABLE != 0)
            .then_some((processor.version, processor.system_time & !words::SYSTEM_TIME_ENABLE))
    }

    fn write_system_time(&self, vcpu: VcpuId, value: u64) -> Result<(), MsrFault> {
        let mut state = self.lock();
        let processor = state.processors.get_mut(vcpu as usize).ok_or(MsrFault)?;
        if value & words::SYSTEM_TIME_ENABLE == 0 {
            processor.system_time = value;
            return Ok(());
        }
        let gpa = value & !words::SYSTEM_TIME_ENABLE;
        // Counts on from what the page holds, as Linux KVM does: a machine that moved here keeps its clock's version.
        let version = self.memory.read_obj::<u32>(GuestAddress(gpa)).map(u32::from_le).map_err(|_| MsrFault)? | 1;
        let now = self.clock.now();
        let mut page = PvclockVcpuTimeInfo {
            version: version.into(),
            pad0: 0.into(),
            tsc_timestamp: clock::ticks(now, self.tsc_hz).into(),
            system_time: now.into(),
            tsc_to_system_mul: self.scale.mul.into(),
            tsc_shift: self.scale.shift,
            flags: words::PVCLOCK_TSC_STABLE,
            pad: [0; 2],
        };
        self.publish(gpa, page.as_bytes())?;
        page.version = version.wrapping_add(1).into();
        self.publish(gpa, page.version.as_bytes())?;
        *processor = Processor { system_time: value, version: page.version.get() };
        Ok(())
    }

    fn write_wall_clock(&self, gpa: u64) -> Result<(), MsrFault> {
        let mut state = self.lock();
        let started = wall_clock(self.clock.as_ref());
        let mut page = PvclockWallClock { version: 1.into(), ..started };
        self.publish(gpa, page.as_bytes())?;
        page.version = 2.into();
        self.publish(gpa, page.version.as_bytes())?;
        state.wall_clock = gpa;
        Ok(())
    }

    /// Writes to guest memory: four-byte aligned, inside RAM and inside one page, or #GP.
    fn publish(&self, gpa: u64, bytes: &[u8]) -> Result<(), MsrFault> {
        let fits = gpa.is_multiple_of(4) && gpa % vmm::memory::PAGE_SIZE + bytes.len() as u64 <= vmm::memory::PAGE_SIZE;
        if !fits || !self.memory.check_range(GuestAddress(gpa), bytes.len()) {
            return Err(MsrFault);
        }
        self.memory.write_slice(bytes, GuestAddress(gpa)).map_err(|_| MsrFault)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Dialect for Kvm {
    fn name(&self) -> &'static str {
        "kvm"
    }

    fn add_cpuid(&self, base: u32, table: &mut CpuidTable) {
        let [ebx, ecx, edx] = words::SIGNATURE;
        table.set(CpuidEntry { leaf: base, subleaf: None, eax: base + 1, ebx, ecx, edx });
        table.set(CpuidEntry { leaf: base + 1, subleaf: None, eax: FEATURES, ebx: 0, ecx: 0, edx: 0 });
    }

    fn read_msr(&self, vcpu: VcpuId, index: u32) -> Option<Result<u64, MsrFault>> {
        match index {
            words::MSR_WALL_CLOCK | words::MSR_WALL_CLOCK_NEW => Some(Ok(self.lock().wall_clock)),
            words::MSR_SYSTEM_TIME | words::MSR_SYSTEM_TIME_NEW => {
                Some(self.lock().processors.get(vcpu as usize).map(|p| p.system_time).ok_or(MsrFault))
            }
            _ => None,
        }
    }

    fn write_msr(&self, vcpu: VcpuId, index: u32, value: u64) -> Option<Result<(), MsrFault>> {
        match index {
            words::MSR_WALL_CLOCK | words::MSR_WALL_CLOCK_NEW => Some(self.write_wall_clock(value)),
            words::MSR_SYSTEM_TIME | words::MSR_SYSTEM_TIME_NEW => Some(self.write_system_time(vcpu, value)),
            _ => None,
        }
    }

    fn hypercall(&self, _vcpu: VcpuId, call: &mut Hypercall) -> bool {
        let answer = if call.cpl == 0 { words::ENOSYS } else { words::EPERM };
        // Outside 64-bit mode only EAX is written; the upper half reads as zero.
        call.gpr[vmm::registers::RAX] = if call.long_mode { answer.cast_unsigned() } else { u64::from(answer as u32) };
        true
    }

    fn reset(&self) {
        let mut state = self.lock();
        state.wall_clock = 0;
        state.processors.fill(Processor::default());
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use vmm::time::StepClock;
    use zerocopy::FromBytes;

    use super::*;

    const RAM: u64 = 0x10000;

    fn machine(now: u64) -> (GuestMemory, Kvm) {
        let memory = vmm::memory::map(&[(0, RAM)]).unwrap();
        let clock = Arc::new(StepClock::new(Duration::from_secs(1_000_000)));
        clock.advance_to(now);
        (memory.clone(), Kvm::new(memory, clock, 1_000_000_000, 2))
    }

    fn page(memory: &GuestMemory, gpa: u64) -> PvclockVcpuTimeInfo {
        let mut bytes = [0; 32];
        memory.read_slice(&mut bytes, GuestAddress(gpa)).unwrap();
        PvclockVcpuTimeInfo::read_from_bytes(&bytes).unwrap()
    }

    #[test]
    fn enabled_clock_page_gives_the_time() {
        let (memory, kvm) = machine(5_000);
        kvm.write_msr(1, words::MSR_SYSTEM_TIME_NEW, 0x2001).unwrap().unwrap();
        let page = page(&memory, 0x2000);
        assert_eq!((page.version.get(), page.system_time.get(), page.tsc_timestamp.get()), (2, 5_000, 5_000));
        assert_eq!(page.flags, words::PVCLOCK_TSC_STABLE);
        assert_eq!(kvm.read_msr(1, words::MSR_SYSTEM_TIME).unwrap(), Ok(0x2001));
        assert_eq!(kvm.read_msr(0, words::MSR_SYSTEM_TIME).unwrap(), Ok(0));
        assert_eq!(kvm.pvclock(1), Some((2, 0x2000)));
        assert_eq!(kvm.pvclock(0), None);
    }

    #[test]
    fn each_registration_changes_the_version() {
        let (memory, kvm) = machine(0);
        for version in [2, 4, 6] {
            kvm.write_msr(0, words::MSR_SYSTEM_TIME, 0x2001).unwrap().unwrap();
            assert_eq!(page(&memory, 0x2000).version.get(), version);
        }
    }

    #[test]
    fn version_counts_on_from_what_the_page_holds() {
        let (memory, kvm) = machine(0);
        memory.write_obj(40u32.to_le(), GuestAddress(0x2000)).unwrap();
        kvm.write_msr(0, words::MSR_SYSTEM_TIME, 0x2001).unwrap().unwrap();
        assert_eq!(page(&memory, 0x2000).version.get(), 42);
        assert_eq!(kvm.pvclock(0), Some((42, 0x2000)));
    }

    #[test]
    fn disabled_clock_page_is_not_written() {
        let (memory, kvm) = machine(5_000);
        kvm.write_msr(0, words::MSR_SYSTEM_TIME_NEW, 0x2000).unwrap().unwrap();
        assert_eq!(page(&memory, 0x2000).version.get(), 0);
        assert_eq!(kvm.pvclock(0), None);
    }

    #[test]
    fn wall_clock_is_the_time_of_day_at_system_time_zero() {
        let (memory, kvm) = machine(7_000_000_000);
        kvm.write_msr(0, words::MSR_WALL_CLOCK_NEW, 0x1000).unwrap().unwrap();
        let mut bytes = [0; 12];
        memory.read_slice(&mut bytes, GuestAddress(0x1000)).unwrap();
        let wall = PvclockWallClock::read_from_bytes(&bytes).unwrap();
        assert_eq!((wall.version.get(), wall.sec.get(), wall.nsec.get()), (2, 1_000_000, 0));
    }

    #[test]
    fn bad_addresses_fault_and_write_nothing() {
        let (memory, kvm) = machine(1);
        let outside = [RAM, !3, 1 << 40, RAM - 8];
        let crossing = [0x1000 - 4, 0x2000 - 28];
        let unaligned = [0x1002];
        for gpa in outside.into_iter().chain(crossing).chain(unaligned) {
            assert_eq!(kvm.write_msr(0, words::MSR_SYSTEM_TIME_NEW, gpa | 1).unwrap(), Err(MsrFault), "{gpa:#x}");
        }
        for gpa in [RAM, RAM - 8, 0x1000 - 4, 0x1001] {
            assert_eq!(kvm.write_msr(0, words::MSR_WALL_CLOCK, gpa).unwrap(), Err(MsrFault), "{gpa:#x}");
        }
        assert_eq!(kvm.write_msr(9, words::MSR_SYSTEM_TIME, 0x2001).unwrap(), Err(MsrFault));
        let mut all = vec![0; RAM as usize];
        memory.read_slice(&mut all, GuestAddress(0)).unwrap();
        assert!(all.iter().all(|&b| b == 0));
        assert_eq!(kvm.read_msr(0, words::MSR_SYSTEM_TIME_NEW).unwrap(), Ok(0));
    }

    #[test]
    fn unknown_hypercalls_answer_enosys_and_user_mode_eperm() {
        let (_, kvm) = machine(0);
        let mut call = Hypercall { long_mode: true, ..Hypercall::default() };
        assert!(kvm.hypercall(0, &mut call));
        assert_eq!(call.gpr[0].cast_signed(), -1000);
        call = Hypercall { cpl: 3, ..Hypercall::default() };
        assert!(kvm.hypercall(0, &mut call));
        assert_eq!(call.gpr[0], 0xffff_ffff);
    }

    #[test]
    fn foreign_msrs_are_left_to_others() {
        let (_, kvm) = machine(0);
        assert_eq!(kvm.read_msr(0, 0x10), None);
        assert_eq!(kvm.write_msr(0, 0x4b56_4d02, 1), None);
    }

    #[test]
    fn reset_forgets_the_clock_pages() {
        let (_, kvm) = machine(0);
        kvm.write_msr(0, words::MSR_SYSTEM_TIME, 0x2001).unwrap().unwrap();
        kvm.reset();
        assert_eq!(kvm.read_msr(0, words::MSR_SYSTEM_TIME).unwrap(), Ok(0));
    }

    #[test]
    fn leaf_carries_signature_and_features() {
        let (_, kvm) = machine(0);
        let mut table = CpuidTable::default();
        kvm.add_cpuid(0x4000_0100, &mut table);
        let base = table.get(0x4000_0100, 0).unwrap();
        assert_eq!((base.eax, base.ebx, base.ecx, base.edx), (0x4000_0101, 0x4b4d_564b, 0x564b_4d56, 0x4d));
        assert_eq!(table.get(0x4000_0101, 0).unwrap().eax, 0x0100_000b);
    }
}
