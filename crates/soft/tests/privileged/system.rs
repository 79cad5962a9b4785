//! Control registers, MSRs, ports, CPUID and the instructions around them.

use iced_x86::code_asm::*;
use vmm::{Entry, Exit};

use super::machine::*;

/// Runs code at level 0 and expects this exception at its last instruction.
fn expect(code: impl FnOnce(&mut CodeAssembler), vector: u8, error: Option<u64>) {
    let mut m = Machine::new();
    m.code(CODE, code);
    let exception = m.run_to_exception();
    assert_eq!((exception.vector, exception.error), (vector, error), "{exception:x?}");
}

#[test]
fn paging_without_protection_and_reserved_control_bits_are_refused() {
    expect(
        |a| {
            a.mov(rax, 0x8000_0010u64).unwrap();
            a.mov(cr0, rax).unwrap();
        },
        13,
        Some(0),
    );
    expect(
        |a| {
            a.mov(rax, 0x6e0u64 | 1 << 31).unwrap();
            a.mov(cr4, rax).unwrap();
        },
        13,
        Some(0),
    );
    // PAE cannot be switched off in long mode.
    expect(
        |a| {
            a.mov(rax, 0x6c0u64).unwrap();
            a.mov(cr4, rax).unwrap();
        },
        13,
        Some(0),
    );
}

#[test]
fn unknown_msr_is_refused_and_a_dialects_msr_reaches_the_bus() {
    expect(
        |a| {
            a.mov(ecx, 0x1234_5678).unwrap();
            a.rdmsr().unwrap();
        },
        13,
        Some(0),
    );
    expect(
        |a| {
            a.mov(ecx, 0x4000_0000).unwrap();
            a.wrmsr().unwrap();
        },
        13,
        Some(0),
    );
    let mut m = Machine::new();
    m.code(CODE, |a| {
        a.mov(ecx, 0x4000_0000).unwrap();
        a.rdmsr().unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(m.run_to_halt().gpr[0], 0x1234);
}

#[test]
fn non_canonical_base_in_an_msr_is_refused() {
    for index in [0xc000_0100u32, 0xc000_0101, 0xc000_0102, 0xc000_0082] {
        expect(
            |a| {
                a.mov(ecx, index).unwrap();
                a.mov(edx, 0x0080_0000).unwrap();
                a.wrmsr().unwrap();
            },
            13,
            Some(0),
        );
    }
}

#[test]
fn swapgs_and_segment_bases_reach_memory_operands() {
    let mut m = Machine::new();
    m.put(DATA + 0x1010, 0x77u64);
    m.code(CODE, |a| {
        a.mov(ecx, 0xc000_0102u32).unwrap();
        a.mov(eax, DATA as u32 + 0x1000).unwrap();
        a.xor(edx, edx).unwrap();
        a.wrmsr().unwrap();
        a.swapgs().unwrap();
        a.mov(rbx, qword_ptr(0x10).gs()).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(m.run_to_halt().gpr[3], 0x77);
}

#[test]
fn declined_port_read_exits_and_completes_with_the_answer() {
    let mut m = Machine::new();
    m.code(CODE, |a| {
        a.mov(edx, 0x123).unwrap();
        a.in_(al, dx).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(m.run(), Exit::PortIn { port: 0x123, size: 1, string: false });
    assert_eq!(m.vcpu.run(&m.bus, Entry { port_in: Some(0x42), ..Entry::default() }).unwrap(), Exit::Halt);
    assert_eq!(m.registers().gpr[0] & 0xff, 0x42);
}

#[test]
fn declined_port_write_exits_after_the_instruction() {
    let mut m = Machine::new();
    m.code(CODE, |a| {
        a.mov(eax, 0x99).unwrap();
        a.out(0x70, al).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(m.run(), Exit::PortOut { port: 0x70, size: 1, value: 0x99, string: false });
    assert_eq!(m.registers().rip, CODE + 7);
    assert_eq!(m.run(), Exit::Halt);
}

#[test]
fn user_code_needs_the_io_bitmap_for_ports() {
    let mut m = Machine::new();
    m.open_to_user();
    m.code(CODE, |a| a.out(0x80, al).unwrap());
    m.set(&Machine::start_user());
    let exception = m.run_to_exception();
    assert_eq!((exception.vector, exception.error), (13, Some(0)));
    // Bitmap at 0x68 with port 0x80 open; the limit covers it and its closing byte.
    m.put(TSS + 0x66, 0x68u16);
    m.put(TSS + 0x68 + 0x10, 0xfeu8);
    m.code(CODE, |a| {
        a.out(0x80, al).unwrap();
        a.ud2().unwrap();
    });
    let mut registers = Machine::start_user();
    registers.tr.limit = 0x68 + 0x20;
    m.set(&registers);
    assert_eq!(m.run_to_exception().vector, 6);
    assert_eq!(m.bus.outs.load(std::sync::atomic::Ordering::Relaxed), 1);
}

#[test]
fn hypercall_reaches_the_bus_and_a_declined_one_is_undefined() {
    let mut m = Machine::new();
    m.code(CODE, |a| {
        a.mov(eax, 5).unwrap();
        a.vmcall().unwrap();
        a.vmmcall().unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(m.run_to_halt().gpr[0], 7);
    expect(
        |a| {
            a.mov(eax, 0x1000).unwrap();
            a.vmcall().unwrap();
        },
        6,
        None,
    );
}

#[test]
fn cpuid_promises_only_what_exists() {
    let mut m = Machine::new();
    m.code(CODE, |a| {
        a.mov(eax, 1).unwrap();
        a.cpuid().unwrap();
        a.hlt().unwrap();
    });
    let registers = m.run_to_halt();
    let (features_c, features_d) = (registers.gpr[1], registers.gpr[2]);
    for (bit, name) in [(0, "FPU"), (4, "TSC"), (5, "MSR"), (6, "PAE"), (8, "CX8"), (15, "CMOV"), (24, "FXSR"), (25, "SSE"), (26, "SSE2")] {
        assert_ne!(features_d & 1 << bit, 0, "{name}");
    }
    for (bit, name) in [(3, "MONITOR"), (5, "VMX"), (26, "XSAVE"), (28, "AVX")] {
        assert_eq!(features_c & 1 << bit, 0, "{name}");
    }
    // Without XSAVE its instructions do not exist.
    expect(
        |a| {
            a.xor(ecx, ecx).unwrap();
            a.xgetbv().unwrap();
        },
        6,
        None,
    );
}

#[test]
fn floating_point_with_ts_set_is_device_not_available() {
    let mut m = Machine::new();
    m.code(CODE, |a| {
        a.mov(rax, cr0).unwrap();
        a.or(rax, 8).unwrap();
        a.mov(cr0, rax).unwrap();
        a.pxor(xmm0, xmm0).unwrap();
    });
    let exception = m.run_to_exception();
    assert_eq!(exception.vector, 7);
}

#[test]
fn time_stamp_counter_advances_and_tsd_keeps_user_code_from_it() {
    let mut m = Machine::new();
    m.code(CODE, |a| {
        a.rdtsc().unwrap();
        a.mov(ebx, eax).unwrap();
        a.rdtsc().unwrap();
        a.hlt().unwrap();
    });
    let registers = m.run_to_halt();
    assert!(registers.gpr[0] as u32 >= registers.gpr[3] as u32);
    let mut m = Machine::new();
    m.open_to_user();
    m.code(CODE, |a| a.rdtsc().unwrap());
    let mut registers = Machine::start_user();
    registers.cr4 |= 4;
    m.set(&registers);
    assert_eq!(m.run_to_exception().vector, 13);
}

#[test]
fn compare_exchange_of_sixteen_bytes_wants_alignment() {
    expect(|a| a.cmpxchg16b(xmmword_ptr(DATA + 8)).unwrap(), 13, Some(0));
    let mut m = Machine::new();
    m.put(DATA, 1u64);
    m.put(DATA + 8, 2u64);
    m.code(CODE, |a| {
        a.mov(eax, 1).unwrap();
        a.mov(edx, 2).unwrap();
        a.mov(ebx, 3).unwrap();
        a.mov(ecx, 4).unwrap();
        a.lock().cmpxchg16b(xmmword_ptr(DATA)).unwrap();
        a.hlt().unwrap();
    });
    assert_ne!(m.run_to_halt().rflags & 0x40, 0);
    assert_eq!((m.get::<u64>(DATA), m.get::<u64>(DATA + 8)), (3, 4));
}
