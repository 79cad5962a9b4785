//! Hypercalls: TLFS 6.0b, 3 and 7; Linux `include/asm-generic/hyperv-tlfs.h`.
//!
//! In 64-bit mode RCX holds the control word, RDX and R8 addresses of input and output, or, in a fast call, the input itself; the answer in RAX is
//! a [`Status`] and the number of elements done. In 32-bit mode the pairs are EDX:EAX, EBX:ECX, EDI:ESI, and the answer EDX:EAX.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Codes of calls.
pub mod code {
    /// Forget all translations of some processors: [`Flush`](super::Flush).
    pub const FLUSH_SPACE: u16 = 0x02;
    /// Forget some: [`Flush`](super::Flush), then for each element a range of pages.
    pub const FLUSH_LIST: u16 = 0x03;
    /// A spinlock takes long: u32 tries.
    pub const NOTIFY_LONG_SPIN_WAIT: u16 = 0x08;
    /// Interrupt processors: [`ClusterIpi`](super::ClusterIpi).
    pub const SEND_CLUSTER_IPI: u16 = 0x0b;
    /// As [`FLUSH_SPACE`], with a sparse set: [`FlushEx`](super::FlushEx).
    pub const FLUSH_SPACE_EX: u16 = 0x13;
    /// As [`FLUSH_LIST`], with a sparse set: [`FlushEx`](super::FlushEx), banks, then ranges of pages.
    pub const FLUSH_LIST_EX: u16 = 0x14;
    /// As [`SEND_CLUSTER_IPI`], with a sparse set: [`ClusterIpiEx`](super::ClusterIpiEx).
    pub const SEND_CLUSTER_IPI_EX: u16 = 0x15;
    /// Send a message to a connection: [`PostMessage`](super::PostMessage).
    pub const POST_MESSAGE: u16 = 0x5c;
    /// Set an event flag at a connection: [`SignalEvent`](super::SignalEvent).
    pub const SIGNAL_EVENT: u16 = 0x5d;
    /// Which extended calls there are: answers u64 bits.
    pub const EXT_QUERY_CAPABILITIES: u16 = 0x8001;
}

/// Fields of the control word.
pub mod control {
    /// The code.
    pub const CODE: u64 = 0xffff;
    /// The input is in registers.
    pub const FAST: u64 = 1 << 16;
    /// Where the length of the variable header is, in 8 bytes.
    pub const VARIABLE_SHIFT: u32 = 17;
    /// Its width.
    pub const VARIABLE_MASK: u64 = 0x3ff;
    /// Where the number of elements is.
    pub const COUNT_SHIFT: u32 = 32;
    /// Where the first element that is left to do is.
    pub const START_SHIFT: u32 = 48;
    /// Width of both.
    pub const REP_MASK: u64 = 0xfff;
    /// Bits that have to be zero, the nested hypervisor's call (bit 31) among them.
    pub const RESERVED: u64 = 0xf << 60 | 0xf << 44 | 0x1f << 27;
}

/// How a call ended (TLFS appendix B).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status(pub u16);

impl Status {
    /// Well.
    pub const SUCCESS: Status = Status(0);
    /// There is no such call.
    pub const INVALID_HYPERCALL_CODE: Status = Status(2);
    /// The control word does not fit the call.
    pub const INVALID_HYPERCALL_INPUT: Status = Status(3);
    /// Input or output is not on 8 bytes, crosses a page, or is not in memory.
    pub const INVALID_ALIGNMENT: Status = Status(4);
    /// A bad argument.
    pub const INVALID_PARAMETER: Status = Status(5);
    /// It is not the caller's to do.
    pub const ACCESS_DENIED: Status = Status(6);
    /// Not in this state.
    pub const OPERATION_DENIED: Status = Status(8);
    /// No memory left.
    pub const INSUFFICIENT_MEMORY: Status = Status(11);
    /// No such processor.
    pub const INVALID_VP_INDEX: Status = Status(14);
    /// No such port.
    pub const INVALID_PORT_ID: Status = Status(17);
    /// No such connection.
    pub const INVALID_CONNECTION_ID: Status = Status(18);
    /// Too much waits already.
    pub const INSUFFICIENT_BUFFERS: Status = Status(19);

    /// The same as a result.
    ///
    /// # Errors
    /// Every status but success.
    pub const fn into_result(self) -> Result<(), Status> {
        if self.0 == Status::SUCCESS.0 { Ok(()) } else { Err(self) }
    }
}

/// Bits of a connection's number.
pub const CONNECTION_MASK: u32 = 0x00ff_ffff;
/// Bytes of a message at most.
pub const MESSAGE_PAYLOAD: usize = 240;

/// Input of [`code::POST_MESSAGE`] before the payload.
#[derive(Debug, Default, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct PostMessage {
    /// To whom.
    pub connection: U32,
    /// Zero.
    pub reserved: U32,
    /// The kind of message; the highest bit is the hypervisor's own.
    pub kind: U32,
    /// Bytes of payload, at most [`MESSAGE_PAYLOAD`].
    pub size: U32,
}
const _: () = assert!(size_of::<PostMessage>() == 16);

/// Input of [`code::SIGNAL_EVENT`]: connection, flag in bits 47:32.
pub type SignalEvent = U64;

/// Input of [`code::FLUSH_SPACE`] and [`code::FLUSH_LIST`].
#[derive(Debug, Default, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Flush {
    /// CR3 of the address space.
    pub space: U64,
    /// [`flush`] flags.
    pub flags: U64,
    /// The processors.
    pub processors: U64,
}
const _: () = assert!(size_of::<Flush>() == 24);

/// Input of [`code::FLUSH_SPACE_EX`] and [`code::FLUSH_LIST_EX`] before the banks.
#[derive(Debug, Default, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FlushEx {
    /// CR3 of the address space.
    pub space: U64,
    /// [`flush`] flags.
    pub flags: U64,
    /// The processors.
    pub set: SparseSet,
}
const _: () = assert!(size_of::<FlushEx>() == 32);

/// Flags of flushes.
pub mod flush {
    /// On every processor, whatever the set says.
    pub const ALL_PROCESSORS: u64 = 1;
    /// Ranges are 2 MiB or 1 GiB pages where bit 11 of an element says so.
    pub const EXTENDED_RANGES: u64 = 8;
    /// Flags that there are, with "all address spaces" (bit 1) and "not the global ones" (bit 2), which only allow to flush less.
    pub const DEFINED: u64 = 0xf;
}

/// An element of a list of pages: page number in bits 63:12, further pages in bits 11:0.
pub mod range {
    /// Further pages.
    pub const MORE: u64 = 0xfff;
}

/// A set of processors in banks of 64 (`hv_vpset`); the banks that [`SparseSet::banks`] names follow.
#[derive(Debug, Default, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SparseSet {
    /// [`SPARSE`] or [`ALL`].
    pub format: U64,
    /// Bit by bank that follows.
    pub banks: U64,
}
const _: () = assert!(size_of::<SparseSet>() == 16);

/// [`SparseSet::format`]: the banks are the set.
pub const SPARSE: u64 = 0;
/// [`SparseSet::format`]: every processor.
pub const ALL: u64 = 1;

/// Input of [`code::SEND_CLUSTER_IPI`].
#[derive(Debug, Default, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ClusterIpi {
    /// Vector, 0x10 to 0xff.
    pub vector: U32,
    /// Virtual trust level in the first byte; zero is the caller's.
    pub trust_level: U32,
    /// The processors.
    pub processors: U64,
}
const _: () = assert!(size_of::<ClusterIpi>() == 16);

/// Input of [`code::SEND_CLUSTER_IPI_EX`] before the banks.
#[derive(Debug, Default, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ClusterIpiEx {
    /// Vector, 0x10 to 0xff.
    pub vector: U32,
    /// Virtual trust level in the first byte; zero is the caller's.
    pub trust_level: U32,
    /// The processors.
    pub set: SparseSet,
}
const _: () = assert!(size_of::<ClusterIpiEx>() == 24);

/// First vector that [`code::SEND_CLUSTER_IPI`] sends.
pub const FIRST_IPI_VECTOR: u32 = 0x10;
