//! A guest made by hand: page tables, descriptor tables, and handlers that stop the machine and can be asked what came.
//!
//! Code is written with iced's assembler at [`CODE`], runs at privilege level 0 in 64-bit mode unless a test says otherwise, and
//! ends with HLT, which without a local APIC leaves `Vcpu::run`.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use iced_x86::code_asm::CodeAssembler;
use soft::Soft;
use vm_memory::{ByteValued, Bytes, GuestAddress};
use vmm::memory::GuestMemory;
use vmm::time::{HostClock, StepClock, Timers};
use vmm::{
    Backend, BackendVm, Bus, DescriptorTable, Entry, Exit, Hypercall, MsrFault, PortCall, RegisterMask, Registers, Segment, Vcpu, VcpuId,
    VmConfig,
};

pub const GDT: u64 = 0x1000;
pub const IDT: u64 = 0x2000;
pub const TSS: u64 = 0x3000;
/// Top of the stack that exceptions from user code get.
pub const KERNEL_STACK: u64 = 0x6000;
/// Top of interrupt stack 1.
pub const IST1: u64 = 0x7000;
/// Handler of vector n, sixteen bytes each: HLT.
pub const HANDLERS: u64 = 0x8000;
pub const TABLES: u64 = 0x10000;
pub const CODE: u64 = 0x20000;
pub const STACK: u64 = 0x2f000;
/// Scratch pages.
pub const DATA: u64 = 0x30000;
/// All RAM, identity mapped by 4 KiB pages.
pub const MEMORY: u64 = 0x20_0000;

pub const KERNEL_CODE: u16 = 0x08;
pub const KERNEL_DATA: u16 = 0x10;
pub const USER_CODE_32: u16 = 0x1b;
pub const USER_DATA: u16 = 0x23;
pub const USER_CODE: u16 = 0x2b;
pub const TSS_SELECTOR: u16 = 0x30;
/// 32-bit code and data of level 0, and what a test puts there.
pub const KERNEL_CODE_32: u16 = 0x40;
pub const SPARE: u16 = 0x50;

pub const PRESENT: u64 = 1;
pub const WRITE: u64 = 2;
pub const USER: u64 = 4;
pub const NO_EXECUTE: u64 = 1 << 63;

const WITH_ERROR: [u8; 7] = [8, 10, 11, 12, 13, 14, 17];

/// What an exception handler found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exception {
    pub vector: u8,
    pub error: Option<u64>,
    pub rip: u64,
    pub cs: u16,
    pub rflags: u64,
    pub rsp: u64,
}

pub struct Machine {
    pub memory: GuestMemory,
    pub vm: Arc<dyn BackendVm>,
    pub vcpu: Box<dyn Vcpu>,
    pub bus: TestBus,
}

/// The port that takes registers.
pub const REGISTER_PORT: u16 = 0x5658;

/// Takes OUT to port 0x80 (and counts), answers IN from port 0x81 with 0x5a, notes calls of [`REGISTER_PORT`] and answers by `answer`;
/// declines the rest.
#[derive(Default)]
pub struct TestBus {
    pub outs: AtomicU32,
    pub calls: Mutex<Vec<PortCall>>,
    pub answer: Option<fn(&mut PortCall)>,
}

impl Bus for TestBus {
    fn port_in(&self, _: VcpuId, port: u16, _: u8) -> Option<u32> {
        (port == 0x81).then_some(0x5a)
    }
    fn port_out(&self, _: VcpuId, port: u16, _: u8, _: u32) -> bool {
        self.outs.fetch_add(u32::from(port == 0x80), Ordering::Relaxed);
        port == 0x80
    }
    fn takes_registers(&self, port: u16) -> bool {
        port == REGISTER_PORT
    }
    fn port_call(&self, _: VcpuId, call: &mut PortCall) {
        self.calls.lock().unwrap().push(*call);
        if let Some(answer) = self.answer {
            answer(call);
        }
    }
    fn mmio_read(&self, _: VcpuId, gpa: u64, data: &mut [u8]) -> bool {
        data.fill(gpa as u8);
        gpa < 0xf000_0000
    }
    fn mmio_write(&self, _: VcpuId, gpa: u64, _: &[u8]) -> bool {
        gpa < 0xf000_0000
    }
    fn read_msr(&self, _: VcpuId, index: u32) -> Option<Result<u64, MsrFault>> {
        (index == 0x4000_0000).then_some(Ok(0x1234))
    }
    fn write_msr(&self, _: VcpuId, index: u32, _: u64) -> Option<Result<(), MsrFault>> {
        (index == 0x4000_0000).then_some(Err(MsrFault))
    }
    fn hypercall(&self, _: VcpuId, call: &mut Hypercall) -> bool {
        call.gpr[0] += 1;
        call.gpr[0] < 0x100
    }
}

impl Machine {
    /// One processor without local APIC.
    pub fn new() -> Machine {
        Machine::with(1, false, false)
    }

    pub fn with(vcpus: u32, local_apic: bool, deterministic: bool) -> Machine {
        let memory = vmm::memory::map(&[(0, MEMORY)]).unwrap();
        let backend = Soft::translating_after(super::TRANSLATE_AFTER);
        let timers =
            if deterministic { Timers::new(Arc::new(StepClock::new(Duration::ZERO))) } else { Timers::new(Arc::new(HostClock::new())) };
        let config = VmConfig { memory: Arc::clone(&memory), vcpus, local_apic, cpuid: backend.supported_cpuid(), timers, deterministic };
        let vm = backend.create_vm(config).unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        let mut machine = Machine { memory, vm, vcpu, bus: TestBus::default() };
        machine.put(GDT + 0x08, 0x00af_9b00_0000_ffffu64);
        machine.put(GDT + 0x10, 0x00cf_9300_0000_ffffu64);
        machine.put(GDT + 0x18, 0x00cf_fb00_0000_ffffu64);
        machine.put(GDT + 0x20, 0x00cf_f300_0000_ffffu64);
        machine.put(GDT + 0x28, 0x00af_fb00_0000_ffffu64);
        machine.put(GDT + 0x30, 0x0000_8b00_3000_0067u64);
        machine.put(GDT + 0x40, 0x00cf_9b00_0000_ffffu64);
        machine.put(GDT + 0x48, 0x00cf_9300_0000_ffffu64);
        machine.put(TSS + 4, KERNEL_STACK);
        machine.put(TSS + 0x24, IST1);
        // No I/O bitmap: its offset lies beyond the limit.
        machine.put(TSS + 0x66, 0xffffu16);
        for vector in 0..=255 {
            machine.gate(vector, 0x8e, 0);
        }
        for vector in 0..256 {
            machine.put(HANDLERS + vector * 16, 0xf4u8);
        }
        machine.put(TABLES, (TABLES + 0x1000) | PRESENT | WRITE | USER);
        machine.put(TABLES + 0x1000, (TABLES + 0x2000) | PRESENT | WRITE | USER);
        machine.put(TABLES + 0x2000, (TABLES + 0x3000) | PRESENT | WRITE | USER);
        for page in 0..MEMORY / 0x1000 {
            machine.map(page * 0x1000, page * 0x1000 | PRESENT | WRITE);
        }
        machine.set(&Machine::start());
        machine
    }

    /// Level 0, 64-bit mode, at [`CODE`].
    pub fn start() -> Registers {
        let data = Segment { selector: KERNEL_DATA, limit: 0xffff_ffff, access: 0xc093, base: 0 };
        let mut registers = Registers {
            rip: CODE,
            rflags: 2,
            cr0: 0x8001_0033,
            cr4: 0x6e0,
            cr3: TABLES,
            efer: 0xd01,
            cs: Segment { selector: KERNEL_CODE, limit: 0xffff_ffff, access: 0xa09b, base: 0 },
            ss: data,
            ds: data,
            es: data,
            fs: data,
            gs: data,
            tr: Segment { selector: TSS_SELECTOR, limit: 0x67, access: 0x8b, base: TSS },
            ldtr: Segment { access: 0x1_0000, ..Segment::default() },
            gdtr: DescriptorTable { base: GDT, limit: 0x7f },
            idtr: DescriptorTable { base: IDT, limit: 0xfff },
            dr6: 0xffff_0ff0,
            dr7: 0x400,
            ..Registers::reset()
        };
        registers.gpr[4] = STACK;
        registers
    }

    /// Level 3, 64-bit mode, at [`CODE`].
    pub fn start_user() -> Registers {
        let mut registers = Machine::start();
        registers.cs = Segment { selector: USER_CODE, limit: 0xffff_ffff, access: 0xa0fb, base: 0 };
        registers.ss = Segment { selector: USER_DATA, limit: 0xffff_ffff, access: 0xc0f3, base: 0 };
        registers
    }

    /// Lets user code reach its code, stack and data pages.
    pub fn open_to_user(&mut self) {
        for page in (CODE..DATA + 0x8000).step_by(0x1000) {
            self.map(page, page | PRESENT | WRITE | USER);
        }
    }

    /// Sets the page-table entry of a linear page of the low 2 MiB.
    pub fn map(&mut self, linear: u64, entry: u64) {
        self.put(Machine::entry_address(linear), entry);
    }

    pub fn entry_address(linear: u64) -> u64 {
        TABLES + 0x3000 + (linear >> 12 & 511) * 8
    }

    /// Makes a gate to the handler of `vector`.
    pub fn gate(&mut self, vector: u64, kind: u64, ist: u64) {
        let handler = HANDLERS + vector * 16;
        self.put(IDT + vector * 16, handler & 0xffff | u64::from(KERNEL_CODE) << 16 | ist << 32 | kind << 40 | (handler >> 16) << 48);
        self.put(IDT + vector * 16 + 8, 0u64);
    }

    pub fn put<T: ByteValued>(&self, at: u64, value: T) {
        self.memory.write_obj(value, GuestAddress(at)).unwrap();
    }

    pub fn get<T: ByteValued>(&self, at: u64) -> T {
        self.memory.read_obj(GuestAddress(at)).unwrap()
    }

    /// Assembles code to an address.
    pub fn code(&self, at: u64, write: impl FnOnce(&mut CodeAssembler)) {
        self.code_of(64, at, write);
    }

    pub fn code_of(&self, bits: u32, at: u64, write: impl FnOnce(&mut CodeAssembler)) {
        let mut assembler = CodeAssembler::new(bits).unwrap();
        write(&mut assembler);
        self.memory.write_slice(&assembler.assemble(at).unwrap(), GuestAddress(at)).unwrap();
    }

    pub fn set(&mut self, registers: &Registers) {
        self.vcpu.set_registers(registers, RegisterMask::all()).unwrap();
    }

    pub fn registers(&self) -> Registers {
        self.vcpu.registers(RegisterMask::all()).unwrap()
    }

    pub fn run(&mut self) -> Exit {
        self.vcpu.run(&self.bus, Entry::default()).unwrap()
    }

    /// Runs until another thread has kicked the processor, which must be soon after it does.
    #[track_caller]
    pub fn run_until_kicked(&mut self) {
        let vm = Arc::clone(&self.vm);
        let kicker = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            vm.kick(0);
            Instant::now()
        });
        assert_eq!(self.run(), Exit::Interrupted);
        assert!(kicker.join().unwrap().elapsed() < Duration::from_secs(10));
    }

    /// Runs to HLT and returns the registers; the HLT must not be a handler's.
    pub fn run_to_halt(&mut self) -> Registers {
        assert_eq!(self.run(), Exit::Halt);
        let registers = self.registers();
        if let Some(exception) = self.exception_at(&registers) {
            panic!("unexpected {exception:x?}\n{registers}");
        }
        registers
    }

    /// Runs to the HLT of an exception handler.
    pub fn run_to_exception(&mut self) -> Exception {
        let exit = self.run();
        let registers = self.registers();
        assert_eq!(exit, Exit::Halt, "\n{registers}");
        self.exception_at(&registers).unwrap_or_else(|| panic!("no exception came\n{registers}"))
    }

    fn exception_at(&self, registers: &Registers) -> Option<Exception> {
        if !(HANDLERS..HANDLERS + 0x1000).contains(&registers.rip) {
            return None;
        }
        let vector = ((registers.rip - 1 - HANDLERS) / 16) as u8;
        let mut frame = registers.gpr[4];
        let error = WITH_ERROR.contains(&vector).then(|| {
            frame += 8;
            self.get::<u64>(frame - 8)
        });
        Some(Exception {
            vector,
            error,
            rip: self.get(frame),
            cs: self.get(frame + 8),
            rflags: self.get(frame + 16),
            rsp: self.get(frame + 24),
        })
    }
}
