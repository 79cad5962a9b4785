//! Single step and breakpoints.

use iced_x86::code_asm::*;
use vmm::{Entry, Exit};

use super::machine::*;

/// DR6 bits.
const BS: u64 = 1 << 14;

#[test]
fn trap_flag_traps_after_the_next_instruction() {
    let mut m = Machine::new();
    m.code(CODE, |a| {
        a.pushfq().unwrap();
        a.or(dword_ptr(rsp), 0x100).unwrap();
        a.popfq().unwrap();
        a.nop().unwrap();
        a.nop().unwrap();
        a.hlt().unwrap();
    });
    let exception = m.run_to_exception();
    assert_eq!((exception.vector, exception.rip), (1, CODE + 1 + 7 + 1 + 1));
    assert_eq!(m.registers().dr6 & BS, BS);
    assert_eq!(exception.rflags & 0x100, 0x100);
    assert_eq!(m.registers().rflags & 0x100, 0, "the handler must not be stepped");
}

#[test]
fn code_breakpoint_stops_before_and_resume_flag_passes_it() {
    let mut m = Machine::new();
    m.code(CODE, |a| {
        a.nop().unwrap();
        a.inc(rcx).unwrap();
        a.hlt().unwrap();
    });
    let mut registers = Machine::start();
    registers.dr[1] = CODE + 1;
    registers.dr7 = 0x400 | 1 << 3;
    m.set(&registers);
    let exception = m.run_to_exception();
    assert_eq!((exception.vector, exception.rip), (1, CODE + 1));
    assert_eq!(m.registers().dr6 & 0xf, 2);
    assert_eq!(exception.rflags & 1 << 16, 0, "of all faults only this one leaves RF to its handler (SDM vol. 3 section 18.3.1.1)");
    registers.rip = CODE + 1;
    registers.rflags |= 1 << 16;
    m.set(&registers);
    assert_eq!(m.run_to_halt().gpr[1], 1);
}

#[test]
fn data_breakpoint_traps_after_a_write_but_not_a_read() {
    let mut m = Machine::new();
    m.code(CODE, |a| {
        a.mov(rax, qword_ptr(DATA + 8)).unwrap();
        a.mov(dword_ptr(DATA + 12), 5).unwrap();
        a.nop().unwrap();
        a.hlt().unwrap();
    });
    let mut registers = Machine::start();
    registers.dr[0] = DATA + 8;
    // Write, 8 bytes, globally enabled.
    registers.dr7 = 0x400 | 2 | 0b1001 << 16;
    m.set(&registers);
    let exception = m.run_to_exception();
    assert_eq!((exception.vector, exception.rip), (1, CODE + 10 + 11), "after MOV from a 64-bit offset and MOV of an immediate");
    assert_eq!(m.registers().dr6 & 0xf, 1);
    assert_eq!(m.get::<u32>(DATA + 12), 5);
}

#[test]
fn general_detect_guards_the_debug_registers() {
    let mut m = Machine::new();
    m.code(CODE, |a| a.mov(rax, dr0).unwrap());
    let mut registers = Machine::start();
    registers.dr7 = 0x400 | 1 << 13;
    m.set(&registers);
    let exception = m.run_to_exception();
    assert_eq!((exception.vector, exception.rip), (1, CODE));
    assert_eq!(m.registers().dr6 & 1 << 13, 1 << 13);
}

#[test]
fn host_single_step_is_one_instruction_and_unseen() {
    let mut m = Machine::new();
    m.code(CODE, |a| {
        a.pushfq().unwrap();
        a.pop(rax).unwrap();
        a.hlt().unwrap();
    });
    for rip in [CODE + 1, CODE + 2] {
        assert_eq!(m.vcpu.run(&m.bus, Entry { single_step: true, ..Entry::default() }).unwrap(), Exit::SingleStep);
        assert_eq!(m.registers().rip, rip);
    }
    assert_eq!(m.registers().gpr[0] & 0x100, 0);
}
