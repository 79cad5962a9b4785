//! Translation: who may access what, what a fault says, what becomes stale when.

use iced_x86::code_asm::*;
use vmm::exit::Access;
use vmm::memory::Protection;
use vmm::{Exit, RegisterMask};

use super::machine::*;

fn load_from(address: u64) -> impl FnOnce(&mut CodeAssembler) {
    move |a| {
        a.mov(rbx, address).unwrap();
        a.mov(rax, qword_ptr(rbx)).unwrap();
        a.hlt().unwrap();
    }
}

fn store_to(address: u64) -> impl FnOnce(&mut CodeAssembler) {
    move |a| {
        a.mov(rbx, address).unwrap();
        a.mov(qword_ptr(rbx), rax).unwrap();
        a.hlt().unwrap();
    }
}

fn fault(machine: &mut Machine) -> (u64, u64) {
    let exception = machine.run_to_exception();
    assert_eq!(exception.vector, 14, "{exception:x?}");
    (exception.error.unwrap(), machine.registers().cr2)
}

#[test]
fn read_of_an_absent_page_says_so() {
    let mut m = Machine::new();
    m.map(DATA, 0);
    m.code(CODE, load_from(DATA + 8));
    assert_eq!(fault(&mut m), (0, DATA + 8));
}

#[test]
fn write_to_a_read_only_page_faults_under_wp() {
    let mut m = Machine::new();
    m.map(DATA, DATA | PRESENT);
    m.code(CODE, store_to(DATA + 16));
    assert_eq!(fault(&mut m), (3, DATA + 16));
}

#[test]
fn supervisor_writes_to_a_read_only_page_without_wp() {
    let mut m = Machine::new();
    m.map(DATA, DATA | PRESENT);
    m.code(CODE, store_to(DATA));
    let mut registers = Machine::start();
    registers.cr0 &= !(1 << 16);
    registers.gpr[0] = 77;
    m.set(&registers);
    m.run_to_halt();
    assert_eq!(m.get::<u64>(DATA), 77);
}

#[test]
fn user_read_of_a_supervisor_page_faults_as_user() {
    let mut m = Machine::new();
    m.open_to_user();
    m.map(DATA, DATA | PRESENT | WRITE);
    m.code(CODE, load_from(DATA));
    m.set(&Machine::start_user());
    assert_eq!(fault(&mut m), (5, DATA));
}

#[test]
fn fetch_from_a_no_execute_page_faults_as_fetch() {
    let mut m = Machine::new();
    m.map(DATA, DATA | PRESENT | WRITE | NO_EXECUTE);
    m.code(CODE, |a| {
        a.mov(rax, DATA).unwrap();
        a.jmp(rax).unwrap();
    });
    assert_eq!(fault(&mut m), (0x11, DATA));
}

#[test]
fn supervisor_fetch_from_a_user_page_faults_under_smep() {
    let mut m = Machine::new();
    m.map(DATA, DATA | PRESENT | WRITE | USER);
    m.put(DATA, 0xf4u8);
    m.code(CODE, |a| {
        a.mov(rax, DATA).unwrap();
        a.jmp(rax).unwrap();
    });
    let mut registers = Machine::start();
    registers.cr4 |= 1 << 20;
    m.set(&registers);
    assert_eq!(fault(&mut m), (0x11, DATA));
}

#[test]
fn reserved_bit_in_an_entry_faults_as_reserved() {
    let mut m = Machine::new();
    m.map(DATA, DATA | PRESENT | WRITE | 1 << 51);
    m.code(CODE, load_from(DATA));
    assert_eq!(fault(&mut m), (9, DATA));
}

#[test]
fn access_across_two_pages_faults_on_the_absent_second() {
    let mut m = Machine::new();
    m.map(DATA + 0x1000, 0);
    m.put(DATA + 0xff8, 0x1111_1111_1111_1111u64);
    m.code(CODE, store_to(DATA + 0xffc));
    assert_eq!(fault(&mut m), (2, DATA + 0x1000));
    assert_eq!(m.get::<u64>(DATA + 0xff8), 0x1111_1111_1111_1111, "nothing of the store may be visible");
}

#[test]
fn accessed_and_dirty_bits_are_set_by_use() {
    let mut m = Machine::new();
    m.code(CODE, |a| {
        a.mov(rax, qword_ptr(DATA)).unwrap();
        a.mov(qword_ptr(DATA + 0x1000), rax).unwrap();
        a.hlt().unwrap();
    });
    m.run_to_halt();
    assert_eq!(m.get::<u64>(Machine::entry_address(DATA)) & 0x60, 0x20);
    assert_eq!(m.get::<u64>(Machine::entry_address(DATA + 0x1000)) & 0x60, 0x60);
    assert_eq!(m.get::<u64>(Machine::entry_address(DATA + 0x2000)) & 0x60, 0);
}

#[test]
fn non_canonical_address_is_a_general_protection_fault_and_through_rsp_a_stack_fault() {
    let mut m = Machine::new();
    m.code(CODE, load_from(0x8000_0000_0000_0000));
    let exception = m.run_to_exception();
    assert_eq!((exception.vector, exception.error), (13, Some(0)));
    let mut m = Machine::new();
    m.gate(12, 0x8e, 1);
    m.code(CODE, |a| {
        a.mov(rsp, 0x8000_0000_0000_0000u64).unwrap();
        a.push(rax).unwrap();
    });
    let exception = m.run_to_exception();
    assert_eq!((exception.vector, exception.error), (12, Some(0)));
}

#[test]
fn invlpg_makes_a_changed_entry_seen() {
    let mut m = Machine::new();
    m.put(DATA + 0x1000, 1u64);
    m.put(DATA + 0x2000, 2u64);
    m.code(CODE, |a| {
        a.mov(rbx, DATA + 0x1000).unwrap();
        a.mov(rcx, qword_ptr(rbx)).unwrap();
        a.mov(rax, DATA + 0x2000 | PRESENT | WRITE).unwrap();
        a.mov(qword_ptr(Machine::entry_address(DATA + 0x1000)), rax).unwrap();
        a.invlpg(ptr(rbx)).unwrap();
        a.mov(rdx, qword_ptr(rbx)).unwrap();
        a.hlt().unwrap();
    });
    let registers = m.run_to_halt();
    assert_eq!((registers.gpr[1], registers.gpr[2]), (1, 2));
}

/// Beyond it a page has the same place in the TLB.
const APART: u64 = 8 << 20;

/// A machine that has the low 2 MiB again and again, by the same page table.
fn with_aliases() -> Machine {
    let m = Machine::new();
    let directory = TABLES + 0x2000;
    let table: u64 = m.get(directory);
    (1..64).for_each(|n| m.put(directory + 8 * n, table));
    m
}

#[test]
fn access_across_pages_goes_on_elsewhere_though_the_second_has_the_place_of_the_first_in_the_tlb() {
    const PAGES: u64 = 8;
    let linear = |n: u64| DATA + 0x1000 * n;
    // In the other order, so that no page goes on in memory as it does in linear addresses.
    let physical = |n: u64| DATA + 0x1000 * (2 * PAGES - n);
    let (first, last) = (|n: u64| 0x100 + n, |n: u64| 0x200 + n);
    let mut m = with_aliases();
    for n in 0..PAGES {
        m.put(physical(n), first(n) as u32);
        m.put(physical(n) + 0xffc, last(n) as u32);
        m.put(Machine::entry_address(linear(n)), physical(n) | PRESENT | WRITE);
    }
    // Each page is moved to a neighbour of its place three times, which have their turns.
    let rounds = (1..PAGES).flat_map(|n| [n; 3]);
    m.code(CODE, |a| {
        a.xor(ecx, ecx).unwrap();
        for n in rounds.clone() {
            a.mov(rbx, linear(n)).unwrap();
            a.mov(rax, qword_ptr(rbx)).unwrap();
            a.mov(rax, qword_ptr(rbx + APART as i32)).unwrap();
            a.add(rcx, qword_ptr(rbx - 4)).unwrap();
        }
        a.hlt().unwrap();
    });
    m.set(&Machine::start());
    assert_eq!(m.run_to_halt().gpr[1], rounds.map(|n| last(n - 1) | first(n) << 32).sum::<u64>());
}

#[test]
fn invlpg_finds_a_page_whose_place_in_the_tlb_others_have_taken() {
    let mut m = with_aliases();
    m.put(DATA + 0x1000, 1u64);
    m.put(DATA + 0x2000, 2u64);
    m.code(CODE, |a| {
        a.mov(rbx, DATA + 0x1000).unwrap();
        a.mov(rcx, qword_ptr(rbx)).unwrap();
        (1..4).for_each(|n| a.add(rcx, qword_ptr(rbx + (n * APART) as i32)).unwrap());
        a.mov(rax, DATA + 0x2000 | PRESENT | WRITE).unwrap();
        a.mov(qword_ptr(Machine::entry_address(DATA + 0x1000)), rax).unwrap();
        for n in 0..4 {
            a.invlpg(ptr(rbx + (n * APART) as i32)).unwrap();
        }
        (0..4).for_each(|n| a.add(rdx, qword_ptr(rbx + (n * APART) as i32)).unwrap());
        a.hlt().unwrap();
    });
    let mut registers = Machine::start();
    registers.gpr[2] = 0;
    m.set(&registers);
    let registers = m.run_to_halt();
    assert_eq!((registers.gpr[1], registers.gpr[2]), (4, 8));
}

#[test]
fn translations_that_another_flushes_are_forgotten() {
    let page = DATA + 0x1000;
    for pages in [Some(&[page][..]), None] {
        let mut m = Machine::new();
        m.put(DATA + 0x1000, 1u64);
        m.put(DATA + 0x2000, 2u64);
        m.code(CODE, |a| {
            a.mov(rcx, qword_ptr(page)).unwrap();
            a.hlt().unwrap();
            a.mov(rdx, qword_ptr(page)).unwrap();
            a.hlt().unwrap();
        });
        m.run_to_halt();
        m.put(Machine::entry_address(page), DATA + 0x2000 | PRESENT | WRITE);
        m.vm.flush_translations(0, 1, pages);
        let registers = m.run_to_halt();
        assert_eq!((registers.gpr[1], registers.gpr[2]), (1, 2), "{pages:x?}");
    }
}

#[test]
fn cr3_write_forgets_translations() {
    let mut m = Machine::new();
    m.put(DATA + 0x2000, 2u64);
    m.code(CODE, |a| {
        a.mov(rcx, qword_ptr(DATA + 0x1000)).unwrap();
        a.mov(rax, DATA + 0x2000 | PRESENT | WRITE).unwrap();
        a.mov(qword_ptr(Machine::entry_address(DATA + 0x1000)), rax).unwrap();
        a.mov(rax, cr3).unwrap();
        a.mov(cr3, rax).unwrap();
        a.mov(rdx, qword_ptr(DATA + 0x1000)).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(m.run_to_halt().gpr[2], 2);
}

#[test]
fn protected_page_exits_with_the_address_and_goes_on_when_opened() {
    let mut m = Machine::new();
    m.code(CODE, |a| {
        a.mov(dword_ptr(DATA + 0x10), 1).unwrap();
        a.mov(dword_ptr(DATA + 0x14), 2).unwrap();
        a.hlt().unwrap();
    });
    m.vm.protect(DATA, 0x1000, Protection::READ | Protection::EXECUTE).unwrap();
    assert_eq!(m.run(), Exit::Protection { gpa: DATA + 0x10, access: Access::Write });
    assert_eq!(m.registers().rip, CODE);
    m.vm.protect(DATA, 0x1000, Protection::all()).unwrap();
    m.run_to_halt();
    assert_eq!(m.get::<u64>(DATA + 0x10), 0x2_0000_0001);
}

#[test]
fn protection_outside_ram_or_of_part_of_a_page_is_refused() {
    let m = Machine::new();
    assert!(m.vm.protect(MEMORY, 0x1000, Protection::READ).is_err());
    assert!(m.vm.protect(0x1000, 0x800, Protection::READ).is_err());
    assert!(m.vm.protect(0x1800, 0x1000, Protection::READ).is_err());
    assert!(m.vm.protect(u64::MAX - 0xfff, 0x1000, Protection::READ).is_err());
}

#[test]
fn pae_paging_translates_outside_long_mode() {
    let mut m = Machine::new();
    // PDPT with one entry to the page directory that long mode uses.
    m.put(DATA + 0x4000, (TABLES + 0x2000) | PRESENT);
    m.put(DATA + 0x2000, 0xabcdu64);
    m.map(DATA, DATA + 0x2000 | PRESENT);
    m.code_of(32, CODE, |a| {
        a.mov(eax, dword_ptr(DATA as u32)).unwrap();
        a.hlt().unwrap();
    });
    let mut registers = Machine::start();
    registers.efer = 0;
    registers.cr3 = DATA + 0x4000;
    registers.pdpte[0] = (TABLES + 0x2000) | PRESENT;
    registers.cs.access = 0xc09b;
    registers.cs.selector = KERNEL_CODE_32;
    m.vcpu.set_registers(&registers, RegisterMask::all()).unwrap();
    assert_eq!(m.run(), Exit::Halt);
    assert_eq!(m.registers().gpr[0], 0xabcd);
}
