//! Self-modifying and cross-modifying code, and the counters.

use iced_x86::code_asm::*;
use vm_memory::{Bytes, GuestAddress};
use vmm::Exit;

use super::machine::*;

#[test]
fn store_into_the_running_block_changes_what_follows() {
    let mut m = Machine::new();
    m.code(CODE, |a| {
        let mut target = a.create_label();
        a.lea(rbx, ptr(target)).unwrap();
        // mov eax, 1 becomes mov eax, 7.
        a.mov(byte_ptr(rbx + 1), 7).unwrap();
        a.set_label(&mut target).unwrap();
        a.mov(eax, 1).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(m.run_to_halt().gpr[0], 7);
}

#[test]
fn store_into_a_block_that_ran_before_changes_it() {
    let mut m = Machine::new();
    m.code(DATA, |a| {
        a.mov(eax, 1).unwrap();
        a.ret().unwrap();
    });
    m.code(CODE, |a| {
        a.mov(rbx, DATA).unwrap();
        a.call(rbx).unwrap();
        a.mov(ecx, eax).unwrap();
        a.mov(byte_ptr(rbx + 1), 9).unwrap();
        a.call(rbx).unwrap();
        a.hlt().unwrap();
    });
    let registers = m.run_to_halt();
    assert_eq!((registers.gpr[1], registers.gpr[0]), (1, 9));
}

#[test]
fn device_write_changes_code_that_ran_before() {
    let mut m = Machine::new();
    m.code(CODE, |a| {
        a.mov(eax, 1).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(m.run_to_halt().gpr[0], 1);
    m.memory.write_slice(&[5], GuestAddress(CODE + 1)).unwrap();
    m.set(&Machine::start());
    assert_eq!(m.run_to_halt().gpr[0], 5);
}

#[test]
fn instruction_across_two_pages_follows_the_second_mapping() {
    let mut m = Machine::new();
    let at = DATA + 0x1000 - 2;
    m.code(at, |a| {
        a.mov(eax, 0x0102_0304).unwrap();
        a.ret().unwrap();
    });
    // The other second page has another immediate.
    let mut rest = [0; 16];
    m.memory.read_slice(&mut rest, GuestAddress(DATA + 0x1000)).unwrap();
    rest[0] = 0xaa;
    m.memory.write_slice(&rest, GuestAddress(DATA + 0x3000)).unwrap();
    m.code(CODE, |a| {
        a.mov(rbx, at).unwrap();
        a.call(rbx).unwrap();
        a.mov(ecx, eax).unwrap();
        a.mov(rdx, DATA + 0x3000 | PRESENT | WRITE).unwrap();
        a.mov(qword_ptr(Machine::entry_address(DATA + 0x1000)), rdx).unwrap();
        a.mov(rdx, DATA + 0x1000).unwrap();
        a.invlpg(ptr(rdx)).unwrap();
        a.call(rbx).unwrap();
        a.hlt().unwrap();
    });
    let registers = m.run_to_halt();
    assert_eq!((registers.gpr[1], registers.gpr[0]), (0x0102_0304, 0x0102_aa04));
}

#[test]
fn same_code_at_two_linear_addresses_is_position_independent() {
    let mut m = Machine::new();
    m.code(DATA, |a| {
        a.lea(rax, ptr(DATA)).unwrap();
        a.ret().unwrap();
    });
    m.map(DATA + 0x5000, DATA | PRESENT | WRITE);
    m.code(CODE, |a| {
        a.mov(rbx, DATA).unwrap();
        a.call(rbx).unwrap();
        a.mov(rcx, rax).unwrap();
        a.mov(rbx, DATA + 0x5000).unwrap();
        a.call(rbx).unwrap();
        a.hlt().unwrap();
    });
    let registers = m.run_to_halt();
    assert_eq!(registers.gpr[1], DATA);
    assert!(registers.gpr[0] == DATA || registers.gpr[0] == DATA + 0x5000);
}

#[test]
fn instructions_are_counted_exactly() {
    let mut m = Machine::new();
    m.code(CODE, |a| {
        let mut again = a.create_label();
        a.mov(ecx, 1000).unwrap();
        a.set_label(&mut again).unwrap();
        a.add(eax, 1).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(again).unwrap();
        a.hlt().unwrap();
    });
    m.run_to_halt();
    assert_eq!(m.vcpu.stats().instructions, Some(1 + 3 * 1000 + 1));
}

#[test]
fn equal_deterministic_runs_have_equal_traces() {
    let run = |count: u32| {
        let mut m = Machine::with(1, false, true);
        m.code(CODE, |a| {
            let mut again = a.create_label();
            a.mov(ecx, count).unwrap();
            a.set_label(&mut again).unwrap();
            a.rdtsc().unwrap();
            a.add(rsi, rax).unwrap();
            a.dec(ecx).unwrap();
            a.jnz(again).unwrap();
            a.hlt().unwrap();
        });
        let registers = m.run_to_halt();
        (registers.gpr[6], m.vcpu.stats().trace_hash.unwrap())
    };
    assert_eq!(run(500), run(500));
    assert_ne!(run(500).1, run(501).1);
}

#[test]
fn processors_see_each_others_code_changes_and_locked_sums_add_up() {
    const ROUNDS: u32 = 20_000;
    let mut m = Machine::with(2, false, false);
    let mut second = m.vm.create_vcpu(1).unwrap();
    let write = |a: &mut CodeAssembler| {
        let mut again = a.create_label();
        a.mov(ecx, ROUNDS).unwrap();
        a.set_label(&mut again).unwrap();
        a.lock().inc(dword_ptr(DATA)).unwrap();
        a.lock().xadd(dword_ptr(DATA + 8), esi).unwrap();
        a.mov(esi, 1).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(again).unwrap();
        a.hlt().unwrap();
    };
    m.code(CODE, write);
    m.code(CODE + 0x1000, write);
    let mut registers = Machine::start();
    registers.gpr[6] = 1;
    m.set(&registers);
    registers.rip = CODE + 0x1000;
    registers.gpr[4] = STACK - 0x1000;
    second.set_registers(&registers, vmm::RegisterMask::all()).unwrap();
    std::thread::scope(|scope| {
        let bus = &m.bus;
        let other = scope.spawn(move || second.run(bus, vmm::Entry::default()).unwrap());
        assert_eq!(m.vcpu.run(bus, vmm::Entry::default()).unwrap(), Exit::Halt);
        assert_eq!(other.join().unwrap(), Exit::Halt);
    });
    assert_eq!(m.get::<u32>(DATA), 2 * ROUNDS);
    assert_eq!(m.get::<u32>(DATA + 8), 2 * ROUNDS);
}
