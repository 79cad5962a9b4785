//! Ports that take the registers of the instruction, at every privilege level.

use iced_x86::code_asm::*;
use vmm::PortCall;
use vmm::registers::{RAX, RBP, RBX, RCX, RDI, RDX, RSI};

use super::machine::*;

/// A machine at level 3 with IOPL 0 and no I/O bitmap, that executes `code` and then UD2.
fn user_machine(answer: fn(&mut PortCall), code: impl FnOnce(&mut CodeAssembler)) -> Machine {
    let mut m = Machine::new();
    m.bus.answer = Some(answer);
    m.open_to_user();
    m.code(CODE, |a| {
        a.mov(edx, u32::from(REGISTER_PORT)).unwrap();
        code(a);
        a.ud2().unwrap();
    });
    m.set(&Machine::start_user());
    m
}

/// Runs to the UD2 and returns the calls the bus saw.
fn calls(m: &mut Machine) -> Vec<PortCall> {
    let exception = m.run_to_exception();
    assert_eq!(exception.vector, 6, "{exception:x?}");
    m.bus.calls.lock().unwrap().clone()
}

#[test]
fn user_code_without_io_permission_exchanges_registers_by_in() {
    let answer = |call: &mut PortCall| {
        for (index, register) in (1..).zip([RAX, RBX, RCX, RDX, RSI, RDI]) {
            call.gpr[register] = index;
        }
    };
    let mut m = user_machine(answer, |a| {
        a.mov(rax, 0x1111_2222_564d_5868u64).unwrap();
        a.mov(ebx, 0x77).unwrap();
        a.mov(rbp, 0x1234_5678_9abc_def0u64).unwrap();
        a.in_(eax, dx).unwrap();
    });
    let calls = calls(&mut m);
    assert_eq!(calls.len(), 1);
    let call = calls[0];
    assert_eq!((call.port, call.size, call.write, call.string), (REGISTER_PORT, 4, false, false));
    assert_eq!((call.gpr[RAX], call.gpr[RBX], call.gpr[RDX]), (0x1111_2222_564d_5868, 0x77, REGISTER_PORT.into()));
    let gpr = m.registers().gpr;
    assert_eq!([RAX, RBX, RCX, RDX, RSI, RDI].map(|register| gpr[register]), [1, 2, 3, 4, 5, 6]);
    assert_eq!(gpr[RBP], 0x1234_5678_9abc_def0);
}

#[test]
fn in_of_a_byte_takes_al_from_the_answer_and_keeps_the_rest() {
    let mut m = user_machine(
        |call| call.gpr[RAX] = u64::MAX - 1,
        |a| {
            a.mov(rax, 0x1111_2222_3333_4444u64).unwrap();
            a.in_(al, dx).unwrap();
        },
    );
    assert_eq!(calls(&mut m).len(), 1);
    assert_eq!(m.registers().gpr[RAX], 0x1111_2222_3333_44fe);
}

#[test]
fn port_that_is_not_the_callers_is_an_undefined_instruction() {
    let mut m = user_machine(
        |call| {
            call.gpr[RBX] = 7;
            call.undefined = true;
        },
        |a| a.out(dx, eax).unwrap(),
    );
    let exception = m.run_to_exception();
    assert_eq!((exception.vector, exception.rip), (6, CODE + 5), "at the OUT, behind a MOV of five bytes");
    assert_ne!(m.registers().gpr[RBX], 7, "and no register has changed");
}

#[test]
fn out_exchanges_registers_too() {
    let answer = |call: &mut PortCall| {
        call.gpr[RAX] = 0xaa;
        call.gpr[RBX] = 0xbb;
    };
    let mut m = user_machine(answer, |a| {
        a.mov(eax, 0x99).unwrap();
        a.out(dx, eax).unwrap();
    });
    let calls = calls(&mut m);
    assert_eq!(calls.len(), 1);
    assert_eq!((calls[0].write, calls[0].string, calls[0].data), (true, false, 0x99));
    assert_eq!((m.registers().gpr[RAX], m.registers().gpr[RBX]), (0xaa, 0xbb));
}

#[test]
fn rep_outsb_sends_every_byte_and_brings_back_registers() {
    // Tries to move the registers that are the instruction's own.
    let answer = |call: &mut PortCall| {
        call.gpr[RBX] += 1;
        call.gpr[RCX] = 77;
        call.gpr[RSI] = 0;
    };
    // More than the interpreter does in one piece.
    const COUNT: u64 = 3000;
    let mut m = user_machine(answer, |a| {
        a.mov(rsi, DATA).unwrap();
        a.mov(ecx, COUNT as u32).unwrap();
        a.xor(ebx, ebx).unwrap();
        a.rep().outsb().unwrap();
    });
    for index in 0..COUNT {
        m.put(DATA + index, index as u8);
    }
    let calls = calls(&mut m);
    assert!(calls.iter().all(|call| call.write && call.string && call.size == 1));
    let sent: Vec<u32> = calls.iter().map(|call| call.data).collect();
    assert_eq!(sent, (0..COUNT as u32).map(|index| index & 0xff).collect::<Vec<_>>());
    let gpr = m.registers().gpr;
    assert_eq!((gpr[RBX], gpr[RCX], gpr[RSI]), (COUNT, 0, DATA + COUNT));
}

#[test]
fn rep_insb_stores_every_byte_and_brings_back_registers() {
    let answer = |call: &mut PortCall| {
        call.data = call.gpr[RBX] as u32;
        call.gpr[RBX] += 1;
        call.gpr[RDI] = 0;
    };
    let mut m = user_machine(answer, |a| {
        a.mov(rdi, DATA).unwrap();
        a.mov(ecx, 5).unwrap();
        a.mov(ebx, 0x41).unwrap();
        a.rep().insb().unwrap();
    });
    assert!(calls(&mut m).iter().all(|call| !call.write && call.string));
    assert_eq!(m.get::<[u8; 6]>(DATA), *b"ABCDE\0");
    let gpr = m.registers().gpr;
    assert_eq!((gpr[RBX], gpr[RCX], gpr[RDI]), (0x46, 0, DATA + 5));
}

#[test]
fn insb_to_memory_that_cannot_be_written_reaches_no_port() {
    let mut m = user_machine(
        |_| {},
        |a| {
            a.mov(edi, DATA as u32).unwrap();
            a.insb().unwrap();
        },
    );
    m.map(DATA, DATA | PRESENT | USER);
    m.set(&Machine::start_user());
    assert_eq!(m.run_to_exception().vector, 14);
    assert_eq!(m.bus.calls.lock().unwrap().len(), 0);
}

#[test]
fn ports_beside_it_still_need_permission() {
    for code in [
        |a: &mut CodeAssembler| a.in_(eax, dx).unwrap(),
        |a: &mut CodeAssembler| a.out(dx, al).unwrap(),
        |a: &mut CodeAssembler| a.rep().insb().unwrap(),
        |a: &mut CodeAssembler| a.rep().outsb().unwrap(),
    ] {
        let mut m = user_machine(
            |_| {},
            |a| {
                a.inc(edx).unwrap();
                a.mov(ecx, 1).unwrap();
                code(a);
            },
        );
        let exception = m.run_to_exception();
        assert_eq!((exception.vector, exception.error), (13, Some(0)));
        assert_eq!(m.bus.calls.lock().unwrap().len(), 0);
    }
}
