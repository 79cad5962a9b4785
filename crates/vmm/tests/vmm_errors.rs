//! vmm(4)'s errors and limits, one test for each row of its table, by the exact command words, over a backend that does nothing.

// Helpers of these tests unwrap too.
#![allow(clippy::unwrap_used)]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use abi::vmm as words;
use rustix::io::Errno;
use vmm::ioctl::UserMemory;
use vmm::monitor::{CreateRequest, MemoryRange, RangeKind};
use vmm::{
    Backend, BackendError, BackendVm, Bus, CpuidTable, Entry, Exit, Frequencies, MsrFault, Protection, RegisterMask, Registers, Vcpu,
    VcpuId, VcpuStats, VmConfig, Vmm,
};
use zerocopy::little_endian::{I32, U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

/// What the fake processor does when it is run.
#[derive(Clone, Copy, PartialEq)]
enum Script {
    Exit(Exit),
    WaitForKick,
    Fail,
}

struct Fake {
    script: Arc<Mutex<Script>>,
    technology: &'static str,
}

struct FakeVm {
    script: Arc<Mutex<Script>>,
    kicked: Arc<AtomicBool>,
}

struct FakeVcpu {
    script: Arc<Mutex<Script>>,
    kicked: Arc<AtomicBool>,
    registers: Registers,
    last_entry: Entry,
}

impl Backend for Fake {
    fn name(&self) -> &'static str {
        "fake"
    }
    fn technology(&self) -> &'static str {
        self.technology
    }
    fn supported_cpuid(&self) -> CpuidTable {
        CpuidTable::default()
    }
    fn frequencies(&self) -> Result<Frequencies, BackendError> {
        Ok(Frequencies { tsc_hz: 1_000_000_000, apic_hz: 1_000_000_000 })
    }
    fn create_vm(&self, _: VmConfig) -> Result<Arc<dyn BackendVm>, BackendError> {
        Ok(Arc::new(FakeVm { script: Arc::clone(&self.script), kicked: Arc::default() }))
    }
}

impl BackendVm for FakeVm {
    fn create_vcpu(&self, _: VcpuId) -> Result<Box<dyn Vcpu>, BackendError> {
        Ok(Box::new(FakeVcpu {
            script: Arc::clone(&self.script),
            kicked: Arc::clone(&self.kicked),
            registers: Registers::reset(),
            last_entry: Entry::default(),
        }))
    }
    fn signal_msi(&self, _: u64, _: u32) {}
    fn set_extint(&self, _: bool) {}
    fn kick(&self, _: VcpuId) {
        self.kicked.store(true, Ordering::SeqCst);
    }
    fn protect(&self, gpa: u64, _: u64, protection: Protection) -> Result<(), BackendError> {
        if gpa >= 0x10_0000 {
            return Err(BackendError::Invalid("not memory".into()));
        }
        if protection == Protection::READ {
            return Err(BackendError::Unsupported("not here".into()));
        }
        Ok(())
    }
}

impl Vcpu for FakeVcpu {
    fn run(&mut self, _: &dyn Bus, entry: Entry) -> Result<Exit, BackendError> {
        self.last_entry = entry;
        let script = *self.script.lock().unwrap();
        match script {
            Script::Exit(exit) => Ok(exit),
            Script::Fail => Err(BackendError::Internal("broken".into())),
            Script::WaitForKick => {
                while !self.kicked.swap(false, Ordering::SeqCst) {
                    std::thread::sleep(std::time::Duration::from_millis(1));
                }
                Ok(Exit::Interrupted)
            }
        }
    }
    fn registers(&self, _: RegisterMask) -> Result<Registers, BackendError> {
        Ok(self.registers)
    }
    fn set_registers(&mut self, registers: &Registers, _: RegisterMask) -> Result<(), BackendError> {
        if registers.cr0 & 0x8000_0001 == 0x8000_0000 {
            return Err(BackendError::Invalid("paging without protection".into()));
        }
        self.registers = *registers;
        Ok(())
    }
    fn msr(&self, _: u32) -> Result<u64, BackendError> {
        Err(BackendError::Invalid("none".into()))
    }
    fn set_msr(&mut self, _: u32, _: u64) -> Result<(), BackendError> {
        Err(BackendError::Invalid("none".into()))
    }
    fn fxsave(&self) -> Result<[u8; 512], BackendError> {
        Ok([0; 512])
    }
    fn set_fxsave(&mut self, _: &[u8; 512]) -> Result<(), BackendError> {
        Ok(())
    }
    fn stats(&self) -> VcpuStats {
        VcpuStats::default()
    }
}

/// The caller's memory: one buffer at `BASE`.
struct Process(Vec<u8>);

const BASE: u64 = 0x7000_0000;

impl Process {
    fn range(&self, address: u64, len: usize) -> Result<std::ops::Range<usize>, Errno> {
        let start = address.checked_sub(BASE).ok_or(Errno::FAULT)? as usize;
        if start + len > self.0.len() { Err(Errno::FAULT) } else { Ok(start..start + len) }
    }
}

impl UserMemory for Process {
    fn copy_in(&self, address: u64, data: &mut [u8]) -> Result<(), Errno> {
        data.copy_from_slice(&self.0[self.range(address, data.len())?]);
        Ok(())
    }
    fn copy_out(&mut self, address: u64, data: &[u8]) -> Result<(), Errno> {
        let range = self.range(address, data.len())?;
        self.0[range].copy_from_slice(data);
        Ok(())
    }
}

struct Fixture {
    vmm: Vmm,
    script: Arc<Mutex<Script>>,
    process: Mutex<Process>,
}

impl Fixture {
    fn new(technology: &'static str) -> Fixture {
        let script = Arc::new(Mutex::new(Script::Exit(Exit::Shutdown)));
        let vmm = Vmm::new(Arc::new(Fake { script: Arc::clone(&script), technology }));
        Fixture { vmm, script, process: Mutex::new(Process(vec![0; 8192])) }
    }

    fn ioctl<T: IntoBytes + FromBytes>(&self, command: u32, argument: &mut T) -> Result<(), Errno> {
        let process = &mut *self.process.lock().unwrap();
        self.vmm.vmm_ioctl(command, argument.as_mut_bytes(), process)
    }

    /// A machine with 1 MiB at 0 and MMIO above.
    fn machine(&self, ncpus: u64) -> Result<u32, Errno> {
        let mut params = create(&[(0, 0x10_0000, words::MEM_RAM), (0x10_0000, 0x10_0000, words::MEM_MMIO)], ncpus);
        self.ioctl(words::CREATE, &mut params)?;
        Ok(params.id.get())
    }

    fn run(&self, params: &mut words::RunParams) -> (Result<(), Errno>, words::VmExit) {
        params.exit = U64::new(BASE);
        let result = self.ioctl(words::RUN, params);
        let exit = words::VmExit::read_from_prefix(&self.process.lock().unwrap().0).unwrap().0;
        (result, exit)
    }
}

fn create(ranges: &[(u64, u64, i32)], ncpus: u64) -> words::CreateParams {
    let mut params = words::CreateParams::zeroed();
    params.nmemranges = U64::new(ranges.len() as u64);
    params.ncpus = U64::new(ncpus);
    for (out, (gpa, size, kind)) in params.memranges.iter_mut().zip(ranges) {
        (out.gpa, out.size, out.kind) = (U64::new(*gpa), U64::new(*size), I32::new(*kind));
    }
    params.name[..4].copy_from_slice(b"test");
    params
}

fn run_params(vm: u32) -> words::RunParams {
    let mut params = words::RunParams::zeroed();
    params.vm_id = U32::new(vm);
    params
}

#[test]
fn unknown_command_gives_enotty() {
    let fixture = Fixture::new("soft");
    for command in [0, 0xc028_5601, words::CREATE ^ 0x100, 0x8290_560b] {
        assert_eq!(fixture.vmm.vmm_ioctl(command, &mut [0; 40], &mut Process(Vec::new())), Err(Errno::NOTTY));
    }
}

#[test]
fn argument_of_the_wrong_size_gives_efault() {
    let fixture = Fixture::new("soft");
    assert_eq!(fixture.vmm.vmm_ioctl(words::TERM, &mut [0; 3], &mut Process(Vec::new())), Err(Errno::FAULT));
}

#[test]
fn no_such_machine_or_processor_gives_enoent() {
    let fixture = Fixture::new("soft");
    let vm = fixture.machine(1).unwrap();
    for (id, vcpu) in [(vm + 1, 0), (vm, 1)] {
        let mut run = run_params(id);
        run.vcpu_id = U32::new(vcpu);
        assert_eq!(fixture.run(&mut run).0, Err(Errno::NOENT));
        let mut intr = words::IntrParams::zeroed();
        (intr.vm_id, intr.vcpu_id) = (U32::new(id), U32::new(vcpu));
        assert_eq!(fixture.ioctl(words::INTR, &mut intr), Err(Errno::NOENT));
        let mut registers = words::RegistersParams::zeroed();
        (registers.vm_id, registers.vcpu_id) = (U32::new(id), U32::new(vcpu));
        assert_eq!(fixture.ioctl(words::READREGS, &mut registers), Err(Errno::NOENT));
        assert_eq!(fixture.ioctl(words::WRITEREGS, &mut registers), Err(Errno::NOENT));
        let mut params = words::VmParams::zeroed();
        (params.vm_id, params.vcpu_id) = (U32::new(id), U32::new(vcpu));
        assert_eq!(fixture.ioctl(words::READVMPARAMS, &mut params), Err(Errno::NOENT));
        assert_eq!(fixture.ioctl(words::WRITEVMPARAMS, &mut params), Err(Errno::NOENT));
        let mut reset = words::ResetCpuParams::zeroed();
        (reset.vm_id, reset.vcpu_id) = (U32::new(id), U32::new(vcpu));
        assert_eq!(fixture.ioctl(words::RESETCPU, &mut reset), Err(Errno::NOENT));
        let mut protect = words::MprotectEptParams::zeroed();
        (protect.vm_id, protect.vcpu_id, protect.size, protect.prot) = (U32::new(id), U32::new(vcpu), U64::new(4096), I32::new(5));
        assert_eq!(fixture.ioctl(words::MPROTECT_EPT, &mut protect), Err(Errno::NOENT));
    }
    let mut term = words::TerminateParams { vm_id: U32::new(99) };
    assert_eq!(fixture.ioctl(words::TERM, &mut term), Err(Errno::NOENT));
}

#[test]
fn processor_that_runs_gives_ebusy_and_intr_and_term_reach_it() {
    let fixture = Arc::new(Fixture::new("soft"));
    let vm = fixture.machine(1).unwrap();
    *fixture.script.lock().unwrap() = Script::WaitForKick;
    let start = |fixture: &Arc<Fixture>| {
        let fixture = Arc::clone(fixture);
        let thread = std::thread::spawn({
            let fixture = Arc::clone(&fixture);
            move || fixture.vmm.run(vm, 0, Entry::default(), &NoBus)
        });
        while fixture.vmm.info()[0].vcpus[0] != words::VCPU_RUNNING {
            std::thread::yield_now();
        }
        thread
    };
    let thread = start(&fixture);
    assert_eq!(fixture.run(&mut run_params(vm)).0, Err(Errno::BUSY));
    let mut registers = words::RegistersParams::zeroed();
    registers.vm_id = U32::new(vm);
    assert_eq!(fixture.ioctl(words::READREGS, &mut registers), Err(Errno::BUSY));
    assert_eq!(fixture.ioctl(words::WRITEREGS, &mut registers), Err(Errno::BUSY));

    let mut intr = words::IntrParams::zeroed();
    (intr.vm_id, intr.intr) = (U32::new(vm), U16::new(1));
    fixture.ioctl(words::INTR, &mut intr).unwrap();
    assert_eq!(thread.join().unwrap().unwrap(), Exit::Interrupted);

    let thread = start(&fixture);
    fixture.ioctl(words::TERM, &mut words::TerminateParams { vm_id: U32::new(vm) }).unwrap();
    assert!(matches!(thread.join().unwrap(), Err(vmm::VmmError::Terminated(_))));
    assert!(fixture.vmm.info().is_empty());
}

#[test]
fn more_than_512_processors_in_all_give_enomem() {
    let fixture = Fixture::new("soft");
    for _ in 0..8 {
        fixture.machine(64).unwrap();
    }
    assert_eq!(fixture.machine(1), Err(Errno::NOMEM));
    fixture.ioctl(words::TERM, &mut words::TerminateParams { vm_id: U32::new(1) }).unwrap();
    fixture.machine(1).unwrap();
}

#[test]
fn bad_number_of_processors_gives_einval() {
    let fixture = Fixture::new("soft");
    for ncpus in [0, 65, u64::MAX] {
        assert_eq!(fixture.machine(ncpus), Err(Errno::INVAL));
    }
}

#[test]
fn bad_memory_ranges_give_einval() {
    let fixture = Fixture::new("soft");
    let ram = words::MEM_RAM;
    let gib = 1u64 << 30;
    let seventeen: Vec<_> = (0..17).map(|i| (i * 4096, 4096, ram)).collect();
    type Ranges<'a> = &'a [(u64, u64, i32)];
    let cases: [(&str, Ranges); 11] = [
        ("none", &[]),
        ("too many", &seventeen),
        ("unaligned address", &[(0x800, 0x1000, ram)]),
        ("unaligned size", &[(0, 0x800, ram)]),
        ("no size", &[(0, 0, ram)]),
        ("out of order", &[(0x2000, 0x1000, ram), (0, 0x1000, ram)]),
        ("overlap", &[(0, 0x2000, ram), (0x1000, 0x1000, ram)]),
        ("above 128 GiB", &[(0, 0x1000, ram), (127 * gib, 2 * gib, ram)]),
        ("MMIO above 128 GiB", &[(0, 0x1000, ram), (128 * gib, 0x1000, words::MEM_MMIO)]),
        ("wrap around", &[(u64::MAX - 0xfff, 0x1000, ram)]),
        ("unknown type", &[(0, 0x1000, 3)]),
    ];
    for (what, ranges) in cases {
        let mut params = create(ranges, 1);
        assert_eq!(fixture.ioctl(words::CREATE, &mut params), Err(Errno::INVAL), "{what}");
    }
    let mut params = create(&[(0, 0x1000, ram)], 1);
    params.memranges[0].va = U64::new(0x1234);
    assert_eq!(fixture.ioctl(words::CREATE, &mut params), Err(Errno::INVAL), "unaligned va");
    params = create(&[(0, 0x1000, ram)], 1);
    params.name.fill(b'x');
    assert_eq!(fixture.ioctl(words::CREATE, &mut params), Err(Errno::INVAL), "name without end");
    params = create(&[(0, 0x1000, ram)], 1);
    params.nmemranges = U64::new(u64::MAX);
    assert_eq!(fixture.ioctl(words::CREATE, &mut params), Err(Errno::INVAL), "absurd count");
}

#[test]
fn bad_masks_and_values_give_einval() {
    let fixture = Fixture::new("soft");
    let vm = fixture.machine(1).unwrap();
    let mut registers = words::RegistersParams::zeroed();
    (registers.vm_id, registers.mask) = (U32::new(vm), U64::new(0x20));
    assert_eq!(fixture.ioctl(words::READREGS, &mut registers), Err(Errno::INVAL));
    assert_eq!(fixture.ioctl(words::WRITEREGS, &mut registers), Err(Errno::INVAL));
    registers.mask = U64::new(words::RWREGS_ALL);
    registers.state.cr[0] = U64::new(0x8000_0000);
    assert_eq!(fixture.ioctl(words::WRITEREGS, &mut registers), Err(Errno::INVAL));
    registers.state.cr[0] = U64::new(0x10);
    registers.state.gdtr.limit = U32::new(0x10000);
    assert_eq!(fixture.ioctl(words::WRITEREGS, &mut registers), Err(Errno::INVAL));
    let mut params = words::VmParams::zeroed();
    (params.vm_id, params.mask) = (U32::new(vm), U32::new(4));
    assert_eq!(fixture.ioctl(words::READVMPARAMS, &mut params), Err(Errno::INVAL));
    assert_eq!(fixture.ioctl(words::WRITEVMPARAMS, &mut params), Err(Errno::INVAL));
    let mut run = run_params(vm);
    run.inject.kind = 4;
    assert_eq!(fixture.run(&mut run).0, Err(Errno::INVAL));
}

#[test]
fn mprotect_ept_refuses_what_vmm_refuses_and_says_what_the_host_cannot() {
    let fixture = Fixture::new("soft");
    let vm = fixture.machine(1).unwrap();
    let protect = |sgpa: u64, size: u64, prot: i32| {
        let mut params = words::MprotectEptParams::zeroed();
        (params.vm_id, params.sgpa, params.size, params.prot) = (U32::new(vm), U64::new(sgpa), U64::new(size), I32::new(prot));
        fixture.ioctl(words::MPROTECT_EPT, &mut params)
    };
    assert_eq!(protect(0x1000, 0x1000, 5), Ok(()));
    for (sgpa, size, prot) in [
        (0x1000, 0x1000, 0),
        (0x1000, 0x1000, 2),
        (0x1000, 0x1000, 8),
        (0x1000, 0x1000, -1),
        (0x1001, 0x1000, 5),
        (0x1000, 0x1001, 5),
        (0x1000, 0, 5),
        (u64::MAX - 0xfff, 0x1000, 5),
        (0x10_0000, 0x1000, 5),
    ] {
        assert_eq!(protect(sgpa, size, prot), Err(Errno::INVAL), "{sgpa:#x} {size:#x} {prot}");
    }
    assert_eq!(protect(0x1000, 0x1000, 1), Err(Errno::OPNOTSUPP));
}

#[test]
fn bad_pointers_give_efault() {
    let fixture = Fixture::new("soft");
    let vm = fixture.machine(1).unwrap();
    let mut run = run_params(vm);
    run.exit = U64::new(8);
    assert_eq!(fixture.ioctl(words::RUN, &mut run), Err(Errno::FAULT));
    let mut info = words::InfoParams::zeroed();
    (info.size, info.buffer) = (U64::new(4096), U64::new(8));
    assert_eq!(fixture.ioctl(words::INFO, &mut info), Err(Errno::FAULT));
}

#[test]
fn guest_that_cannot_go_on_gives_eio() {
    let fixture = Fixture::new("soft");
    let vm = fixture.machine(1).unwrap();
    *fixture.script.lock().unwrap() = Script::Fail;
    assert_eq!(fixture.run(&mut run_params(vm)).0, Err(Errno::IO));
    // HLT with interrupts off, which is how a processor after reset is.
    *fixture.script.lock().unwrap() = Script::Exit(Exit::Halt);
    assert_eq!(fixture.run(&mut run_params(vm)).0, Err(Errno::IO));
    assert!(fixture.vmm.info().is_empty(), "the machine is ended");
}

#[test]
fn access_outside_all_ranges_gives_einval_and_ends_the_machine() {
    let fixture = Fixture::new("soft");
    let vm = fixture.machine(1).unwrap();
    *fixture.script.lock().unwrap() = Script::Exit(Exit::Mmio { gpa: 0x30_0000, size: 4, write: None });
    assert_eq!(fixture.run(&mut run_params(vm)).0, Err(Errno::INVAL));
    assert!(fixture.vmm.info().is_empty());
}

#[test]
fn exits_have_the_numbers_of_the_processor_they_came_from() {
    let port_out = Exit::PortOut { port: 0x3f8, size: 1, value: 0x41, string: false };
    let mmio = Exit::Mmio { gpa: 0x10_0000, size: 4, write: Some(1) };
    for (technology, io, npf, shutdown) in [("VMX/EPT", 0x1e, 0x30, 2), ("SVM/RVI", 0x7b, 0x400, 0x7f), ("soft", 0x1e, 0x30, 2)] {
        let fixture = Fixture::new(technology);
        let vm = fixture.machine(1).unwrap();
        let mut params = run_params(vm);
        let mut run = |script| {
            *fixture.script.lock().unwrap() = Script::Exit(script);
            let (result, exit) = fixture.run(&mut params);
            result.unwrap();
            (params.exit_reason.get(), exit)
        };
        let (reason, exit) = run(port_out);
        assert_eq!(reason, io);
        let record = words::ExitInOut::read_from_prefix(&exit.record).unwrap().0;
        assert_eq!((record.size, record.dir, record.port.get(), record.data.get()), (1, words::DIRECTION_OUT, 0x3f8, 0x41));
        assert_eq!(exit.state.gpr[16].get(), 0xfff0, "registers come with the exit");
        let (reason, exit) = run(mmio);
        assert_eq!((reason, exit.record[0]), (npf, words::FAULT_MMIO_ASSIST));
        assert_eq!(run(Exit::Protection { gpa: 0x1000, access: vmm::exit::Access::Write }).1.record[0], words::FAULT_PROTECT);
        assert_eq!(run(Exit::Shutdown).0, shutdown);
        assert_eq!(run(Exit::Interrupted).0, words::EXIT_NONE);
    }
}

#[test]
fn info_with_a_short_buffer_tells_the_size_it_needs() {
    let fixture = Fixture::new("soft");
    let vm = fixture.machine(3).unwrap();
    let mut info = words::InfoParams::zeroed();
    fixture.ioctl(words::INFO, &mut info).unwrap();
    assert_eq!((info.count.get(), info.size.get()), (1, 160));
    info.buffer = U64::new(BASE);
    fixture.ioctl(words::INFO, &mut info).unwrap();
    let result = words::InfoResult::read_from_prefix(&fixture.process.lock().unwrap().0).unwrap().0;
    assert_eq!((result.memory.get(), result.ncpus.get(), result.id.get()), (0x10_0000, 3, vm));
    assert_eq!(result.vcpu_state[..4], [0, 0, 0, words::VCPU_UNKNOWN]);
    assert_eq!(&result.name[..5], b"test\0");
    assert_eq!(result.creator.get().cast_unsigned(), std::process::id());
}

#[test]
fn create_maps_memory_and_sharemem_finds_it_again() {
    let fixture = Fixture::new("soft");
    let mut params = create(&[(0, 0x1000, words::MEM_RAM), (0x1000, 0x1000, words::MEM_MMIO), (0x2000, 0x1000, words::MEM_RESERVED)], 1);
    let ranges = params.memranges;
    fixture.ioctl(words::CREATE, &mut params).unwrap();
    let addresses = params.memranges.map(|range| range.va.get());
    assert!(addresses[0] != 0 && addresses[1] == 0 && addresses[2] != 0);
    let mut share = words::ShareMemParams::zeroed();
    (share.vm_id, share.nmemranges, share.memranges) = (params.id, U64::new(3), ranges);
    fixture.ioctl(words::SHAREMEM, &mut share).unwrap();
    assert_eq!(share.va.map(U64::get), addresses);
    share.nmemranges = U64::new(2);
    assert_eq!(fixture.ioctl(words::SHAREMEM, &mut share), Err(Errno::INVAL));
}

#[test]
fn registers_are_the_same_after_a_way_through_the_words() {
    let fixture = Fixture::new("soft");
    let vm = fixture.machine(1).unwrap();
    let mut params = words::RegistersParams::zeroed();
    (params.vm_id, params.mask) = (U32::new(vm), U64::new(words::RWREGS_ALL));
    for (value, out) in (1u64..).zip(params.state.gpr.iter_mut().chain(&mut params.state.dr).chain(&mut params.state.msr)) {
        *out = U64::new(value);
    }
    params.state.segment[3].access = U32::new(0x93);
    params.state.idtr.limit = U32::new(0xfff);
    let before = params.state;
    fixture.ioctl(words::WRITEREGS, &mut params).unwrap();
    params.state.zero();
    fixture.ioctl(words::READREGS, &mut params).unwrap();
    assert_eq!(params.state.as_bytes(), before.as_bytes());
}

#[test]
fn pvclock_address_reaches_the_paravirtual_bus_and_the_version_its_page() {
    let fixture = Fixture::new("soft");
    let request =
        CreateRequest { name: "clock".into(), vcpus: 1, ranges: vec![MemoryRange { gpa: 0, size: 0x10000, kind: RangeKind::Ram }] };
    let vm = fixture.vmm.create(&request).unwrap();
    let clock = Arc::new(Clock::default());
    fixture.vmm.set_paravirtual(vm, clock.clone()).unwrap();
    let mut params = words::VmParams::zeroed();
    (params.vm_id, params.mask) = (U32::new(vm), U32::new(words::VMPARAMS_ALL));
    (params.pvclock_gpa, params.pvclock_version) = (U64::new(0x5001), U32::new(8));
    fixture.ioctl(words::WRITEVMPARAMS, &mut params).unwrap();
    assert_eq!(*clock.0.lock().unwrap(), 0x5001);
    params.zero();
    (params.vm_id, params.mask) = (U32::new(vm), U32::new(words::VMPARAMS_ALL));
    fixture.ioctl(words::READVMPARAMS, &mut params).unwrap();
    assert_eq!((params.pvclock_gpa.get(), params.pvclock_version.get()), (0x5001, 8));
    params.pvclock_gpa = U64::new(0x99_0001);
    assert_eq!(fixture.ioctl(words::WRITEVMPARAMS, &mut params), Err(Errno::INVAL));
}

/// A bus on which nothing is.
struct NoBus;

/// A bus with pvclock's MSR.
#[derive(Default)]
struct Clock(Mutex<u64>);

macro_rules! empty_doors {
    () => {};
}

impl Bus for NoBus {
    empty_doors!();
}

impl Bus for Clock {
    empty_doors!();
    fn read_msr(&self, _: VcpuId, index: u32) -> Option<Result<u64, MsrFault>> {
        (index == 0x4b56_4d01).then(|| Ok(*self.0.lock().unwrap()))
    }
    fn write_msr(&self, _: VcpuId, index: u32, value: u64) -> Option<Result<(), MsrFault>> {
        (index == 0x4b56_4d01).then(|| {
            *self.0.lock().unwrap() = value;
            Ok(())
        })
    }
}
