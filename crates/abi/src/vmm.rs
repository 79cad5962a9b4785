//! vmm(4): command words and structures of `/dev/vmm`, OpenBSD/amd64 up to 7.9.
//!
//! After `sys/dev/vmm/vmm.h` and `sys/arch/amd64/include/vmmvar.h`. Later releases use some of the same words with other
//! layouts; these here are the ones of a single `/dev/vmm` with numbered machines. MPROTECT_EPT has the number that SHAREMEM took over
//! later; the words differ by size and direction. Structures are little-endian bytes with explicit padding, so that they can be cast from
//! and to an ioctl's argument.

use core::mem::{offset_of, size_of};

use zerocopy::little_endian::{I32, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// `_IOW` and `_IOWR` of `sys/ioccom.h`: direction, parameter length, group, number.
const IN: u32 = 0x8000_0000;
const INOUT: u32 = 0xc000_0000;
const GROUP: u32 = (b'V' as u32) << 8;

const fn word(direction: u32, size: usize, number: u32) -> u32 {
    direction | (size as u32) << 16 | GROUP | number
}

/// VMM_IOC_CREATE.
pub const CREATE: u32 = word(INOUT, size_of::<CreateParams>(), 1);
/// VMM_IOC_RUN.
pub const RUN: u32 = word(INOUT, size_of::<RunParams>(), 2);
/// VMM_IOC_INFO.
pub const INFO: u32 = word(INOUT, size_of::<InfoParams>(), 3);
/// VMM_IOC_TERM.
pub const TERM: u32 = word(IN, size_of::<TerminateParams>(), 4);
/// VMM_IOC_RESETCPU.
pub const RESETCPU: u32 = word(IN, size_of::<ResetCpuParams>(), 5);
/// VMM_IOC_INTR.
pub const INTR: u32 = word(IN, size_of::<IntrParams>(), 6);
/// VMM_IOC_READREGS.
pub const READREGS: u32 = word(INOUT, size_of::<RegistersParams>(), 7);
/// VMM_IOC_WRITEREGS.
pub const WRITEREGS: u32 = word(IN, size_of::<RegistersParams>(), 8);
/// VMM_IOC_READVMPARAMS.
pub const READVMPARAMS: u32 = word(INOUT, size_of::<VmParams>(), 9);
/// VMM_IOC_WRITEVMPARAMS.
pub const WRITEVMPARAMS: u32 = word(IN, size_of::<VmParams>(), 10);
/// VMM_IOC_SHAREMEM.
pub const SHAREMEM: u32 = word(INOUT, size_of::<ShareMemParams>(), 11);
/// VMM_IOC_MPROTECT_EPT, until 2023.
pub const MPROTECT_EPT: u32 = word(IN, size_of::<MprotectEptParams>(), 11);

const _: () = {
    assert!(CREATE == 0xca60_5601);
    assert!(RUN == 0xc028_5602);
    assert!(INFO == 0xc018_5603);
    assert!(TERM == 0x8004_5604);
    assert!(RESETCPU == 0x8240_5605);
    assert!(INTR == 0x800c_5606);
    assert!(READREGS == 0xc248_5607);
    assert!(WRITEREGS == 0x8248_5608);
    assert!(READVMPARAMS == 0xc020_5609);
    assert!(WRITEVMPARAMS == 0x8020_560a);
    assert!(SHAREMEM == 0xc290_560b);
    assert!(MPROTECT_EPT == 0x8020_560b);
};

/// VMM_MAX_MEM_RANGES.
pub const MAX_MEM_RANGES: usize = 16;
/// VMM_MAX_NAME_LEN, with the final NUL.
pub const MAX_NAME_LEN: usize = 64;
/// VMM_MAX_VCPUS_PER_VM, and the length of arrays with one entry for each.
pub const MAX_VCPUS_PER_VM: usize = 64;
/// VMM_MAX_VCPUS, of all machines together.
pub const MAX_VCPUS: usize = 512;
/// VMM_MAX_VM_MEM_SIZE: guest physical addresses end here.
pub const MAX_VM_MEM_SIZE: u64 = 128 << 30;

/// VM_MEM_RAM.
pub const MEM_RAM: i32 = 0;
/// VM_MEM_RESERVED: memory, but not for the guest's general use (firmware).
pub const MEM_RESERVED: i32 = 1;
/// VM_MEM_MMIO: no memory; accesses exit.
pub const MEM_MMIO: i32 = 2;

/// VM_RWREGS_ALL: every bit a register mask can have.
pub const RWREGS_ALL: u64 = 0x1f;
/// VM_RWVMPARAMS_PVCLOCK_SYSTEM_GPA.
pub const VMPARAMS_PVCLOCK_GPA: u32 = 1;
/// VM_RWVMPARAMS_PVCLOCK_VERSION.
pub const VMPARAMS_PVCLOCK_VERSION: u32 = 2;
/// VM_RWVMPARAMS_ALL.
pub const VMPARAMS_ALL: u32 = 3;

/// VCPU_INJECT_NONE.
pub const INJECT_NONE: u8 = 0;
/// VCPU_INJECT_INTR.
pub const INJECT_INTR: u8 = 1;
/// VCPU_INJECT_EX.
pub const INJECT_EXCEPTION: u8 = 2;
/// VCPU_INJECT_NMI.
pub const INJECT_NMI: u8 = 3;

/// VCPU_STATE_STOPPED.
pub const VCPU_STOPPED: u8 = 0;
/// VCPU_STATE_RUNNING.
pub const VCPU_RUNNING: u8 = 1;
/// VCPU_STATE_REQTERM.
pub const VCPU_REQTERM: u8 = 2;
/// VCPU_STATE_TERMINATED.
pub const VCPU_TERMINATED: u8 = 3;
/// VCPU_STATE_UNKNOWN.
pub const VCPU_UNKNOWN: u8 = 4;

/// VM_EXIT_TERMINATED.
pub const EXIT_TERMINATED: u16 = 0xfffe;
/// VM_EXIT_NONE: to deliver an interrupt, or because of INTR.
pub const EXIT_NONE: u16 = 0xffff;

/// VEI_DIR_OUT.
pub const DIRECTION_OUT: u8 = 0;
/// VEI_DIR_IN.
pub const DIRECTION_IN: u8 = 1;
/// VEE_FAULT_MMIO_ASSIST: an access to an MMIO range, which userland carries out.
pub const FAULT_MMIO_ASSIST: u8 = 2;
/// VEE_FAULT_PROTECT: an access that the protection forbids.
pub const FAULT_PROTECT: u8 = 3;
/// VEE_BYTES_VALID.
pub const EPT_BYTES_VALID: u8 = 2;

/// VMX basic exit reasons that a vmm(4) client sees (Intel SDM vol. 3 appendix C).
pub mod vmx {
    /// Triple fault.
    pub const TRIPLE_FAULT: u16 = 2;
    /// Interrupt window.
    pub const INT_WINDOW: u16 = 7;
    /// HLT.
    pub const HLT: u16 = 12;
    /// I/O instruction.
    pub const IO: u16 = 30;
    /// Monitor trap flag: one instruction executed.
    pub const MONITOR_TRAP: u16 = 37;
    /// EPT violation.
    pub const EPT_VIOLATION: u16 = 48;
}

/// SVM exit codes that a vmm(4) client sees (AMD APM vol. 2 appendix C).
pub mod svm {
    /// #DB, which a single step ends in.
    pub const EXCEPTION_DB: u16 = 0x41;
    /// Virtual interrupt: the window is open.
    pub const VINTR: u16 = 0x64;
    /// HLT.
    pub const HLT: u16 = 0x78;
    /// I/O instruction.
    pub const IOIO: u16 = 0x7b;
    /// Shutdown (triple fault).
    pub const SHUTDOWN: u16 = 0x7f;
    /// Nested page fault.
    pub const NPF: u16 = 0x400;
}

macro_rules! wire {
    ($(#[$doc:meta])* $name:ident, $size:literal { $($(#[$field_doc:meta])* $offset:literal $field:ident: $type:ty,)* }) => {
        $(#[$doc])*
        #[repr(C)]
        #[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
        pub struct $name {
            $($(#[$field_doc])* pub $field: $type,)*
        }
        const _: () = {
            assert!(size_of::<$name>() == $size);
            $(assert!(offset_of!($name, $field) == $offset);)*
        };
        impl $name {
            /// All bytes zero.
            pub fn zeroed() -> $name {
                <$name as zerocopy::FromZeros>::new_zeroed()
            }
        }
    };
}

wire! {
    /// `struct vm_mem_range`.
    MemRange, 32 {
        /// Guest physical address.
        0 gpa: U64,
        /// Address in the caller's address space.
        8 va: U64,
        /// Bytes.
        16 size: U64,
        /// [`MEM_RAM`] and so on.
        24 kind: I32,
        /// Padding.
        28 _pad: [u8; 4],
    }
}

wire! {
    /// `struct vm_create_params`.
    CreateParams, 2656 {
        /// Ranges in use.
        0 nmemranges: U64,
        /// Processors.
        8 ncpus: U64,
        /// The ranges; `va` is filled in.
        16 memranges: [MemRange; MAX_MEM_RANGES],
        /// Name, NUL terminated.
        528 name: [u8; MAX_NAME_LEN],
        /// AMD SEV wanted.
        592 sev: I32,
        /// AMD SEV-ES wanted.
        596 seves: I32,
        /// Out: number of the machine.
        600 id: U32,
        /// Out: position of SEV's C bit.
        604 poscbit: U32,
        /// Out: address space identifiers.
        608 asid: [U32; MAX_VCPUS],
    }
}

wire! {
    /// `struct vm_info_params`.
    InfoParams, 24 {
        /// Bytes of the buffer; out: bytes needed, when it was too small.
        0 size: U64,
        /// Out: machines.
        8 count: U64,
        /// Address of the buffer, an array of [`InfoResult`].
        16 buffer: U64,
    }
}

wire! {
    /// `struct vm_info_result`.
    InfoResult, 160 {
        /// Bytes of guest memory.
        0 memory: U64,
        /// Bytes of it that are resident.
        8 resident: U64,
        /// Processors.
        16 ncpus: U64,
        /// State of each processor.
        24 vcpu_state: [u8; MAX_VCPUS_PER_VM],
        /// Process that made the machine.
        88 creator: I32,
        /// Number of the machine.
        92 id: U32,
        /// Name, NUL terminated.
        96 name: [u8; MAX_NAME_LEN],
    }
}

wire! {
    /// `struct vm_terminate_params`.
    TerminateParams, 4 {
        /// Number of the machine.
        0 vm_id: U32,
    }
}

wire! {
    /// `struct vcpu_segment_info`.
    SegmentInfo, 24 {
        /// Selector.
        0 selector: U16,
        /// Padding.
        2 _pad: [u8; 2],
        /// Limit in bytes.
        4 limit: U32,
        /// Access rights in VMX's layout.
        8 access: U32,
        /// Padding.
        12 _pad2: [u8; 4],
        /// Linear base.
        16 base: U64,
    }
}

wire! {
    /// `struct vcpu_reg_state`.
    RegState, 568 {
        /// RAX RCX RDX RBX RSP RBP RSI RDI R8 to R15 RIP RFLAGS.
        0 gpr: [U64; 18],
        /// CR0 CR2 CR3 CR4 CR8 XCR0 PDPTE0 to PDPTE3.
        144 cr: [U64; 10],
        /// EFER STAR LSTAR CSTAR SFMASK KGSBASE MISC_ENABLE.
        224 msr: [U64; 7],
        /// DR0 to DR3, DR6, DR7.
        280 dr: [U64; 6],
        /// ES CS SS DS FS GS LDTR TR.
        328 segment: [SegmentInfo; 8],
        /// GDTR.
        520 gdtr: SegmentInfo,
        /// IDTR.
        544 idtr: SegmentInfo,
    }
}

wire! {
    /// `struct vm_resetcpu_params`.
    ResetCpuParams, 576 {
        /// Number of the machine.
        0 vm_id: U32,
        /// Number of the processor.
        4 vcpu_id: U32,
        /// Initial state.
        8 state: RegState,
    }
}

wire! {
    /// `struct vm_intr_params`.
    IntrParams, 12 {
        /// Number of the machine.
        0 vm_id: U32,
        /// Number of the processor.
        4 vcpu_id: U32,
        /// Nonzero: an interrupt waits.
        8 intr: U16,
        /// Padding.
        10 _pad: [u8; 2],
    }
}

wire! {
    /// `struct vm_rwregs_params`.
    RegistersParams, 584 {
        /// Number of the machine.
        0 vm_id: U32,
        /// Number of the processor.
        4 vcpu_id: U32,
        /// Groups of registers.
        8 mask: U64,
        /// The registers.
        16 state: RegState,
    }
}

wire! {
    /// `struct vm_rwvmparams_params`.
    VmParams, 32 {
        /// Number of the machine.
        0 vm_id: U32,
        /// Number of the processor.
        4 vcpu_id: U32,
        /// Which parameters.
        8 mask: U32,
        /// Padding.
        12 _pad: [u8; 4],
        /// pvclock's guest physical address.
        16 pvclock_gpa: U64,
        /// pvclock's version.
        24 pvclock_version: U32,
        /// Padding.
        28 _pad2: [u8; 4],
    }
}

wire! {
    /// `struct vm_sharemem_params`.
    ShareMemParams, 656 {
        /// Number of the machine.
        0 vm_id: U32,
        /// Padding.
        4 _pad: [u8; 4],
        /// Ranges in use.
        8 nmemranges: U64,
        /// The ranges, equal to those of CREATE.
        16 memranges: [MemRange; MAX_MEM_RANGES],
        /// Out: where each is in the caller's address space.
        528 va: [U64; MAX_MEM_RANGES],
    }
}

wire! {
    /// `struct vm_mprotect_ept_params`.
    MprotectEptParams, 32 {
        /// Number of the machine.
        0 vm_id: U32,
        /// Number of the processor.
        4 vcpu_id: U32,
        /// First guest physical address.
        8 sgpa: U64,
        /// Bytes.
        16 size: U64,
        /// PROT_READ 1, PROT_WRITE 2, PROT_EXEC 4.
        24 prot: I32,
        /// Padding.
        28 _pad: [u8; 4],
    }
}

wire! {
    /// `struct vcpu_inject_event`.
    InjectEvent, 12 {
        /// Vector.
        0 vector: u8,
        /// Padding.
        1 _pad: [u8; 3],
        /// Error code, for the exceptions that have one.
        4 errcode: U32,
        /// [`INJECT_NONE`] and so on.
        8 kind: u8,
        /// Padding.
        9 _pad2: [u8; 3],
    }
}

wire! {
    /// `struct vm_run_params`.
    RunParams, 40 {
        /// Number of the machine.
        0 vm_id: U32,
        /// Number of the processor.
        4 vcpu_id: U32,
        /// Event to deliver on entry.
        8 inject: InjectEvent,
        /// Nonzero: exit when the guest can take an interrupt.
        20 intr_pending: u8,
        /// Padding.
        21 _pad: [u8; 3],
        /// Address of the caller's [`VmExit`].
        24 exit: U64,
        /// Out: raw exit reason.
        32 exit_reason: U16,
        /// Out: nonzero when the guest can take an interrupt.
        34 irqready: u8,
        /// Padding.
        35 _pad2: [u8; 5],
    }
}

wire! {
    /// `struct vm_exit_inout`.
    ExitInOut, 16 {
        /// Bytes.
        0 size: u8,
        /// [`DIRECTION_OUT`] or [`DIRECTION_IN`].
        1 dir: u8,
        /// REP prefix.
        2 rep: u8,
        /// String instruction.
        3 string: u8,
        /// Operand encoding.
        4 encoding: u8,
        /// Padding.
        5 _pad: u8,
        /// Port.
        6 port: U16,
        /// What was written, or the answer.
        8 data: U32,
        /// Length of the instruction.
        12 insn_len: u8,
        /// Padding.
        13 _pad2: [u8; 3],
    }
}

wire! {
    /// `struct vm_exit_eptviolation`.
    ExitEpt, 18 {
        /// [`FAULT_MMIO_ASSIST`] or [`FAULT_PROTECT`].
        0 fault_type: u8,
        /// [`EPT_BYTES_VALID`].
        1 info: u8,
        /// Bytes in `insn_bytes`.
        2 insn_len: u8,
        /// The instruction.
        3 insn_bytes: [u8; 15],
    }
}

wire! {
    /// `struct vm_exit`: the union is given as its bytes.
    VmExit, 600 {
        /// [`ExitInOut`] or [`ExitEpt`] at the beginning.
        0 record: [u8; 24],
        /// Registers at the exit.
        24 state: RegState,
        /// Privilege level.
        592 cpl: I32,
        /// Padding.
        596 _pad: [u8; 4],
    }
}
