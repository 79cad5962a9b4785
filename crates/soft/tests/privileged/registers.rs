//! Control, debug and model-specific registers, local descriptor tables, and what reads them.

use iced_x86::code_asm::*;
use vmm::{Exit, Segment};

use super::machine::*;

const PCIDE: u32 = 1 << 17;

/// Runs code that has to end in an exception with this vector and error code.
fn refused(code: impl FnOnce(&mut CodeAssembler), vector: u8, error: Option<u64>) {
    let mut m = Machine::new();
    m.code(CODE, code);
    let exception = m.run_to_exception();
    assert_eq!((exception.vector, exception.error), (vector, error));
}

#[test]
fn process_context_identifiers_need_a_clear_low_cr3_and_hold_paging_on() {
    let with_pcide = |a: &mut CodeAssembler| {
        a.mov(rax, cr4).unwrap();
        a.or(eax, PCIDE as i32).unwrap();
        a.mov(cr4, rax).unwrap();
    };
    let mut m = Machine::new();
    m.code(CODE, with_pcide);
    let mut registers = Machine::start();
    registers.cr3 |= 8;
    m.set(&registers);
    assert_eq!(m.run_to_exception().vector, 13, "CR3 has a PCID already");
    let mut m = Machine::new();
    m.code(CODE, |a| {
        with_pcide(a);
        // Bit 63 keeps translations and is not stored.
        a.mov(rax, TABLES | 5 | 1 << 63).unwrap();
        a.mov(cr3, rax).unwrap();
        a.mov(rbx, cr3).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(m.run_to_halt().gpr[3], TABLES | 5);
    refused(
        |a| {
            a.mov(rax, TABLES | 1 << 63).unwrap();
            a.mov(cr3, rax).unwrap();
        },
        13,
        Some(0),
    );
}

#[test]
fn invpcid_refuses_unknown_kinds_and_reserved_bits() {
    for (kind, pcid) in [(4, 0), (0, 0x1000), (1, 1)] {
        let mut m = Machine::new();
        m.put(DATA, pcid);
        m.put(DATA + 8, 0u64);
        m.code(CODE, |a| {
            a.mov(eax, kind).unwrap();
            a.invpcid(rax, xmmword_ptr(DATA)).unwrap();
        });
        assert_eq!(m.run_to_exception().vector, 13, "kind {kind}, PCID {pcid:#x} with CR4.PCIDE clear");
    }
}

#[test]
fn paging_cannot_be_left_from_64_bit_code_and_lme_not_be_changed_under_it() {
    refused(
        |a| {
            a.mov(eax, 0x33).unwrap();
            a.mov(cr0, rax).unwrap();
        },
        13,
        Some(0),
    );
    refused(
        |a| {
            a.mov(ecx, 0xc000_0080u32).unwrap();
            a.rdmsr().unwrap();
            a.and(eax, !0x100).unwrap();
            a.wrmsr().unwrap();
        },
        13,
        Some(0),
    );
}

#[test]
fn lmsw_sets_protection_but_cannot_clear_it() {
    let mut m = Machine::new();
    m.code(CODE, |a| {
        a.mov(ax, 0xcu32 as i32).unwrap();
        a.lmsw(ax).unwrap();
        a.smsw(ebx).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(m.run_to_halt().gpr[3] & 0xf, 0xd);
}

#[test]
fn descriptor_table_registers_are_stored_as_they_were_loaded() {
    let mut m = Machine::new();
    m.put(DATA, 0x7ffu16);
    m.put(DATA + 2, 0xffff_8000_1234_5678u64);
    m.code(CODE, |a| {
        a.lidt(tbyte_ptr(DATA)).unwrap();
        a.sidt(tbyte_ptr(DATA + 16)).unwrap();
        a.sgdt(tbyte_ptr(DATA + 32)).unwrap();
        a.hlt().unwrap();
    });
    let registers = m.run_to_halt();
    assert_eq!((registers.idtr.limit, registers.idtr.base), (0x7ff, 0xffff_8000_1234_5678));
    assert_eq!((m.get::<u16>(DATA + 16), m.get::<u64>(DATA + 18)), (0x7ff, 0xffff_8000_1234_5678));
    assert_eq!((m.get::<u16>(DATA + 32), m.get::<u64>(DATA + 34)), (0x7f, GDT));
    let mut m = Machine::new();
    m.put(DATA + 2, 0x8000_0000_0000u64);
    m.code(CODE, |a| a.lgdt(tbyte_ptr(DATA)).unwrap());
    assert_eq!(m.run_to_exception().vector, 13, "the base is not canonical");
}

#[test]
fn local_descriptors_load_and_end_with_their_table() {
    let mut m = Machine::new();
    m.put(GDT + u64::from(SPARE), 15 | DATA << 16 | 0x82 << 40);
    m.put(GDT + u64::from(SPARE) + 8, 0u64);
    m.put(DATA + 8, 0x00cf_9212_3456_ffffu64);
    m.code(CODE, |a| {
        a.mov(eax, u32::from(SPARE)).unwrap();
        a.lldt(ax).unwrap();
        a.sldt(ebx).unwrap();
        a.mov(eax, 0xc).unwrap();
        a.mov(fs, eax).unwrap();
        a.mov(eax, 0x14).unwrap();
        a.mov(fs, eax).unwrap();
    });
    let exception = m.run_to_exception();
    assert_eq!((exception.vector, exception.error), (13, Some(0x14)));
    let registers = m.registers();
    assert_eq!((registers.gpr[3], registers.fs.selector, registers.fs.base), (SPARE.into(), 0xc, 0x12_3456));
    assert_eq!(m.get::<u8>(DATA + 13), 0x93, "accessed");
}

#[test]
fn null_stack_segment_is_fine_in_64_bit_code_below_level_three_only() {
    let mut m = Machine::new();
    m.code(CODE, |a| {
        a.xor(eax, eax).unwrap();
        a.mov(ss, eax).unwrap();
        a.push(rax).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(m.run_to_halt().ss.selector, 0);
    m.open_to_user();
    m.code(CODE, |a| {
        a.mov(eax, 3).unwrap();
        a.mov(ss, eax).unwrap();
    });
    m.set(&Machine::start_user());
    let exception = m.run_to_exception();
    assert_eq!((exception.vector, exception.error), (13, Some(0)));
}

#[test]
fn extended_state_and_monitor_instructions_are_undefined() {
    for bytes in [
        &[0x0f, 0x01, 0xd0][..],   // XGETBV
        &[0x0f, 0x01, 0xd1],       // XSETBV
        &[0x0f, 0x01, 0xc8],       // MONITOR
        &[0x0f, 0x01, 0xc9],       // MWAIT
        &[0x0f, 0x01, 0xca],       // CLAC
        &[0x0f, 0x01, 0xcb],       // STAC
        &[0x0f, 0x01, 0xc2],       // VMLAUNCH
        &[0x0f, 0x01, 0xd8],       // VMRUN
        &[0x0f, 0xaa],             // RSM
        &[0x0f, 0xae, 0x27],       // XSAVE
        &[0xf3, 0x0f, 0xc7, 0xf8], // RDPID
    ] {
        refused(|a| a.db(bytes).unwrap(), 6, None);
    }
}

#[test]
fn time_stamp_adjustment_follows_writes_to_the_counter() {
    let mut m = Machine::with(1, false, true);
    assert_eq!(m.vcpu.msr(0x3b).unwrap(), 0);
    m.vcpu.set_msr(0x10, 1_000_000).unwrap();
    assert_eq!(m.vcpu.msr(0x3b).unwrap(), 1_000_000 - (m.vcpu.msr(0x10).unwrap() - 1_000_000));
    m.vcpu.set_msr(0x3b, 0).unwrap();
    assert!(m.vcpu.msr(0x10).unwrap() < 1_000_000);
}

#[test]
fn memory_type_registers_take_valid_types_only() {
    let mut m = Machine::new();
    assert_eq!(m.vcpu.msr(0xfe).unwrap() & 0xff, 8);
    for (index, good, bad) in [
        (0x277, 0x0007_0406_0007_0406, 2),
        (0x2ff, 0xc06, 0xc02),
        (0x200, 0x1_0000_0006, 0x1_0000_0003),
        (0x201, 0x3f_ff00_0800, 0x1_0000_0000_0800 << 2),
        (0x250, 0x0606_0606_0606_0606, 0x0606_0606_0606_0602),
    ] {
        m.vcpu.set_msr(index, good).unwrap();
        assert!(m.vcpu.set_msr(index, bad).is_err(), "{index:#x}");
        assert_eq!(m.vcpu.msr(index).unwrap(), good);
    }
}

#[test]
fn random_numbers_come_with_carry_and_repeat_only_in_the_deterministic_mode() {
    let number = |deterministic| {
        let mut m = Machine::with(1, false, deterministic);
        m.code(CODE, |a| {
            a.rdrand(rax).unwrap();
            a.setc(bl).unwrap();
            a.rdseed(rcx).unwrap();
            a.hlt().unwrap();
        });
        let registers = m.run_to_halt();
        assert_eq!(registers.gpr[3] & 1, 1);
        (registers.gpr[0], registers.gpr[1])
    };
    assert_eq!(number(true), number(true));
    assert_ne!(number(false), number(false));
}

#[test]
fn breakpoint_on_a_port_traps_after_the_access() {
    let mut m = Machine::new();
    m.code(CODE, |a| {
        a.out(0x80, al).unwrap();
        a.nop().unwrap();
        a.hlt().unwrap();
    });
    let mut registers = Machine::start();
    registers.cr4 |= 8;
    registers.dr[2] = 0x80;
    registers.dr7 = 0x400 | 1 << 5 | 0b10 << 24;
    m.set(&registers);
    let exception = m.run_to_exception();
    assert_eq!((exception.vector, exception.rip, m.registers().dr6 & 0xf), (1, CODE + 2, 4));
}

#[test]
fn far_return_to_level_three_and_to_a_null_stack_follow_the_rules() {
    let mut m = Machine::new();
    m.open_to_user();
    m.gate(0x40, 0xee, 0);
    m.code(CODE, |a| {
        for word in [USER_DATA.into(), STACK as i32, USER_CODE.into(), CODE as i32 + 0x800] {
            a.push(word).unwrap();
        }
        a.db(&[0x48, 0xcb]).unwrap();
    });
    m.code(CODE + 0x800, |a| a.int(0x40).unwrap());
    let exception = m.run_to_exception();
    assert_eq!((exception.vector, exception.cs, exception.rsp), (0x40, USER_CODE, STACK));
    let mut m = Machine::new();
    m.code(CODE, |a| {
        for word in [0, STACK as i32, USER_CODE.into(), CODE as i32] {
            a.push(word).unwrap();
        }
        a.db(&[0x48, 0xcb]).unwrap();
    });
    let exception = m.run_to_exception();
    assert_eq!((exception.vector, exception.error), (13, Some(0)));
}

#[test]
fn sixteen_bit_protected_code_runs_with_its_own_stack_size() {
    let mut m = Machine::new();
    m.code_of(16, CODE, |a| {
        a.mov(ax, 0x1234).unwrap();
        a.push(ax).unwrap();
        a.pop(bx).unwrap();
        a.hlt().unwrap();
    });
    let mut registers = Machine::start();
    registers.efer = 0;
    registers.cr0 = 0x33;
    registers.cr4 = 0;
    registers.cs = Segment { selector: KERNEL_CODE_32, limit: 0xffff, access: 0x9b, base: CODE };
    registers.ss = Segment { selector: KERNEL_DATA, limit: 0xffff, access: 0x93, base: DATA };
    registers.rip = 0;
    registers.gpr[4] = 0xabcd_0002;
    m.set(&registers);
    assert_eq!(m.run(), Exit::Halt);
    let after = m.registers();
    assert_eq!((after.gpr[3] as u16, after.gpr[4], m.get::<u16>(DATA)), (0x1234, 0xabcd_0002, 0x1234));
}
