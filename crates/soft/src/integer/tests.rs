//! What the differential test against the host cannot reach: 16-bit and 32-bit code, and fused pairs, by the manual's word.

use iced_x86::code_asm::*;
use vm_memory::{Bytes, GuestAddress};
use vmm::memory::GuestMemory;

use super::operand::reg;
use crate::cpu::{CS, Cpu, SS, TrapKind, access, cr0, cr4, efer, rflags, vector};
use crate::op::Outcome;
use crate::vm::VmShared;

const CODE: u64 = 0x1000;
const DATA: u64 = 0x2000;
const STACK: u64 = 0x4000;
/// Page tables of 64-bit guests.
const TABLES: u64 = 0x8000;

/// A processor that executes code of one width, with flat segments.
struct Guest {
    cpu: Cpu,
    memory: GuestMemory,
    bits: u32,
}

impl Guest {
    fn new(bits: u32) -> Guest {
        let memory = vmm::memory::map(&[(0, 0x20000)]).unwrap();
        let mut cpu = Cpu::new(0, VmShared::plain(&memory, 1));
        cpu.seg[CS].base = 0;
        if bits != 16 {
            cpu.cr0 |= cr0::PE;
            for segment in &mut cpu.seg {
                segment.limit = u32::MAX;
                segment.access |= access::DB | access::G;
            }
        }
        if bits == 64 {
            memory.write_obj(TABLES + 0x1003, GuestAddress(TABLES)).unwrap();
            memory.write_obj(0x83_u64, GuestAddress(TABLES + 0x1000)).unwrap();
            cpu.efer = efer::LME | efer::LMA;
            cpu.cr4 = cr4::PAE;
            cpu.cr3 = TABLES;
            cpu.cr0 |= cr0::PG;
            cpu.seg[CS].access = cpu.seg[CS].access & !access::DB | access::L;
        }
        cpu.update_mode();
        cpu.regs[reg::RSP] = STACK;
        Guest { cpu, memory, bits }
    }

    /// Executes code up to its end, or the trap that stops it.
    fn run(&mut self, write: impl FnOnce(&mut CodeAssembler)) -> Result<(), TrapKind> {
        let mut code = CodeAssembler::new(self.bits).unwrap();
        write(&mut code);
        let mut bytes = code.assemble(CODE).unwrap();
        let end = CODE + bytes.len() as u64;
        bytes.push(0x90);
        self.cpu.blocks.stop_running();
        self.memory.write_slice(&bytes, GuestAddress(CODE)).unwrap();
        self.cpu.vm.clone().ram(CODE).unwrap().1.written(CODE as usize / 4096, 0, bytes.len());
        self.cpu.rip = CODE;
        // A block would go on past the end, so only 64-bit code, where pairs are fused, is executed by blocks.
        for _ in 0..1000 {
            if self.cpu.rip == end {
                return Ok(());
            }
            let entered = self.cpu.enter_block(self.bits != 64).map_err(|_| self.cpu.trap)?;
            if (entered.run)(&mut self.cpu, entered) == Outcome::Trapped {
                return Err(self.cpu.trap);
            }
        }
        panic!("the code does not come to its end, RIP is {:#x}", self.cpu.rip);
    }

    fn word(&self, at: u64) -> u16 {
        self.memory.read_obj(GuestAddress(at)).unwrap()
    }

    fn get(&self, register: usize) -> u64 {
        self.cpu.regs[register]
    }
}

fn exception(vector: u8, error: Option<u32>) -> Result<(), TrapKind> {
    Err(TrapKind::Exception { vector, error, address: 0 })
}

#[test]
fn pusha_stores_the_stack_pointer_from_before_and_popa_skips_it() {
    let mut guest = Guest::new(16);
    guest.cpu.regs[..8].copy_from_slice(&[0xa, 0xc, 0xd, 0xb, STACK, 0xe, 0x5, 0x1]);
    guest.run(|a| a.pusha().unwrap()).unwrap();
    let stored: Vec<u16> = (1..=8).map(|n| guest.word(STACK - 2 * n)).collect();
    assert_eq!(stored, [0xa, 0xc, 0xd, 0xb, STACK as u16, 0xe, 0x5, 0x1]);
    guest.cpu.regs[..4].fill(0xffff_0000);
    guest.run(|a| a.popa().unwrap()).unwrap();
    assert_eq!(guest.cpu.regs[..8], [0xffff_000a, 0xffff_000c, 0xffff_000d, 0xffff_000b, STACK, 0xe, 0x5, 0x1]);
}

#[test]
fn a_16_bit_stack_wraps_within_64_kib() {
    let mut guest = Guest::new(16);
    guest.cpu.regs[reg::RSP] = 0x7_0000;
    guest.cpu.regs[reg::RAX] = 0x1234;
    guest.run(|a| a.push(ax).unwrap()).unwrap();
    assert_eq!(guest.get(reg::RSP), 0x7_fffe);
    assert_eq!(guest.word(0xfffe), 0x1234);
}

#[test]
fn calls_push_the_operand_size() {
    let mut guest = Guest::new(16);
    guest
        .run(|a| {
            let mut function = a.create_label();
            let mut end = a.create_label();
            a.call(function).unwrap();
            a.jmp(end).unwrap();
            a.set_label(&mut function).unwrap();
            a.mov(ax, 7).unwrap();
            a.ret_1(4).unwrap();
            a.set_label(&mut end).unwrap();
            a.nop().unwrap();
        })
        .unwrap();
    assert_eq!((guest.get(reg::RAX), guest.get(reg::RSP)), (7, STACK + 4));
    assert_eq!(guest.word(STACK - 2), CODE as u16 + 3);
}

#[test]
fn a_branch_beyond_the_limit_faults_before_it_moves() {
    let mut guest = Guest::new(32);
    guest.cpu.seg[CS].limit = 0xffff;
    guest.cpu.regs[reg::RAX] = 0x1_0000;
    assert_eq!(guest.run(|a| a.jmp(eax).unwrap()), exception(vector::GP, Some(0)));
    assert_eq!(guest.cpu.rip, CODE);
}

#[test]
fn enter_links_frames_and_leave_undoes_it() {
    let mut guest = Guest::new(32);
    guest.cpu.regs[reg::RBP] = 0x3800;
    guest.memory.write_obj(0x3900_u32, GuestAddress(0x37fc)).unwrap();
    guest.run(|a| a.enter(0x20, 2).unwrap()).unwrap();
    assert_eq!((guest.get(reg::RBP), guest.get(reg::RSP)), (STACK - 4, STACK - 4 - 8 - 0x20));
    let frame: Vec<u32> = (1..=3).map(|n| guest.memory.read_obj(GuestAddress(STACK - 4 * n)).unwrap()).collect();
    assert_eq!(frame, [0x3800, 0x3900, STACK as u32 - 4]);
    guest.run(|a| a.leave().unwrap()).unwrap();
    assert_eq!((guest.get(reg::RBP), guest.get(reg::RSP)), (0x3800, STACK));
}

#[test]
fn stack_faults_are_ss_faults() {
    let mut guest = Guest::new(32);
    guest.cpu.seg[SS].limit = 0xfff;
    assert_eq!(guest.run(|a| a.push(eax).unwrap()), exception(vector::SS, Some(0)));
    assert_eq!(guest.get(reg::RSP), STACK);
}

#[test]
fn repeated_moves_wrap_at_the_address_size() {
    let mut guest = Guest::new(16);
    guest.memory.write_slice(b"ab", GuestAddress(0xfffe)).unwrap();
    guest.memory.write_slice(b"cd", GuestAddress(0)).unwrap();
    (guest.cpu.regs[reg::RSI], guest.cpu.regs[reg::RDI], guest.cpu.regs[reg::RCX]) = (0x5_fffe, DATA, 0x9_0004);
    guest.run(|a| a.rep().movsb().unwrap()).unwrap();
    assert_eq!((guest.get(reg::RSI), guest.get(reg::RDI), guest.get(reg::RCX)), (0x5_0002, DATA + 4, 0x9_0000));
    assert_eq!(guest.memory.read_obj::<[u8; 4]>(GuestAddress(DATA)).unwrap(), *b"abcd");
}

#[test]
fn decimal_arithmetic_of_the_manuals_examples() {
    let mut guest = Guest::new(32);
    guest
        .run(|a| {
            a.mov(al, 0x79).unwrap();
            a.add(al, 0x35).unwrap();
            a.daa().unwrap();
        })
        .unwrap();
    assert_eq!((guest.get(reg::RAX) & 0xff, guest.cpu.carry()), (0x14, true));
    guest
        .run(|a| {
            a.mov(eax, 0x0105).unwrap();
            a.sub(al, 9).unwrap();
            a.aas().unwrap();
            a.aam(10).unwrap();
        })
        .unwrap();
    assert_eq!(guest.get(reg::RAX), 0x0006);
    guest
        .run(|a| {
            a.mov(eax, 0x0307).unwrap();
            a.aad(10).unwrap();
        })
        .unwrap();
    assert_eq!(guest.get(reg::RAX), 37);
    assert_eq!(guest.run(|a| a.db(&[0xd4, 0]).unwrap()), exception(vector::DE, None));
}

#[test]
fn bound_raises_br_outside_its_limits() {
    let mut guest = Guest::new(32);
    guest.memory.write_obj(-2i32, GuestAddress(DATA)).unwrap();
    guest.memory.write_obj(5i32, GuestAddress(DATA + 4)).unwrap();
    for (index, expected) in [(-2i32, Ok(())), (5, Ok(())), (6, exception(vector::BR, None)), (-3, exception(vector::BR, None))] {
        guest.cpu.regs[reg::RAX] = u64::from(index as u32);
        assert_eq!(guest.run(|a| a.bound(eax, dword_ptr(DATA)).unwrap()), expected, "{index}");
    }
}

#[test]
fn bit_strings_reach_below_their_base() {
    let mut guest = Guest::new(32);
    guest.cpu.regs[reg::RAX] = u64::from(-9i32 as u32);
    guest.run(|a| a.bts(dword_ptr(DATA), eax).unwrap()).unwrap();
    assert_eq!(guest.memory.read_obj::<u8>(GuestAddress(DATA - 2)).unwrap(), 0x80);
    assert!(!guest.cpu.carry());
}

#[test]
fn popf_obeys_privilege() {
    let mut guest = Guest::new(32);
    guest.cpu.seg[SS].access |= 3 << access::DPL_SHIFT;
    guest.cpu.update_mode();
    guest.memory.write_obj(0xffff_ffff_u32, GuestAddress(STACK)).unwrap();
    guest.cpu.cr0 &= !cr0::AM;
    guest.run(|a| a.popfd().unwrap()).unwrap();
    let changed = rflags::STATUS | rflags::TF | rflags::DF | rflags::NT | rflags::AC | rflags::ID;
    assert_eq!(guest.cpu.flags(), changed | rflags::FIXED);
}

#[test]
fn fused_pairs_jump_and_leave_flags_like_single_ones() {
    for (left, right) in [(1u64, 1u64), (1, 2), (2, 1), (u64::MAX, 1), (1 << 63, 1)] {
        for cc in 0..16u8 {
            let mut guest = Guest::new(64);
            (guest.cpu.regs[reg::RAX], guest.cpu.regs[reg::RCX]) = (left, right);
            guest
                .run(|a| {
                    a.mov(edx, 1).unwrap();
                    a.cmp(rax, rcx).unwrap();
                    // Jcc over the MOV.
                    a.db(&[0x70 | cc, 5]).unwrap();
                    a.mov(edx, 0).unwrap();
                    // A branch ends the block, so that the code does.
                    a.db(&[0xeb, 0]).unwrap();
                })
                .unwrap();
            assert_eq!(guest.get(reg::RDX) == 1, guest.cpu.condition(cc), "{left:#x} {right:#x} condition {cc}");
            let difference = left.wrapping_sub(right);
            assert_eq!((guest.cpu.condition(4), guest.cpu.carry()), (difference == 0, left < right));
        }
    }
}

#[test]
fn a_fault_in_the_first_of_a_fused_pair_leaves_rip_at_it() {
    let mut guest = Guest::new(64);
    guest.cpu.regs[reg::RBX] = 1 << 62;
    let before = guest.cpu.instructions;
    let trap = guest.run(|a| {
        a.nop().unwrap();
        a.cmp(qword_ptr(rbx), 0).unwrap();
        a.db(&[0x74, 0]).unwrap();
    });
    assert_eq!(trap, exception(vector::GP, Some(0)));
    assert_eq!((guest.cpu.rip, guest.cpu.instructions - before), (CODE + 1, 1));
}

#[test]
fn division_overflow_changes_nothing() {
    let mut guest = Guest::new(32);
    (guest.cpu.regs[reg::RAX], guest.cpu.regs[reg::RDX], guest.cpu.regs[reg::RBX]) = (5, 2, 2);
    assert_eq!(guest.run(|a| a.div(ebx).unwrap()), exception(vector::DE, None));
    assert_eq!((guest.get(reg::RAX), guest.get(reg::RDX), guest.cpu.rip), (5, 2, CODE));
}
