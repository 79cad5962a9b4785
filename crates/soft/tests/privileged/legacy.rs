//! Protected mode as it was before 64 bits: rings and gates, virtual-8086 mode, tasks, descriptor queries.

use iced_x86::code_asm::*;
use vmm::{Entry, Exit, Inject, Registers, Segment};

use super::machine::*;

/// A descriptor that the tests fill.
const SPARE_2: u16 = 0x58;
const GATE_3: u64 = 0xee;
const GATE_0: u64 = 0x8e;

/// 32-bit protected mode at level 0 without paging, every vector with a 32-bit interrupt gate to its HLT.
struct Legacy(Machine);

impl Legacy {
    fn new() -> Legacy {
        let m = Machine::new();
        m.put(TSS + 8, u32::from(KERNEL_DATA));
        let legacy = Legacy(m);
        for vector in 0..256 {
            legacy.gate(vector, GATE_0, KERNEL_CODE_32);
        }
        legacy
    }

    fn gate(&self, vector: u64, kind: u64, selector: u16) {
        let handler = HANDLERS + vector * 16;
        self.0.put(IDT + vector * 8, handler & 0xffff | u64::from(selector) << 16 | kind << 40 | (handler >> 16) << 48);
    }

    fn descriptor(&self, selector: u16, value: u64) {
        self.0.put(GDT + u64::from(selector), value);
    }

    fn code(&self, at: u64, write: impl FnOnce(&mut CodeAssembler)) {
        self.0.code_of(32, at, write);
    }

    fn start() -> Registers {
        let mut registers = Machine::start();
        registers.efer = 0;
        registers.cr0 = 0x33;
        registers.cr4 = 0;
        registers.cs = Segment { selector: KERNEL_CODE_32, limit: 0xffff_ffff, access: 0xc09b, base: 0 };
        registers.idtr.limit = 0x7ff;
        registers
    }

    fn start_user() -> Registers {
        let mut registers = Legacy::start();
        registers.cs = Segment { selector: USER_CODE_32, limit: 0xffff_ffff, access: 0xc0fb, base: 0 };
        let data = Segment { selector: USER_DATA, limit: 0xffff_ffff, access: 0xc0f3, base: 0 };
        (registers.ss, registers.ds, registers.es, registers.fs, registers.gs) = (data, data, data, data, data);
        registers
    }

    /// Runs to a handler's HLT; the vector and the frame as doublewords from ESP.
    fn run(&mut self, registers: &Registers) -> (u64, Vec<u32>, Registers) {
        self.0.set(registers);
        let exit = self.0.run();
        let registers = self.0.registers();
        assert_eq!(exit, Exit::Halt, "\n{registers}");
        assert!((HANDLERS..HANDLERS + 0x1000).contains(&registers.rip), "no handler was reached\n{registers}");
        let frame = (0..10).map(|n| self.0.get(registers.gpr[4] + n * 4)).collect();
        ((registers.rip - 1 - HANDLERS) / 16, frame, registers)
    }
}

#[test]
fn interrupt_from_level_three_takes_the_stack_of_the_tss() {
    let mut m = Legacy::new();
    m.gate(0x40, GATE_3, KERNEL_CODE_32);
    m.code(CODE, |a| a.int(0x40).unwrap());
    let (vector, frame, registers) = m.run(&Legacy::start_user());
    assert_eq!(vector, 0x40);
    assert_eq!(frame[..5], [CODE as u32 + 2, USER_CODE_32.into(), 2, STACK as u32, USER_DATA.into()]);
    assert_eq!((registers.gpr[4], registers.ss.selector), (KERNEL_STACK - 20, KERNEL_DATA));
}

#[test]
fn missing_stack_segment_in_the_tss_is_an_invalid_tss() {
    let mut m = Legacy::new();
    m.gate(0x40, GATE_3, KERNEL_CODE_32);
    m.0.put(TSS + 8, 0u32);
    // The fault itself needs a stack: a task would be used; here it comes down to a shutdown.
    m.code(CODE, |a| a.int(0x40).unwrap());
    m.0.set(&Legacy::start_user());
    assert_eq!(m.0.run(), Exit::Shutdown);
}

#[test]
fn iretd_goes_to_level_three_and_drops_inner_segments() {
    let mut m = Legacy::new();
    m.gate(0x40, GATE_3, KERNEL_CODE_32);
    m.code(CODE, |a| {
        a.mov(eax, u32::from(USER_DATA)).unwrap();
        a.mov(es, eax).unwrap();
        for word in [USER_DATA.into(), 0x4_0000u32, 2, USER_CODE_32.into(), 0x9000] {
            a.push(word as i32).unwrap();
        }
        a.iretd().unwrap();
    });
    m.code(0x9000, |a| {
        a.mov(ebx, ds).unwrap();
        a.mov(ecx, es).unwrap();
        a.int(0x40).unwrap();
    });
    let (vector, frame, registers) = m.run(&Legacy::start());
    assert_eq!(vector, 0x40);
    assert_eq!((registers.gpr[3], registers.gpr[1]), (0, USER_DATA.into()), "DS is of level 0, ES is not");
    assert_eq!(frame[3], 0x4_0000);
}

#[test]
fn user_code_cannot_change_the_interrupt_flag_by_iret_or_cli() {
    let mut m = Legacy::new();
    m.gate(0x40, GATE_3, KERNEL_CODE_32);
    m.code(CODE, |a| {
        for word in [0x3202, u32::from(USER_CODE_32), 0x9000] {
            a.push(word as i32).unwrap();
        }
        a.iretd().unwrap();
    });
    m.code(0x9000, |a| a.int(0x40).unwrap());
    let (_, frame, _) = m.run(&Legacy::start_user());
    assert_eq!(frame[2] & 0x3200, 0);
    m.code(CODE, |a| a.cli().unwrap());
    let (vector, frame, _) = m.run(&Legacy::start_user());
    assert_eq!((vector, frame[0], frame[1]), (13, 0, CODE as u32));
}

#[test]
fn call_gate_copies_parameters_and_far_return_releases_them() {
    let mut m = Legacy::new();
    m.gate(0x40, GATE_3, KERNEL_CODE_32);
    // Present, DPL 3, 32-bit call gate, two parameters, to 40:9000.
    m.descriptor(SPARE, 0x9000 | u64::from(KERNEL_CODE_32) << 16 | 2 << 32 | 0xec << 40);
    m.code(0x9000, |a| {
        a.mov(eax, dword_ptr(esp + 8)).unwrap();
        a.mov(ebx, dword_ptr(esp + 12)).unwrap();
        a.mov(esi, dword_ptr(esp + 16)).unwrap();
        a.mov(edi, cs).unwrap();
        a.retf_1(8).unwrap();
    });
    m.code(CODE, |a| {
        a.push(11i32).unwrap();
        a.push(22i32).unwrap();
        a.db(&[0x9a, 0, 0, 0, 0, SPARE as u8 | 3, 0]).unwrap();
        a.int(0x40).unwrap();
    });
    let (vector, frame, registers) = m.run(&Legacy::start_user());
    assert_eq!(vector, 0x40, "\n{registers}");
    assert_eq!((registers.gpr[0], registers.gpr[3]), (22, 11));
    assert_eq!(registers.gpr[6], STACK - 8, "outer ESP was pushed");
    assert_eq!(registers.gpr[7] as u16, KERNEL_CODE_32);
    assert_eq!((frame[1], frame[3]), (USER_CODE_32.into(), STACK as u32));
}

#[test]
fn gate_of_higher_privilege_is_refused_with_its_selector() {
    let mut m = Legacy::new();
    m.descriptor(SPARE, 0x9000 | u64::from(KERNEL_CODE_32) << 16 | 0x8c << 40);
    m.code(CODE, |a| a.db(&[0x9a, 0, 0, 0, 0, SPARE as u8, 0]).unwrap());
    let (vector, frame, _) = m.run(&Legacy::start_user());
    assert_eq!((vector, frame[0]), (13, SPARE.into()));
}

#[test]
fn long_mode_call_gate_changes_stack_and_pushes_eight_bytes() {
    let mut m = Machine::new();
    m.open_to_user();
    m.put(GDT + u64::from(SPARE), CODE + 0x800 & 0xffff | u64::from(KERNEL_CODE) << 16 | 0xec << 40 | (CODE >> 16) << 48);
    m.put(GDT + u64::from(SPARE_2), 0u64);
    m.code(CODE + 0x800, |a| a.hlt().unwrap());
    m.put(DATA, 0u32);
    m.put(DATA + 4, SPARE | 3);
    m.code(CODE, |a| a.db(&[0xff, 0x1c, 0x25, 0, 0, 3, 0]).unwrap());
    m.set(&Machine::start_user());
    let registers = m.run_to_halt();
    let frame: Vec<u64> = (0..4).map(|n| m.get(registers.gpr[4] + 8 * n)).collect();
    assert_eq!(frame, [CODE + 7, USER_CODE.into(), STACK, USER_DATA.into()]);
    assert_eq!((registers.gpr[4], registers.ss.selector, registers.cs.selector), (KERNEL_STACK - 32, 0, KERNEL_CODE));
}

#[test]
fn interrupt_through_a_sixteen_bit_gate_pushes_words() {
    let mut m = Legacy::new();
    m.gate(0x40, 0x86, KERNEL_CODE_32);
    m.code(CODE, |a| a.int(0x40).unwrap());
    let (_, _, registers) = m.run(&Legacy::start());
    assert_eq!(registers.gpr[4], STACK - 6);
    assert_eq!(m.0.get::<u16>(STACK - 4), KERNEL_CODE_32);
}

#[test]
fn virtual_8086_code_runs_and_its_interrupt_leaves_all_segments_on_the_stack() {
    let mut m = Legacy::new();
    // GS FS DS ES SS ESP EFLAGS CS EIP, from the last to the first.
    let frame = [0x1006, 0x1005, 0x1004, 0x1003, 0x1002, 0x80, 0x2_0002, 0x2100, 0x10];
    m.code(CODE, |a| {
        for word in frame {
            a.push(word).unwrap();
        }
        a.iretd().unwrap();
    });
    m.0.code_of(16, 0x2_1010, |a| {
        a.mov(ax, ds).unwrap();
        a.mov(bx, word_ptr(0x10)).unwrap();
        a.int(0x21).unwrap();
    });
    m.0.put(0x1_0040 + 0x10, 0xabcdu16);
    let (vector, frame, registers) = m.run(&Legacy::start());
    assert_eq!((vector, frame[0]), (13, 0), "INT n needs IOPL 3");
    assert_eq!((registers.gpr[0] as u16, registers.gpr[3] as u16), (0x1004, 0xabcd));
    assert_eq!(frame[1..], [0x16, 0x2100, 0x3_0002, 0x80, 0x1002, 0x1003, 0x1004, 0x1005, 0x1006]);
    assert_eq!((registers.ds.selector, registers.gs.selector, registers.rflags & 1 << 17), (0, 0, 0));
}

#[test]
fn task_gate_runs_the_handler_as_a_task_with_the_error_code() {
    let mut m = Legacy::new();
    let new_tss = DATA + 0x200;
    m.descriptor(SPARE, 0x67 | new_tss << 16 | 0x89 << 40);
    m.0.put(IDT + 13 * 8, u64::from(SPARE) << 16 | 0x85 << 40);
    for (offset, value) in [(0x20, HANDLERS as u32 + 13 * 16), (0x24, 2), (0x38, 0x5000), (0x4c, KERNEL_CODE_32.into())] {
        m.0.put(new_tss + offset, value);
    }
    for offset in [0x48, 0x50, 0x54, 0x58, 0x5c] {
        m.0.put(new_tss + offset, u32::from(KERNEL_DATA));
    }
    m.code(CODE, |a| {
        a.mov(ecx, 7).unwrap();
        a.mov(eax, 0x2000).unwrap();
        a.mov(es, eax).unwrap();
    });
    let (vector, frame, registers) = m.run(&Legacy::start());
    assert_eq!((vector, frame[0], registers.gpr[4]), (13, 0x2000, 0x4ffc));
    assert_eq!(registers.tr.selector, SPARE);
    assert_eq!(registers.rflags & 1 << 14, 1 << 14, "NT");
    assert_eq!(m.0.get::<u16>(new_tss), TSS_SELECTOR, "back link");
    assert_eq!(m.0.get::<u32>(TSS + 0x20), CODE as u32 + 10, "the fault's address");
    assert_eq!(m.0.get::<u32>(TSS + 0x2c), 7);
    assert_eq!(m.0.get::<u8>(GDT + u64::from(SPARE) + 5), 0x8b, "busy");
    assert_eq!(registers.cr0 & 8, 8, "TS");
}

#[test]
fn task_with_a_bad_segment_faults_in_the_new_task() {
    let mut m = Legacy::new();
    let new_tss = DATA + 0x200;
    m.descriptor(SPARE, 0x67 | new_tss << 16 | 0x89 << 40);
    for (offset, value) in [(0x20, 0x9000u32), (0x24, 2), (0x38, 0x5000), (0x4c, KERNEL_CODE_32.into()), (0x50, KERNEL_DATA.into())] {
        m.0.put(new_tss + offset, value);
    }
    // DS names a gate.
    m.descriptor(SPARE_2, 0x9000 | 0x8c << 40);
    m.0.put(new_tss + 0x54, u32::from(SPARE_2));
    m.code(CODE, |a| a.db(&[0xea, 0, 0, 0, 0, SPARE as u8, 0]).unwrap());
    let (vector, frame, registers) = m.run(&Legacy::start());
    assert_eq!((vector, frame[0], frame[1]), (10, SPARE_2.into(), 0x9000));
    assert_eq!((registers.tr.selector, registers.gpr[4]), (SPARE, 0x5000 - 16));
    assert_eq!(m.0.get::<u8>(GDT + u64::from(TSS_SELECTOR) + 5), 0x89, "the old task is not busy any more");
}

#[test]
fn descriptor_queries_answer_by_zero_flag() {
    let mut m = Machine::new();
    m.code(CODE, |a| {
        a.mov(ecx, u32::from(KERNEL_CODE)).unwrap();
        a.lar(eax, ecx).unwrap();
        a.setz(r8b).unwrap();
        a.lsl(ebx, ecx).unwrap();
        a.setz(r9b).unwrap();
        a.verw(cx).unwrap();
        a.setz(r10b).unwrap();
        a.verr(cx).unwrap();
        a.setz(r11b).unwrap();
        a.mov(ecx, 0x3000).unwrap();
        a.mov(edx, 0x55).unwrap();
        a.lar(edx, ecx).unwrap();
        a.setz(r12b).unwrap();
        a.hlt().unwrap();
    });
    let registers = m.run_to_halt();
    assert_eq!((registers.gpr[0], registers.gpr[3], registers.gpr[2]), (0xaf_9b00, 0xffff_ffff, 0x55));
    assert_eq!(registers.gpr[8..13], [1, 1, 0, 1, 0]);
}

#[test]
fn ltr_marks_its_task_busy_and_refuses_a_busy_one() {
    let mut m = Machine::new();
    m.put(GDT + u64::from(SPARE), 0x0000_8900_3000_0067u64);
    m.put(GDT + u64::from(SPARE_2), 0xffff_8000u64);
    m.code(CODE, |a| {
        a.mov(eax, u32::from(SPARE)).unwrap();
        a.ltr(ax).unwrap();
        a.str(ebx).unwrap();
        a.ltr(ax).unwrap();
    });
    let exception = m.run_to_exception();
    assert_eq!((exception.vector, exception.error, exception.rip), (13, Some(SPARE.into()), CODE + 5 + 4 + 3));
    let registers = m.registers();
    assert_eq!((registers.gpr[3], registers.tr.base), (SPARE.into(), 0xffff_8000_0000_3000));
    assert_eq!(m.get::<u8>(GDT + u64::from(SPARE) + 5), 0x8b);
}

#[test]
fn far_jumps_go_from_64_bit_to_compatibility_code_and_back() {
    let mut m = Machine::new();
    m.put(DATA, 0x2_0800u32);
    m.put(DATA + 4, KERNEL_CODE_32);
    m.code(CODE, |a| a.db(&[0xff, 0x2c, 0x25, 0, 0, 3, 0]).unwrap());
    m.code_of(32, CODE + 0x800, |a| {
        a.inc(ecx).unwrap();
        a.db(&[0xea, 0, 0x09, 2, 0, KERNEL_CODE as u8, 0]).unwrap();
    });
    m.code(CODE + 0x900, |a| {
        a.mov(rax, rcx).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(m.run_to_halt().gpr[0], 1);
}

#[test]
fn interrupt_in_compatibility_code_enters_the_64_bit_handler_and_iretq_returns() {
    let mut m = Machine::new();
    m.open_to_user();
    m.gate(0x40, 0xee, 0);
    m.code_of(32, CODE, |a| {
        a.int(0x40).unwrap();
    });
    let mut registers = Machine::start_user();
    registers.cs = Segment { selector: USER_CODE_32, limit: 0xffff_ffff, access: 0xc0fb, base: 0 };
    m.set(&registers);
    let exception = m.run_to_exception();
    assert_eq!((exception.vector, exception.rip, exception.cs, exception.rsp), (0x40, CODE + 2, USER_CODE_32, STACK));
    assert_eq!(m.registers().ss.selector, 0, "SS is null after a change of privilege");
}

#[test]
fn sysenter_and_sysexit_change_privilege_by_their_msrs() {
    let mut m = Machine::new();
    m.open_to_user();
    m.vcpu.set_msr(0x174, 8).unwrap();
    m.vcpu.set_msr(0x175, KERNEL_STACK).unwrap();
    m.vcpu.set_msr(0x176, CODE + 0x800).unwrap();
    m.gate(0x40, 0xee, 0);
    m.code(CODE, |a| a.sysenter().unwrap());
    m.code(CODE + 0x800, |a| {
        a.mov(rdi, rsp).unwrap();
        a.mov(esi, cs).unwrap();
        a.mov(edx, (CODE + 0x900) as u32).unwrap();
        a.mov(ecx, STACK as u32).unwrap();
        a.db(&[0x48, 0x0f, 0x35]).unwrap();
    });
    m.code(CODE + 0x900, |a| a.int(0x40).unwrap());
    m.set(&Machine::start_user());
    let exception = m.run_to_exception();
    assert_eq!((exception.vector, exception.cs, exception.rsp), (0x40, 8 + 32 | 3, STACK));
    let registers = m.registers();
    assert_eq!((registers.gpr[7], registers.gpr[6]), (KERNEL_STACK, 8));
}

#[test]
fn non_maskable_interrupts_wait_for_iret() {
    let mut m = Machine::with(1, true, false);
    m.code(HANDLERS + 32, |a| {
        a.out(0x99, al).unwrap();
        a.out(0x9a, al).unwrap();
        a.iretq().unwrap();
    });
    m.code(CODE, |a| {
        a.nop().unwrap();
        a.out(0x9b, al).unwrap();
    });
    let port = |exit| match exit {
        Exit::PortOut { port, .. } => port,
        other => panic!("{other:?}"),
    };
    let first = m.vcpu.run(&m.bus, Entry { inject: Some(Inject::Nmi), ..Entry::default() }).unwrap();
    assert_eq!(port(first), 0x99);
    m.vm.signal_msi(0xfee0_0000, 4 << 8);
    let ports: Vec<u16> = (0..4).map(|_| port(m.run())).collect();
    assert_eq!(ports, [0x9a, 0x99, 0x9a, 0x9b]);
}

#[test]
fn undefined_control_registers_and_too_high_a_task_priority_fault() {
    for (bytes, vector) in [(&[0x0f, 0x20, 0xc8][..], 6), (&[0x0f, 0x22, 0xe8], 6), (&[0x44, 0x0f, 0x22, 0xc0], 13), (&[0x8e, 0xc8], 6)] {
        let mut m = Machine::new();
        m.code(CODE, |a| a.db(bytes).unwrap());
        let mut registers = Machine::start();
        registers.gpr[0] = 16;
        m.set(&registers);
        assert_eq!(m.run_to_exception().vector, vector, "{bytes:x?}");
    }
}

#[test]
fn mov_to_ss_holds_the_trap_flag_off_and_int_is_not_stepped_into() {
    let mut m = Machine::new();
    m.code(CODE, |a| {
        a.mov(ss, eax).unwrap();
        a.nop().unwrap();
        a.nop().unwrap();
        a.hlt().unwrap();
    });
    let mut registers = Machine::start();
    registers.gpr[0] = KERNEL_DATA.into();
    registers.rflags |= 0x100;
    m.set(&registers);
    let exception = m.run_to_exception();
    assert_eq!((exception.vector, exception.rip), (1, CODE + 3));
    m.code(CODE, |a| a.int(0x40).unwrap());
    m.set(&registers);
    assert_eq!(m.run_to_exception().vector, 0x40);
}

#[test]
fn repeated_out_that_is_declined_exits_after_each_element() {
    let mut m = Machine::new();
    m.put(DATA, 0x2211u16);
    m.code(CODE, |a| {
        a.rep().outsb().unwrap();
        a.hlt().unwrap();
    });
    let mut registers = Machine::start();
    (registers.gpr[1], registers.gpr[2], registers.gpr[6]) = (2, 0x99, DATA);
    m.set(&registers);
    for value in [0x11, 0x22] {
        assert_eq!(m.run(), Exit::PortOut { port: 0x99, size: 1, value, string: true });
    }
    assert_eq!(m.run_to_halt().gpr[1], 0);
}

#[test]
fn answered_in_completes_before_an_injected_interrupt() {
    let mut m = Machine::new();
    m.code(HANDLERS + 0x50 * 16, |a| {
        a.in_(al, 0x98).unwrap();
        a.iretq().unwrap();
    });
    m.code(CODE, |a| {
        a.in_(al, 0x99).unwrap();
        a.mov(ebx, eax).unwrap();
        a.hlt().unwrap();
    });
    let mut registers = Machine::start();
    registers.rflags |= 0x200;
    m.set(&registers);
    let port_in = |port| Exit::PortIn { port, size: 1, string: false };
    assert_eq!(m.run(), port_in(0x99));
    let entry = Entry { port_in: Some(0x11), inject: Some(Inject::Interrupt(0x50)), ..Entry::default() };
    assert_eq!(m.vcpu.run(&m.bus, entry).unwrap(), port_in(0x98));
    let registers = m.registers();
    assert_eq!((registers.gpr[0], m.get::<u64>(registers.gpr[4])), (0x11, CODE + 2));
    assert_eq!(m.vcpu.run(&m.bus, Entry { port_in: Some(0x22), ..Entry::default() }).unwrap(), Exit::Halt);
    assert_eq!(m.registers().gpr[3], 0x22);
}

#[test]
fn repeated_in_that_is_declined_takes_an_answer_for_each_element() {
    let mut m = Machine::new();
    m.code(CODE, |a| {
        a.rep().insb().unwrap();
        a.hlt().unwrap();
    });
    let mut registers = Machine::start();
    (registers.gpr[1], registers.gpr[2], registers.gpr[7]) = (2, 0x99, DATA);
    m.set(&registers);
    assert_eq!(m.run(), Exit::PortIn { port: 0x99, size: 1, string: true });
    let answer = |value| Entry { port_in: Some(value), ..Entry::default() };
    assert_eq!(m.vcpu.run(&m.bus, answer(0x11)).unwrap(), Exit::PortIn { port: 0x99, size: 1, string: true });
    assert_eq!(m.vcpu.run(&m.bus, answer(0x22)).unwrap(), Exit::Halt);
    assert_eq!((m.get::<u16>(DATA), m.registers().gpr[1]), (0x2211, 0));
}

#[test]
fn real_mode_far_call_returns_and_an_interrupt_without_vector_shuts_down() {
    let mut m = Machine::new();
    m.code_of(16, 0x9010, |a| {
        a.mov(bx, cs).unwrap();
        a.retf().unwrap();
    });
    m.code_of(16, 0x7c00, |a| {
        a.db(&[0x9a, 0x10, 0, 0, 0x09]).unwrap();
        a.mov(cx, sp).unwrap();
        a.hlt().unwrap();
    });
    let mut registers = Registers::reset();
    registers.cs = Segment { selector: 0, limit: 0xffff, access: 0x9b, base: 0 };
    (registers.rip, registers.gpr[4]) = (0x7c00, 0x7000);
    m.set(&registers);
    assert_eq!(m.run(), Exit::Halt);
    let after = m.registers();
    assert_eq!((after.gpr[3], after.gpr[1]), (0x900, 0x7000));
    m.code_of(16, 0x7c00, |a| a.int(0x21).unwrap());
    registers.idtr.limit = 7;
    m.set(&registers);
    assert_eq!(m.run(), Exit::Shutdown);
}

#[test]
fn page_fault_while_a_page_fault_is_delivered_is_a_double_fault() {
    let mut m = Machine::new();
    m.gate(8, 0x8e, 1);
    m.map(DATA, 0);
    m.code(CODE, |a| {
        a.mov(rsp, DATA + 0x1000).unwrap();
        a.mov(rax, qword_ptr(rsp - 8)).unwrap();
    });
    let exception = m.run_to_exception();
    assert_eq!((exception.vector, exception.error, exception.rip), (8, Some(0), CODE + 10));
    assert_eq!(m.registers().cr2, DATA + 0xff8);
}
