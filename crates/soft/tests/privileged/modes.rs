//! Changes of mode and privilege: real, protected, compatibility, long; system calls, gates and tasks.

use iced_x86::code_asm::*;
use vmm::{Exit, Registers, Segment};

use super::machine::*;

/// 32-bit protected mode at level 0 without paging.
fn start_protected() -> Registers {
    let mut registers = Machine::start();
    registers.efer = 0;
    registers.cr0 = 0x33;
    registers.cr4 = 0;
    registers.cs = Segment { selector: KERNEL_CODE_32, limit: 0xffff_ffff, access: 0xc09b, base: 0 };
    registers
}

/// Real mode at 0:7C00.
fn start_real() -> Registers {
    let mut registers = Registers::reset();
    registers.cs = Segment { selector: 0, limit: 0xffff, access: 0x9b, base: 0 };
    registers.rip = 0x7c00;
    registers.gpr[4] = 0x7000;
    registers.idtr.limit = 0x3ff;
    registers
}

#[test]
fn system_call_goes_in_and_sysret_comes_back() {
    let mut m = Machine::new();
    m.open_to_user();
    let kernel = 0x9000;
    m.code(kernel, |a| {
        a.mov(rdx, rsp).unwrap();
        a.add(rbx, 1).unwrap();
        a.sysretq().unwrap();
    });
    m.code(CODE, |a| {
        a.syscall().unwrap();
        a.mov(ax, cs).unwrap();
        a.ud2().unwrap();
    });
    let mut registers = Machine::start_user();
    // SYSRET loads CS from STAR[63:48] + 16 and SS from + 8; SYSCALL from STAR[47:32].
    registers.star = u64::from(USER_CODE_32) << 48 | u64::from(KERNEL_CODE) << 32;
    registers.lstar = kernel;
    registers.sfmask = 0x200;
    registers.rflags = 0x202;
    m.set(&registers);
    let exception = m.run_to_exception();
    assert_eq!((exception.vector, exception.rip, exception.cs), (6, CODE + 2 + 3, USER_CODE));
    let registers = m.registers();
    assert_eq!((registers.gpr[3], registers.gpr[1], registers.gpr[0] & 0xffff), (1, CODE + 2, u64::from(USER_CODE)));
    assert_eq!(registers.gpr[11] & 0x200, 0x200, "R11 holds the caller's flags");
}

#[test]
fn iretq_goes_to_user_code_and_to_compatibility_mode() {
    for (selector, size) in [(USER_CODE, 8), (USER_CODE_32, 4)] {
        let mut m = Machine::new();
        m.open_to_user();
        m.code(CODE, |a| {
            a.push(i32::from(USER_DATA)).unwrap();
            a.push(STACK as i32).unwrap();
            a.push(0x202).unwrap();
            a.push(i32::from(selector)).unwrap();
            a.push(DATA as i32).unwrap();
            a.iretq().unwrap();
        });
        // 48 FF C0 is INC RAX in 64-bit code, and DEC EAX; INC EAX in 32-bit code.
        m.put(DATA, 0x0b0f_c0ff_48u64);
        let mut registers = Machine::start();
        registers.gpr[0] = 0xffff_ffff;
        m.set(&registers);
        let exception = m.run_to_exception();
        assert_eq!((exception.vector, exception.cs), (6, selector));
        assert_eq!(m.registers().gpr[0], if size == 8 { 0x1_0000_0000 } else { 0xffff_ffff });
    }
}

#[test]
fn real_mode_goes_to_long_mode_step_by_step() {
    let mut m = Machine::new();
    m.put(0x5f0, 0x7fu16);
    m.put(0x5f2, GDT as u32);
    m.code_of(16, 0x7c00, |a| {
        a.lgdt(fword_ptr(0x5f0)).unwrap();
        a.mov(eax, cr0).unwrap();
        a.or(eax, 1).unwrap();
        a.mov(cr0, eax).unwrap();
        a.db(&[0x66, 0xea, 0x00, 0x7d, 0x00, 0x00, KERNEL_CODE_32 as u8, 0]).unwrap();
    });
    m.code_of(32, 0x7d00, |a| {
        a.mov(eax, u32::from(KERNEL_DATA)).unwrap();
        a.mov(ds, eax).unwrap();
        a.mov(ss, eax).unwrap();
        a.mov(eax, 0x6a0).unwrap();
        a.mov(cr4, eax).unwrap();
        a.mov(eax, TABLES as u32).unwrap();
        a.mov(cr3, eax).unwrap();
        a.mov(ecx, 0xc000_0080u32).unwrap();
        a.rdmsr().unwrap();
        a.or(eax, 0x900).unwrap();
        a.wrmsr().unwrap();
        a.mov(eax, cr0).unwrap();
        a.or(eax, 0x8000_0000u32).unwrap();
        a.mov(cr0, eax).unwrap();
        a.db(&[0xea, 0x00, 0x7e, 0x00, 0x00, KERNEL_CODE as u8, 0]).unwrap();
    });
    m.code(0x7e00, |a| {
        a.mov(rax, 0x1234_5678_9abc_def0u64).unwrap();
        a.hlt().unwrap();
    });
    m.set(&start_real());
    assert_eq!(m.run(), Exit::Halt);
    let registers = m.registers();
    assert_eq!(registers.gpr[0], 0x1234_5678_9abc_def0, "\n{registers}");
    assert_eq!(registers.efer & 0x500, 0x500);
}

#[test]
fn real_mode_interrupt_pushes_flags_cs_ip_and_iret_returns() {
    let mut m = Machine::new();
    m.put(0x21 * 4, 0x0000_6000u32);
    m.code_of(16, 0x6000, |a| {
        a.mov(bp, sp).unwrap();
        a.mov(cx, word_ptr(bp + 0)).unwrap();
        a.iret().unwrap();
    });
    m.code_of(16, 0x7c00, |a| {
        a.int(0x21).unwrap();
        a.mov(ax, 7).unwrap();
        a.hlt().unwrap();
    });
    m.set(&start_real());
    assert_eq!(m.run(), Exit::Halt);
    let registers = m.registers();
    assert_eq!((registers.gpr[0] as u16, registers.gpr[1] as u16, registers.gpr[4] as u16), (7, 0x7c02, 0x7000));
}

#[test]
fn real_mode_segments_shift_by_four_and_wrap_addresses_at_their_limit() {
    let mut m = Machine::new();
    m.put(0x1_2345 + 0x10, 0xbeefu16);
    m.code_of(16, 0x7c00, |a| {
        a.mov(ax, 0x1234).unwrap();
        a.mov(es, ax).unwrap();
        a.mov(dx, word_ptr(0x15).es()).unwrap();
        a.hlt().unwrap();
    });
    m.set(&start_real());
    assert_eq!(m.run(), Exit::Halt);
    assert_eq!(m.registers().gpr[2] as u16, 0xbeef);
}

#[test]
fn segment_limit_violation_in_protected_mode_is_refused() {
    let mut m = Machine::new();
    // A data segment of 16 bytes.
    m.put(GDT + u64::from(SPARE), 0x0040_9300_0000_000fu64);
    m.put(IDT + 13 * 8, (HANDLERS & 0xffff) | 0x40 << 16 | 0x8e00 << 32);
    m.code_of(32, CODE, |a| {
        a.mov(eax, u32::from(SPARE)).unwrap();
        a.mov(es, eax).unwrap();
        a.mov(ebx, dword_ptr(12).es()).unwrap();
        a.mov(ebx, dword_ptr(13).es()).unwrap();
        a.hlt().unwrap();
    });
    let mut registers = start_protected();
    registers.idtr.limit = 0x7ff;
    m.set(&registers);
    assert_eq!(m.run(), Exit::Halt);
    let registers = m.registers();
    assert_eq!(registers.rip, HANDLERS + 1);
    assert_eq!(m.get::<u32>(registers.gpr[4]), 0);
    assert_eq!(m.get::<u32>(registers.gpr[4] + 4), (CODE + 5 + 2 + 7) as u32);
}

#[test]
fn null_and_absent_selectors_are_refused_with_their_selector() {
    let mut m = Machine::new();
    m.put(GDT + u64::from(SPARE), 0x00cf_1300_0000_ffffu64);
    m.code(CODE, |a| {
        a.mov(eax, u32::from(SPARE)).unwrap();
        a.mov(ds, eax).unwrap();
    });
    let exception = m.run_to_exception();
    assert_eq!((exception.vector, exception.error), (11, Some(u64::from(SPARE))));
    let mut m = Machine::new();
    m.code(CODE, |a| {
        a.mov(eax, 0x2000).unwrap();
        a.mov(ds, eax).unwrap();
    });
    let exception = m.run_to_exception();
    assert_eq!((exception.vector, exception.error), (13, Some(0x2000)));
}

#[test]
fn hardware_task_switch_saves_and_loads_the_whole_task() {
    let mut m = Machine::new();
    let (old_tss, new_tss) = (DATA, DATA + 0x200);
    let descriptor = |base: u64| 0x67 | (base & 0xff_ffff) << 16 | 0x89 << 40;
    m.put(GDT + u64::from(SPARE), descriptor(new_tss));
    m.put(GDT + 0x58, descriptor(old_tss) | 2 << 40);
    for (offset, value) in [
        (0x20, 0x9000u32),
        (0x24, 2),
        (0x28, 11),
        (0x38, 0x5000),
        (0x48, 0x10),
        (0x4c, 0x40),
        (0x50, 0x10),
        (0x54, 0x10),
        (0x58, 0x10),
        (0x5c, 0x10),
    ] {
        m.put(new_tss + offset, value);
    }
    m.code_of(32, 0x9000, |a| {
        a.mov(ecx, 22).unwrap();
        a.iretd().unwrap();
    });
    m.code_of(32, CODE, |a| {
        a.mov(ebx, 33).unwrap();
        a.db(&[0x9a, 0, 0, 0, 0, SPARE as u8, 0]).unwrap();
        a.mov(edx, 44).unwrap();
        a.hlt().unwrap();
    });
    let mut registers = start_protected();
    registers.tr = Segment { selector: 0x58, limit: 0x67, access: 0x8b, base: old_tss };
    m.set(&registers);
    assert_eq!(m.run(), Exit::Halt);
    let registers = m.registers();
    assert_eq!((registers.gpr[3], registers.gpr[2], registers.tr.selector), (33, 44, 0x58), "\n{registers}");
    assert_eq!(m.get::<u32>(new_tss + 0x2c), 22, "ECX of the task that ended");
    assert_eq!(m.get::<u16>(new_tss), 0x58, "back link");
}
