//! The candidate: executes code in a guest at privilege level 3, by the public interface of the backend.
//!
//! One instruction is executed in two ways: single-stepped, which ends behind it, and as the start of an ordinary run, which ends at
//! the INT3 behind it or at the target of a branch. `tests/lockstep` runs whole programs in the same guest.

use std::sync::Arc;
use std::time::Duration;

use iced_x86::code_asm::{CodeAssembler, byte_ptr};
use soft::Soft;
use vm_memory::{Bytes, GuestAddress};
use vmm::memory::GuestMemory;
use vmm::time::{StepClock, Timers};
use vmm::{Backend, BackendVm, Bus, DescriptorTable, Entry, Exit, RegisterMask, Registers, Segment, Vcpu, VmConfig};

use crate::state::{Fault, Outcome, State};

// Guest physical addresses.
const GDT: u64 = 0x1000;
const IDT: u64 = 0x2000;
const TSS: u64 = 0x3000;
/// End of the stack that exceptions get.
pub const STACK_TOP: u64 = 0x6000;
const HANDLERS: u64 = 0x7000;
const TABLES: u64 = 0x10000;
pub const CODE: u64 = 0x20000;
pub const DATA: u64 = 0x30000;
/// Page directory; page tables follow it as they are needed.
const DIRECTORY: u64 = TABLES + 0x2000;
/// What lies below is mapped one to one for the supervisor.
const SUPERVISOR_END: u64 = 0x10_0000;

/// Bases of the two segments that have one. Nothing in the comparison with the host refers to them. This one is so small that without it
/// an operand in the data is in the data still.
pub const FS_BASE: u64 = 0x140;
/// So far off that only a register in the operand brings it back to the data.
pub const GS_BASE: u64 = 0x7fff_0000_0000;

/// Page-table entry bits: present, accessed, dirty.
const PRESENT: u64 = 0x61;
const WRITE: u64 = 2;
const USER: u64 = 4;
const NO_EXECUTE: u64 = 1 << 63;
/// Page that user code reads, writes and executes.
pub const USER_ALL: u64 = PRESENT | WRITE | USER;

/// Selectors as Linux has them for 64-bit programs, so that instructions which show them agree.
const USER_CODE: u16 = 0x33;
const USER_DATA: u16 = 0x2b;
const KERNEL_CODE: u16 = 0x10;
const TSS_SELECTOR: u16 = 0x40;

/// Vectors that push an error code.
const WITH_ERROR: [u64; 7] = [8, 10, 11, 12, 13, 14, 17];

/// The guest.
pub struct Guest {
    pub memory: GuestMemory,
    #[allow(dead_code)] // Only programs have to be stopped.
    pub vm: Arc<dyn BackendVm>,
    pub vcpu: Box<dyn Vcpu>,
    next_table: u64,
}

/// Linear address of code that makes the TLB know the data's writable pages before the instruction is executed, and leaves registers, flags
/// and data alone: two times NOT for each, and a jump to the instruction.
const WARM_UP: u64 = 0x1800_0000;
/// Its guest physical address.
const WARM_UP_PAGE: u64 = 0x28000;

/// Nothing is outside.
pub struct NoBus;

impl Bus for NoBus {}

impl Guest {
    /// A machine whose page tables, descriptor tables and handlers are in place.
    pub fn new(backend: Soft) -> Guest {
        let memory = vmm::memory::map(&[(0, 0x10_0000)]).unwrap();
        let timers = Timers::new(Arc::new(StepClock::new(Duration::ZERO)));
        let config = VmConfig {
            memory: Arc::clone(&memory),
            vcpus: 1,
            local_apic: false,
            cpuid: backend.supported_cpuid(),
            timers,
            deterministic: false,
        };
        let vm = backend.create_vm(config).unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        let put = |at: u64, value: u64| memory.write_obj(value, GuestAddress(at)).unwrap();
        put(GDT + u64::from(KERNEL_CODE), 0x00af_9b00_0000_ffff);
        put(GDT + 0x18, 0x00cf_9300_0000_ffff);
        put(GDT + 0x28, 0x00cf_f300_0000_ffff);
        put(GDT + 0x30, 0x00af_fb00_0000_ffff);
        put(TSS + 4, STACK_TOP);
        for vector in 0..32 {
            let handler = HANDLERS + vector * 16;
            // Interrupt gates; that of INT3 is the user's.
            let kind = if vector == 3 { 0xee00 } else { 0x8e00 };
            put(IDT + vector * 16, handler & 0xffff | u64::from(KERNEL_CODE) << 16 | kind << 32 | (handler >> 16 & 0xffff) << 48);
            put(IDT + vector * 16 + 8, handler >> 32);
            // HLT, which without a local APIC leaves `run`.
            memory.write_obj(0xf4u8, GuestAddress(handler)).unwrap();
        }
        // Four levels. The low 1 MiB is the supervisor's, identity mapped; code and data are the user's.
        put(TABLES, (TABLES + 0x1000) | USER_ALL);
        put(TABLES + 0x1000, DIRECTORY | USER_ALL);
        let mut guest = Guest { memory, vm, vcpu, next_table: DIRECTORY + 0x1000 };
        for at in (0..SUPERVISOR_END).step_by(0x1000) {
            guest.map(at, at, PRESENT | WRITE);
        }
        guest.map(State::CODE, CODE, PRESENT | USER);
        guest.map_data(State::DATA);
        guest.map(WARM_UP, WARM_UP_PAGE, PRESENT | USER);
        let mut warm_up = CodeAssembler::new(64).unwrap();
        for page in [State::DATA, State::DATA, State::DATA + 0x1000, State::DATA + 0x1000] {
            warm_up.not(byte_ptr(page)).unwrap();
        }
        warm_up.jmp(State::CODE).unwrap();
        guest.memory.write_slice(&warm_up.assemble(WARM_UP).unwrap(), GuestAddress(WARM_UP_PAGE)).unwrap();
        guest
    }

    /// Maps the data pages at a linear address.
    pub fn map_data(&mut self, linear: u64) {
        for at in (0..State::DATA_SIZE as u64).step_by(0x1000) {
            let write = if at < State::WRITABLE as u64 { WRITE } else { 0 };
            self.map(linear + at, DATA + at, PRESENT | write | USER | NO_EXECUTE);
        }
    }

    /// Maps a page of the low 1 GiB.
    pub fn map(&mut self, linear: u64, gpa: u64, flags: u64) {
        let entry = GuestAddress(DIRECTORY + (linear >> 21) * 8);
        let mut table = self.memory.read_obj::<u64>(entry).unwrap() & !0xfff;
        if table == 0 {
            table = self.next_table;
            self.next_table += 0x1000;
            self.memory.write_obj(table | USER_ALL, entry).unwrap();
        }
        self.memory.write_obj(gpa | flags, GuestAddress(table + (linear >> 12 & 511) * 8)).unwrap();
    }

    /// Puts code and state in place.
    fn load(&mut self, bytes: &[u8], state: &State) {
        let mut code = [0xcc; 4096];
        code[..bytes.len()].copy_from_slice(bytes);
        self.memory.write_slice(&code, GuestAddress(CODE)).unwrap();
        self.memory.write_slice(&state.data, GuestAddress(DATA)).unwrap();
        self.vcpu.set_registers(&registers(state), RegisterMask::all()).unwrap();
        self.vcpu.set_fxsave(&state.fx).unwrap();
    }

    /// Executes `bytes` once, single-stepped.
    pub fn execute(&mut self, bytes: &[u8], state: &State) -> Outcome {
        self.load(bytes, state);
        let step = Entry { single_step: true, ..Entry::default() };
        let mut exit = self.vcpu.run(&NoBus, step).unwrap();
        // A long REP is left and entered again.
        let mut registers = self.vcpu.registers(RegisterMask::all()).unwrap();
        let mut rounds = 0;
        while exit == Exit::SingleStep
            && registers.rip == State::CODE
            && registers.cs.selector == USER_CODE
            && is_repeated(bytes)
            && rounds < 100
        {
            exit = self.vcpu.run(&NoBus, step).unwrap();
            registers = self.vcpu.registers(RegisterMask::all()).unwrap();
            rounds += 1;
        }
        assert_eq!(exit, Exit::SingleStep, "{bytes:02x?}");
        self.outcome(&registers)
    }

    /// Executes `bytes` once, in a block as any other code. The instruction must not branch into its own bytes.
    pub fn execute_in_block(&mut self, bytes: &[u8], state: &State) -> Outcome {
        self.load(bytes, state);
        self.vcpu.set_registers(&Registers { rip: WARM_UP, ..registers(state) }, RegisterMask::GPR).unwrap();
        let exit = self.vcpu.run(&NoBus, Entry::default()).unwrap();
        assert_eq!(exit, Exit::Halt, "{bytes:02x?}");
        let registers = self.vcpu.registers(RegisterMask::all()).unwrap();
        let mut outcome = self.outcome(&registers);
        match outcome.fault {
            // The INT3 behind the instruction, or at the target of a branch inside the page.
            Some(Fault { vector: 3, .. }) => {
                outcome.state.rip -= 1;
                outcome.fault = None;
            }
            // A branch out of the page: complete, the fetch at the target is what faults.
            Some(Fault { vector: 14, address, .. }) if address == outcome.state.rip && address != State::CODE => outcome.fault = None,
            _ => {}
        }
        outcome
    }

    /// What the machine stopped with: in user code, or at the start of a handler.
    fn outcome(&self, registers: &Registers) -> Outcome {
        let mut end = State {
            gpr: registers.gpr,
            rip: registers.rip,
            rflags: registers.rflags,
            fx: self.vcpu.fxsave().unwrap(),
            data: vec![0; State::DATA_SIZE],
        };
        self.memory.read_slice(&mut end.data, GuestAddress(DATA)).unwrap();
        let mut fault = None;
        if registers.cs.selector == KERNEL_CODE {
            let vector = vector(registers);
            let mut frame = registers.gpr[4];
            let get = |at: u64| self.memory.read_obj::<u64>(GuestAddress(at)).unwrap();
            let mut error = 0;
            if WITH_ERROR.contains(&vector) {
                error = get(frame);
                frame += 8;
            }
            end.rip = get(frame);
            end.rflags = get(frame + 16);
            end.gpr[4] = get(frame + 24);
            let address = if vector == 14 { registers.cr2 } else { 0 };
            // The supervisor's pages at the bottom are present here and not in the host's process.
            if vector == 14 && address < SUPERVISOR_END {
                error &= !1;
            }
            fault = Some(Fault { vector: vector as u8, error, address });
        }
        Outcome { state: end, fault }
    }
}

/// The exception in whose handler the machine stopped.
pub fn vector(registers: &Registers) -> u64 {
    (registers.rip - HANDLERS) / 16
}

fn is_repeated(bytes: &[u8]) -> bool {
    bytes.iter().take(4).any(|byte| matches!(byte, 0xf2 | 0xf3))
}

/// The registers of user code at the start of the code page.
pub fn registers(state: &State) -> Registers {
    let data = Segment { selector: 0, limit: 0xffff_ffff, access: 0xc0f3, base: 0 };
    Registers {
        gpr: state.gpr,
        rip: State::CODE,
        rflags: state.rflags,
        // PE, MP, ET, NE, WP, PG as Linux has them.
        cr0: 0x8001_0033,
        // PAE, MCE, PGE, OSFXSR, OSXMMEXCPT.
        cr4: 0x6e0,
        cr3: TABLES,
        efer: 0xd01,
        cs: Segment { selector: USER_CODE, limit: 0xffff_ffff, access: 0xa0fb, base: 0 },
        ss: Segment { selector: USER_DATA, ..data },
        ds: data,
        es: data,
        fs: Segment { base: FS_BASE, ..data },
        gs: Segment { base: GS_BASE, ..data },
        tr: Segment { selector: TSS_SELECTOR, limit: 0x67, access: 0x8b, base: TSS },
        ldtr: Segment { access: 0x1_0000, ..Segment::default() },
        gdtr: DescriptorTable { base: GDT, limit: 0x4f },
        idtr: DescriptorTable { base: IDT, limit: 0x1ff },
        dr6: 0xffff_0ff0,
        dr7: 0x400,
        ..Registers::reset()
    }
}
