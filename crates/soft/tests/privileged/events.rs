//! Exceptions and interrupts: frames, stacks, priorities, shadows.

use iced_x86::code_asm::*;
use vm_memory::{Bytes, GuestAddress};
use vmm::exit::Access;
use vmm::memory::Protection;
use vmm::{Entry, Exit, Inject};

use super::machine::*;

#[test]
fn fault_frame_holds_the_instruction_and_trap_frame_the_next() {
    let mut m = Machine::new();
    m.code(CODE, |a| a.ud2().unwrap());
    let exception = m.run_to_exception();
    assert_eq!((exception.vector, exception.rip, exception.cs, exception.rsp), (6, CODE, KERNEL_CODE, STACK));
    let mut m = Machine::new();
    m.code(CODE, |a| a.int3().unwrap());
    let exception = m.run_to_exception();
    assert_eq!((exception.vector, exception.rip), (3, CODE + 1));
}

#[test]
fn stack_is_aligned_to_sixteen_before_a_frame() {
    let mut m = Machine::new();
    m.code(CODE, |a| {
        a.sub(rsp, 3).unwrap();
        a.ud2().unwrap();
    });
    let exception = m.run_to_exception();
    assert_eq!(exception.rsp, STACK - 3);
    assert_eq!(m.registers().gpr[4], (STACK - 3 & !15) - 40);
}

#[test]
fn interrupt_stack_table_is_used() {
    let mut m = Machine::new();
    m.gate(6, 0x8e, 1);
    m.code(CODE, |a| a.ud2().unwrap());
    m.run_to_exception();
    assert_eq!(m.registers().gpr[4], IST1 - 40);
}

#[test]
fn exception_in_user_code_changes_to_the_kernel_stack() {
    let mut m = Machine::new();
    m.open_to_user();
    m.code(CODE, |a| a.hlt().unwrap());
    m.set(&Machine::start_user());
    let exception = m.run_to_exception();
    assert_eq!((exception.vector, exception.error, exception.cs), (13, Some(0), USER_CODE));
    let registers = m.registers();
    assert_eq!(registers.gpr[4], KERNEL_STACK - 48);
    assert_eq!(registers.ss.selector & 3, 0);
}

#[test]
fn software_interrupt_through_a_gate_of_higher_privilege_is_refused() {
    let mut m = Machine::new();
    m.open_to_user();
    m.code(CODE, |a| a.int(0x40).unwrap());
    m.set(&Machine::start_user());
    let exception = m.run_to_exception();
    assert_eq!((exception.vector, exception.error), (13, Some(0x40 * 8 + 2)));
    let mut m = Machine::new();
    m.open_to_user();
    m.gate(0x40, 0xee, 0);
    m.code(CODE, |a| a.int(0x40).unwrap());
    m.set(&Machine::start_user());
    let exception = m.run_to_exception();
    assert_eq!((exception.vector, exception.rip), (0x40, CODE + 2));
}

#[test]
fn fault_during_delivery_becomes_a_double_fault() {
    let mut m = Machine::new();
    m.put(IDT + 14 * 16, 0u64);
    m.code(CODE, |a| {
        a.mov(rax, qword_ptr(DATA)).unwrap();
        a.hlt().unwrap();
    });
    m.map(DATA, 0);
    let exception = m.run_to_exception();
    assert_eq!((exception.vector, exception.error), (8, Some(0)));
}

#[test]
fn fault_without_any_handler_is_a_shutdown() {
    let mut m = Machine::new();
    m.code(CODE, |a| a.ud2().unwrap());
    let mut registers = Machine::start();
    registers.idtr.limit = 0;
    m.set(&registers);
    assert_eq!(m.run(), Exit::Shutdown);
}

#[test]
fn injected_interrupt_is_delivered_and_iret_returns() {
    let mut m = Machine::new();
    m.code(CODE, |a| {
        a.sti().unwrap();
        a.nop().unwrap();
        a.hlt().unwrap();
    });
    m.code(HANDLERS + 0x50 * 16, |a| {
        a.inc(rcx).unwrap();
        a.iretq().unwrap();
    });
    let mut registers = Machine::start();
    registers.rflags |= 0x200;
    m.set(&registers);
    let exit = m.vcpu.run(&m.bus, Entry { inject: Some(Inject::Interrupt(0x50)), ..Entry::default() }).unwrap();
    assert_eq!(exit, Exit::Halt);
    let registers = m.registers();
    assert_eq!((registers.gpr[1], registers.rip, registers.gpr[4]), (1, CODE + 3, STACK));
}

#[test]
fn sti_holds_interrupts_off_for_one_instruction() {
    let mut m = Machine::new();
    m.code(CODE, |a| {
        a.sti().unwrap();
        a.nop().unwrap();
        a.nop().unwrap();
        a.hlt().unwrap();
    });
    let exit = m.vcpu.run(&m.bus, Entry { interrupt_window: true, ..Entry::default() }).unwrap();
    assert_eq!(exit, Exit::InterruptWindow);
    assert_eq!(m.registers().rip, CODE + 2);
}

#[test]
fn mov_ss_holds_interrupts_off_for_one_instruction() {
    let mut m = Machine::new();
    m.code(CODE, |a| {
        a.mov(eax, u32::from(KERNEL_DATA)).unwrap();
        a.mov(ss, eax).unwrap();
        a.mov(rsp, STACK).unwrap();
        a.hlt().unwrap();
    });
    let mut registers = Machine::start();
    registers.rflags |= 0x200;
    m.set(&registers);
    for _ in 0..2 {
        m.vcpu.run(&m.bus, Entry { single_step: true, ..Entry::default() }).unwrap();
    }
    let exit = m.vcpu.run(&m.bus, Entry { interrupt_window: true, ..Entry::default() }).unwrap();
    assert_eq!(exit, Exit::InterruptWindow);
    assert_eq!(m.registers().rip, CODE + 5 + 2 + 10);
}

#[test]
fn halt_without_a_local_apic_leaves_with_rip_past_it() {
    let mut m = Machine::new();
    m.code(CODE, |a| a.hlt().unwrap());
    assert_eq!(m.run(), Exit::Halt);
    assert_eq!(m.registers().rip, CODE + 1);
}

#[test]
fn kick_ends_an_endless_loop_and_a_long_string_instruction() {
    let mut m = Machine::new();
    m.code(CODE, |a| {
        a.mov(rdi, DATA).unwrap();
        a.mov(rcx, 0x7fff_ffff_ffff_ffffu64).unwrap();
        a.std().unwrap();
        a.rep().lodsb().unwrap();
    });
    let mut registers = Machine::start();
    registers.gpr[6] = DATA + 0x7_0000;
    m.set(&registers);
    // The direction is down, so the string ends in a page fault long after the kick; without one it must still be cut up.
    m.vm.kick(0);
    assert_eq!(m.run(), Exit::Interrupted);
    let mut m = Machine::new();
    m.code(CODE, |a| {
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.jmp(again).unwrap();
    });
    m.run_until_kicked();
}

#[test]
fn alignment_is_checked_at_level_three_when_asked() {
    let mut m = Machine::new();
    m.open_to_user();
    m.code(CODE, |a| {
        a.mov(rbx, qword_ptr(rdi + 8)).unwrap();
        a.pushfq().unwrap();
        a.or(dword_ptr(rsp), 0x4_0000).unwrap();
        a.popfq().unwrap();
        a.mov(rcx, qword_ptr(rdi + 7)).unwrap();
        a.mov(dword_ptr(rdi + 2), eax).unwrap();
    });
    let mut registers = Machine::start_user();
    registers.cr0 |= 1 << 18;
    registers.gpr[7] = DATA + 1;
    m.put(DATA + 8, 5u64);
    m.set(&registers);
    let exception = m.run_to_exception();
    assert_eq!((exception.vector, exception.error), (17, Some(0)), "the store of four bytes");
    assert_eq!(m.registers().gpr[1], 5, "eight bytes at a multiple of eight are aligned");
    assert_eq!(m.get::<u32>(DATA + 3), 0);
}

#[test]
fn interrupt_whose_frame_goes_to_a_protected_page_is_delivered_when_that_is_opened() {
    let mut m = Machine::new();
    m.code(CODE, |a| a.nop().unwrap());
    m.vm.protect(STACK - 0x1000, 0x1000, Protection::READ).unwrap();
    let mut registers = Machine::start();
    registers.rflags |= 0x200;
    m.set(&registers);
    let exit = m.vcpu.run(&m.bus, Entry { inject: Some(Inject::Interrupt(0x50)), ..Entry::default() }).unwrap();
    assert_eq!(exit, Exit::Protection { gpa: STACK - 8, access: Access::Write });
    assert_eq!(m.registers().rip, CODE, "nothing has changed");
    m.vm.protect(STACK - 0x1000, 0x1000, Protection::all()).unwrap();
    let exception = m.run_to_exception();
    assert_eq!((exception.vector, exception.rip), (0x50, CODE));
}

#[test]
fn wake_ends_a_halt_with_interrupts_off_and_one_that_has_not_begun() {
    let mut m = Machine::with(1, true, false);
    m.code(CODE, |a| {
        a.hlt().unwrap();
        a.out(0x80, al).unwrap();
        a.hlt().unwrap();
        a.out(0x82, al).unwrap();
    });
    m.vm.wake(0);
    let vm = m.vm.clone();
    let waker = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(50));
        vm.wake(0);
    });
    assert!(matches!(m.run(), Exit::PortOut { port: 0x82, .. }));
    assert_eq!(m.bus.outs.load(std::sync::atomic::Ordering::Relaxed), 1);
    waker.join().unwrap();
}

#[test]
fn machine_is_idle_while_its_processor_halts_and_not_while_it_runs() {
    let mut m = Machine::with(1, true, false);
    m.code(CODE, |a| {
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.cmp(byte_ptr(DATA), 0).unwrap();
        a.je(again).unwrap();
        a.hlt().unwrap();
        a.out(0x82, al).unwrap();
    });
    let (vm, memory) = (m.vm.clone(), m.memory.clone());
    let watcher = std::thread::spawn(move || {
        let wait_while = |idle| {
            while vm.is_idle() == idle {
                std::thread::yield_now();
            }
        };
        wait_while(true);
        memory.write_obj(1u8, GuestAddress(DATA)).unwrap();
        wait_while(false);
        vm.wake(0);
    });
    assert!(matches!(m.run(), Exit::PortOut { port: 0x82, .. }));
    watcher.join().unwrap();
}
