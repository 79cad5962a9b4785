//! Long runs of ordinary code: blocks that follow each other many times, and what has to reach into them.

use std::sync::Arc;
use std::time::Duration;

use iced_x86::code_asm::*;
use vm_memory::{Bytes, GuestAddress};
use vmm::Exit;

use super::machine::*;

/// Enough for every block to be translated and linked to those it jumps to.
const ROUNDS: u32 = 100_000;
/// Top of a stack with room for [`ROUNDS`] return addresses, above everything that the machine keeps.
const DEEP_STACK: u64 = 0x1f_0000;

#[test]
fn long_loop_over_several_blocks_computes_and_counts_exactly() {
    let mut m = Machine::new();
    m.code(CODE, |a| {
        let (mut again, mut even, mut next) = (a.create_label(), a.create_label(), a.create_label());
        a.xor(eax, eax).unwrap();
        a.xor(edx, edx).unwrap();
        a.mov(ecx, ROUNDS).unwrap();
        a.set_label(&mut again).unwrap();
        a.test(ecx, 1).unwrap();
        a.jz(even).unwrap();
        a.add(rax, rcx).unwrap();
        a.jmp(next).unwrap();
        a.set_label(&mut even).unwrap();
        a.add(rdx, rcx).unwrap();
        a.set_label(&mut next).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(again).unwrap();
        a.hlt().unwrap();
    });
    let registers = m.run_to_halt();
    let half = u64::from(ROUNDS / 2);
    assert_eq!((registers.gpr[0], registers.gpr[2]), (half * half, half * (half + 1)));
    // Odd rounds have six instructions, even ones five.
    assert_eq!(m.vcpu.stats().instructions, Some(3 + 11 * half + 1));
}

#[test]
fn string_store_changes_the_block_that_its_own_jumps_forward_to() {
    let mut m = Machine::new();
    m.code(CODE, |a| {
        let (mut again, mut ahead) = (a.create_label(), a.create_label());
        a.xor(edx, edx).unwrap();
        a.mov(ecx, ROUNDS).unwrap();
        a.mov(esi, DATA as u32).unwrap();
        a.lea(rbx, ptr(ahead)).unwrap();
        a.inc(rbx).unwrap();
        a.set_label(&mut again).unwrap();
        // In the last round, mov eax, 1 becomes mov eax, 7.
        a.mov(rdi, rsi).unwrap();
        a.mov(al, 7).unwrap();
        a.cmp(ecx, 1).unwrap();
        a.cmove(rdi, rbx).unwrap();
        a.stosb().unwrap();
        a.jmp(ahead).unwrap();
        a.nop().unwrap();
        a.set_label(&mut ahead).unwrap();
        a.mov(eax, 1).unwrap();
        a.add(rdx, rax).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(again).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(m.run_to_halt().gpr[2], u64::from(ROUNDS) - 1 + 7);
}

#[test]
fn endless_loop_is_left_when_kicked_and_goes_on_where_it_was() {
    let mut m = Machine::new();
    m.code(CODE, |a| {
        let (mut again, mut odd) = (a.create_label(), a.create_label());
        a.set_label(&mut again).unwrap();
        a.add(rax, 1).unwrap();
        a.test(al, 1).unwrap();
        a.jnz(odd).unwrap();
        a.mov(qword_ptr(DATA), rax).unwrap();
        a.set_label(&mut odd).unwrap();
        a.cmp(byte_ptr(DATA + 8), 0).unwrap();
        a.jz(again).unwrap();
        a.hlt().unwrap();
    });
    let mut counted = 0;
    for _ in 0..5 {
        m.run_until_kicked();
        let registers = m.registers();
        assert!(registers.gpr[0] > counted, "it went on\n{registers}");
        assert!(m.get::<u64>(DATA).abs_diff(registers.gpr[0]) <= 2);
        counted = registers.gpr[0];
    }
    m.put(DATA + 8, 1u8);
    let counted = m.run_to_halt().gpr[0];
    // Every other round skips the store. The last round ends with the CMP, a jump that is not taken, and HLT.
    assert_eq!(m.vcpu.stats().instructions, Some(5 * counted + counted / 2 + 1));
}

#[test]
fn jump_to_itself_is_left_when_kicked() {
    let mut m = Machine::new();
    m.code(CODE, |a| {
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.jmp(again).unwrap();
    });
    m.run_until_kicked();
    assert_eq!(m.registers().rip, CODE);
}

#[test]
fn interrupt_reaches_a_loop_that_polls_memory() {
    const VECTOR: u64 = 0x40;
    let mut m = Machine::with(1, true, false);
    m.code(HANDLERS + VECTOR * 16, |a| {
        a.mov(byte_ptr(DATA), 1).unwrap();
        a.iretq().unwrap();
    });
    // The local APIC has to be switched on; it is a register of x2APIC then.
    m.code(CODE, |a| {
        let mut again = a.create_label();
        a.mov(ecx, 0x1b).unwrap();
        a.rdmsr().unwrap();
        a.or(eax, 0xc00).unwrap();
        a.wrmsr().unwrap();
        a.mov(ecx, 0x80f).unwrap();
        a.mov(eax, 0x1ff).unwrap();
        a.xor(edx, edx).unwrap();
        a.wrmsr().unwrap();
        a.sti().unwrap();
        a.set_label(&mut again).unwrap();
        a.inc(rbx).unwrap();
        a.cmp(byte_ptr(DATA), 0).unwrap();
        a.jz(again).unwrap();
        a.out(0x82, al).unwrap();
    });
    let vm = Arc::clone(&m.vm);
    let sender = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(20));
        vm.signal_msi(0xfee0_0000, VECTOR as u32);
    });
    // Nobody takes the port: the machine stops there.
    assert!(matches!(m.run(), Exit::PortOut { .. }));
    sender.join().unwrap();
    assert!(m.registers().gpr[3] > 1);
}

#[test]
fn recursion_of_a_hundred_thousand_frames_needs_no_host_stack() {
    let mut m = Machine::new();
    m.code(CODE, |a| {
        let (mut descend, mut bottom) = (a.create_label(), a.create_label());
        a.mov(ecx, ROUNDS).unwrap();
        a.call(descend).unwrap();
        a.hlt().unwrap();
        a.set_label(&mut descend).unwrap();
        a.dec(ecx).unwrap();
        a.jz(bottom).unwrap();
        a.call(descend).unwrap();
        a.set_label(&mut bottom).unwrap();
        a.inc(eax).unwrap();
        a.ret().unwrap();
    });
    let mut registers = Machine::start();
    registers.gpr[4] = DEEP_STACK;
    m.set(&registers);
    // A thread with the least stack that Rust gives elsewhere.
    let registers = std::thread::scope(|scope| {
        let run = || m.run_to_halt();
        std::thread::Builder::new().stack_size(256 << 10).spawn_scoped(scope, run).unwrap().join().unwrap()
    });
    assert_eq!((registers.gpr[0], registers.gpr[4]), (u64::from(ROUNDS), DEEP_STACK));
    assert_eq!(m.vcpu.stats().instructions, Some(2 + 5 * u64::from(ROUNDS) - 1 + 1));
}

#[test]
fn functions_of_one_place_in_the_jump_cache_are_found_and_found_changed() {
    let mut m = Machine::new();
    // Addresses that the jump cache has one place for: page and offset make the same number.
    let functions: Vec<u64> = (DATA >> 12..).take(6).map(|page| page << 12 | (page ^ 0x130)).collect();
    for &at in &functions {
        m.code(at, |a| {
            a.add(ebx, 1).unwrap();
            a.ret().unwrap();
        });
    }
    m.code(CODE, |a| {
        let mut again = a.create_label();
        a.mov(ecx, 100).unwrap();
        a.xor(ebx, ebx).unwrap();
        a.set_label(&mut again).unwrap();
        for &at in &functions {
            a.mov(rdx, at).unwrap();
            a.call(rdx).unwrap();
        }
        // What the first and the last add.
        a.mov(byte_ptr(functions[0] + 2), cl).unwrap();
        a.mov(byte_ptr(functions[5] + 2), cl).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(again).unwrap();
        a.hlt().unwrap();
    });
    // 100 rounds of four that add 1, and of two that do so in the first round and then add 100 to 2.
    assert_eq!(m.run_to_halt().gpr[3], 400 + 2 * (1 + (2..=100).sum::<u64>()));
}

#[test]
fn calls_through_registers_and_memory_find_their_targets_by_turns() {
    let mut m = Machine::new();
    let functions = [DATA + 0x1000, DATA + 0x1100, DATA + 0x2000];
    for (n, &at) in functions.iter().enumerate() {
        m.code(at, |a| {
            a.add(rax, 1 << (8 * n)).unwrap();
            a.ret().unwrap();
        });
        m.put(DATA + 8 * n as u64, at);
    }
    m.code(CODE, |a| {
        let (mut again, mut first) = (a.create_label(), a.create_label());
        a.mov(ecx, 90).unwrap();
        a.xor(ebx, ebx).unwrap();
        a.set_label(&mut again).unwrap();
        a.call(qword_ptr(DATA + rbx * 8)).unwrap();
        a.mov(rdx, qword_ptr(DATA + rbx * 8)).unwrap();
        a.call(rdx).unwrap();
        a.inc(ebx).unwrap();
        a.cmp(ebx, 3).unwrap();
        a.jb(first).unwrap();
        a.xor(ebx, ebx).unwrap();
        a.set_label(&mut first).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(again).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(m.run_to_halt().gpr[0], 60 << 16 | 60 << 8 | 60);
}

#[test]
fn loop_that_rewrites_an_instruction_of_its_own_block_each_round_sees_every_change() {
    let mut m = Machine::new();
    m.code(CODE, |a| {
        let (mut again, mut changed) = (a.create_label(), a.create_label());
        a.xor(eax, eax).unwrap();
        a.mov(ecx, 1000).unwrap();
        a.lea(rbx, ptr(changed)).unwrap();
        a.set_label(&mut again).unwrap();
        a.mov(dword_ptr(rbx + 1), ecx).unwrap();
        a.set_label(&mut changed).unwrap();
        a.mov(edx, 0x0102_0304).unwrap();
        a.add(eax, edx).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(again).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(m.run_to_halt().gpr[0], 1000 * 1001 / 2);
    assert_eq!(m.vcpu.stats().instructions, Some(3 + 5 * 1000 + 1));
}

#[test]
fn loop_that_rewrites_the_block_after_the_next_each_round_sees_every_change() {
    let mut m = Machine::new();
    // The block between is on a page of its own, where nothing is written: it stays linked.
    let between = DATA + 0x1000;
    m.code(between, |a| a.jmp(rbx).unwrap());
    m.code(CODE, |a| {
        let (mut again, mut changed) = (a.create_label(), a.create_label());
        a.xor(eax, eax).unwrap();
        a.mov(ecx, 1000).unwrap();
        a.lea(rbx, ptr(changed)).unwrap();
        a.set_label(&mut again).unwrap();
        a.mov(dword_ptr(rbx + 1), ecx).unwrap();
        a.jmp(between).unwrap();
        a.set_label(&mut changed).unwrap();
        a.mov(edx, 0x0102_0304).unwrap();
        a.add(eax, edx).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(again).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(m.run_to_halt().gpr[0], 1000 * 1001 / 2);
}

#[test]
fn loop_whose_last_round_stores_into_the_running_block_sees_that_store() {
    let mut m = Machine::new();
    m.code(CODE, |a| {
        let (mut again, mut changed, mut next) = (a.create_label(), a.create_label(), a.create_label());
        a.xor(eax, eax).unwrap();
        a.mov(ecx, 1000).unwrap();
        a.mov(rbx, DATA).unwrap();
        a.lea(rsi, ptr(changed)).unwrap();
        a.jmp(again).unwrap();
        a.set_label(&mut again).unwrap();
        a.cmp(ecx, 1).unwrap();
        a.cmove(rbx, rsi).unwrap();
        a.mov(dword_ptr(rbx + 1), ecx).unwrap();
        a.set_label(&mut changed).unwrap();
        a.mov(edx, 0x10_0000).unwrap();
        a.add(eax, edx).unwrap();
        a.jmp(next).unwrap();
        // A second block: when the first one is reached again, it has to be known to be the running one.
        a.set_label(&mut next).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(again).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(m.run_to_halt().gpr[0], 999 * 0x10_0000 + 1);
}

#[test]
fn store_beside_code_changes_the_page_and_not_what_runs() {
    let mut m = Machine::new();
    let beside = CODE + 0x800;
    m.code(CODE, |a| {
        let mut again = a.create_label();
        a.mov(ecx, ROUNDS).unwrap();
        a.set_label(&mut again).unwrap();
        a.add(qword_ptr(beside), 3).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(again).unwrap();
        a.hlt().unwrap();
    });
    m.put(beside, 0u64);
    m.run_to_halt();
    assert_eq!(m.get::<u64>(beside), 3 * u64::from(ROUNDS));
    assert_eq!(m.vcpu.stats().instructions, Some(1 + 3 * u64::from(ROUNDS) + 1));
}

#[test]
fn page_that_is_mapped_elsewhere_between_rounds_runs_its_new_code() {
    let mut m = Machine::new();
    for (at, value) in [(DATA + 0x1000, 1), (DATA + 0x2000, 100)] {
        m.code(at, |a| {
            a.add(eax, value).unwrap();
            a.ret().unwrap();
        });
    }
    let linear = DATA + 0x5000;
    let flags = PRESENT | WRITE;
    m.map(linear, (DATA + 0x1000) | flags);
    m.code(CODE, |a| {
        let mut again = a.create_label();
        a.xor(eax, eax).unwrap();
        a.mov(ecx, 50).unwrap();
        a.mov(rbx, linear).unwrap();
        a.set_label(&mut again).unwrap();
        a.call(rbx).unwrap();
        a.xor(qword_ptr(Machine::entry_address(linear)), 0x3000).unwrap();
        a.invlpg(ptr(rbx)).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(again).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!((DATA + 0x1000) ^ 0x3000, DATA + 0x2000);
    assert_eq!(m.run_to_halt().gpr[0], 25 * 101);
}

#[test]
fn fault_in_the_middle_of_a_loop_shows_the_flags_of_that_moment() {
    let mut m = Machine::new();
    let missing = DATA + 0x7000;
    m.map(missing, 0);
    let mut faulting = 0;
    m.code(CODE, |a| {
        let mut again = a.create_label();
        a.mov(rbx, missing - 8 * 500).unwrap();
        a.mov(ecx, 1000).unwrap();
        a.set_label(&mut again).unwrap();
        a.cmp(rcx, 500).unwrap();
        a.mov(qword_ptr(rbx), rcx).unwrap();
        a.lea(rbx, ptr(rbx + 8)).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(again).unwrap();
        a.hlt().unwrap();
    });
    let mut bytes = [0; 64];
    m.memory.read_slice(&mut bytes, GuestAddress(CODE)).unwrap();
    let mut decoder = iced_x86::Decoder::with_ip(64, &bytes, CODE, iced_x86::DecoderOptions::NONE);
    for _ in 0..4 {
        faulting = decoder.decode().ip();
    }
    let exception = m.run_to_exception();
    assert_eq!((exception.vector, exception.error, exception.rip), (14, Some(2), faulting));
    // 500 - 500: zero and even parity, and what is always set.
    assert_eq!(exception.rflags & !(1 << 16), 0x46);
    let registers = m.registers();
    assert_eq!((registers.gpr[1], registers.gpr[3], registers.cr2), (500, missing, missing));
    assert_eq!(m.get::<u64>(missing - 8), 501);
    assert_eq!(m.vcpu.stats().instructions, Some(2 + 5 * 500 + 1 + 1));
}

#[test]
fn same_blocks_run_at_two_linear_addresses_by_turns() {
    let mut m = Machine::new();
    let (first, second) = (DATA + 0x1000, DATA + 0x5000);
    m.map(second, first | PRESENT | WRITE);
    // Counts its rounds beside itself, at the address where it runs, and says where it runs.
    m.code(first, |a| {
        let (mut again, mut end) = (a.create_label(), a.create_label());
        a.mov(edx, 10).unwrap();
        a.set_label(&mut again).unwrap();
        a.inc(dword_ptr(first + 0x800)).unwrap();
        a.dec(edx).unwrap();
        a.jz(end).unwrap();
        a.jmp(again).unwrap();
        a.set_label(&mut end).unwrap();
        a.lea(rax, ptr(again)).unwrap();
        a.ret().unwrap();
    });
    m.code(CODE, |a| {
        let mut again = a.create_label();
        a.mov(ecx, 100).unwrap();
        a.mov(rbx, first).unwrap();
        a.mov(rsi, second).unwrap();
        a.xor(edi, edi).unwrap();
        a.set_label(&mut again).unwrap();
        a.call(rbx).unwrap();
        a.add(rdi, rax).unwrap();
        a.sub(rdi, rbx).unwrap();
        a.xchg(rbx, rsi).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(again).unwrap();
        a.hlt().unwrap();
    });
    let registers = m.run_to_halt();
    assert_eq!(registers.gpr[7], 100 * 5);
    assert_eq!(m.get::<u32>(first + 0x800), 1000);
}

#[test]
fn stack_frame_across_the_end_of_a_page_is_what_any_other_is() {
    let mut m = Machine::new();
    let (begin, rounds) = (DATA + 0x2000 + 24, 5_000u32);
    m.code(CODE, |a| {
        let (mut again, mut function) = (a.create_label(), a.create_label());
        a.mov(rsp, begin).unwrap();
        a.mov(ecx, rounds).unwrap();
        a.set_label(&mut again).unwrap();
        a.call(function).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(again).unwrap();
        a.hlt().unwrap();
        a.set_label(&mut function).unwrap();
        a.push(rbx).unwrap();
        a.push(rcx).unwrap();
        a.push(rdx).unwrap();
        a.push(rsi).unwrap();
        a.mov(rbx, rcx).unwrap();
        a.add(qword_ptr(rsp + 8), 3).unwrap();
        a.mov(rdx, qword_ptr(rsp + 8)).unwrap();
        a.add(rsi, rbx).unwrap();
        a.mov(qword_ptr(rsp), rsi).unwrap();
        a.pop(rsi).unwrap();
        a.pop(rdx).unwrap();
        a.pop(rcx).unwrap();
        a.pop(rbx).unwrap();
        a.ret().unwrap();
    });
    let registers = m.run_to_halt();
    let rounds = u64::from(rounds);
    assert_eq!((registers.gpr[2], registers.gpr[3], registers.gpr[6]), (3 * rounds, 0, rounds * (rounds + 1) / 2));
    assert_eq!(registers.gpr[4], begin);
    assert_eq!(m.vcpu.stats().instructions, Some(2 + 17 * rounds + 1));
}

#[test]
fn code_that_is_changed_is_new_at_all_its_linear_addresses() {
    let mut m = Machine::new();
    let (first, second) = (DATA + 0x1000, DATA + 0x5000);
    m.map(second, first | PRESENT | WRITE);
    m.code(first, |a| {
        a.add(r8d, 1).unwrap();
        a.ret().unwrap();
    });
    m.code(CODE, |a| {
        let (mut change, mut again) = (a.create_label(), a.create_label());
        a.xor(r8d, r8d).unwrap();
        a.mov(rbx, first).unwrap();
        a.mov(rsi, second).unwrap();
        a.mov(edx, 20).unwrap();
        a.set_label(&mut change).unwrap();
        a.mov(ecx, 300).unwrap();
        a.set_label(&mut again).unwrap();
        a.call(rbx).unwrap();
        a.call(rsi).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(again).unwrap();
        // The constant of the ADD.
        a.inc(byte_ptr(rbx + 3)).unwrap();
        a.dec(edx).unwrap();
        a.jnz(change).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(m.run_to_halt().gpr[8], (1..=20).map(|by| 600 * by).sum::<u64>());
}

#[test]
fn instruction_that_goes_on_in_another_page_is_each_mappings_own() {
    let mut m = Machine::new();
    // mov eax, imm32; ret. The last three bytes of the constant are in the second page.
    let (page, first, second) = (DATA + 0x1000, DATA + 0x5000, DATA + 0x8000);
    m.put(page + 0xffe, [0xb8u8, 0x01]);
    for (linear, rest, constant) in [(first, DATA + 0x2000, 0x01u8), (second, DATA + 0x3000, 0x02)] {
        m.map(linear, page | PRESENT | WRITE);
        m.map(linear + 0x1000, rest | PRESENT | WRITE);
        m.put(rest, [constant, 0, 0, 0xc3]);
    }
    m.code(CODE, |a| {
        let mut again = a.create_label();
        a.xor(edx, edx).unwrap();
        a.mov(ecx, 300).unwrap();
        a.mov(rbx, first + 0xffe).unwrap();
        a.mov(rsi, second + 0xffe).unwrap();
        a.set_label(&mut again).unwrap();
        a.call(rbx).unwrap();
        a.add(rdx, rax).unwrap();
        a.call(rsi).unwrap();
        a.add(rdx, rax).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(again).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(m.run_to_halt().gpr[2], 300 * (0x101 + 0x201));
}
