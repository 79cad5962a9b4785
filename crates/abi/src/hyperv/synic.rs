//! Pages of the synthetic interrupt controller and of the clock: TLFS 6.0b, 11 and 12; Linux `include/asm-generic/hyperv-tlfs.h`.
//!
//! The page of messages has a slot for each of 16 interrupt sources, and so has the page of event flags.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes of a slot of either page.
pub const SLOT_SIZE: u64 = 256;
/// Event flags of an interrupt source.
pub const EVENT_FLAGS: u16 = 2048;

/// Head of a message in its slot; at most [`crate::hyperv::hypercall::MESSAGE_PAYLOAD`] bytes follow.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct MessageHeader {
    /// What it is; [`message::NONE`] for an empty slot.
    pub kind: U32,
    /// Bytes of payload.
    pub size: u8,
    /// [`message::PENDING`].
    pub flags: u8,
    /// Zero.
    pub reserved: [u8; 2],
    /// The sender: the port of the connection, or zero.
    pub sender: U64,
}
const _: () = assert!(size_of::<MessageHeader>() == 16);

/// Offset of [`MessageHeader::flags`].
pub const MESSAGE_FLAGS: u64 = 5;

/// Values of [`MessageHeader`].
pub mod message {
    /// There is none.
    pub const NONE: u32 = 0;
    /// A timer has expired: [`TimerExpired`](super::TimerExpired).
    pub const TIMER_EXPIRED: u32 = 0x8000_0010;
    /// More messages wait for the slot.
    pub const PENDING: u8 = 1;
}

/// Payload of [`message::TIMER_EXPIRED`]. Times are in 100 ns.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct TimerExpired {
    /// Which of the processor's timers.
    pub index: U32,
    /// Zero.
    pub reserved: U32,
    /// When it expired.
    pub expiration: U64,
    /// When the message was delivered.
    pub delivery: U64,
}
const _: () = assert!(size_of::<TimerExpired>() == 24);

/// Reference TSC page: 100 ns are `((TSC * scale) >> 64) + offset`. (TLFS 12.7.)
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ReferenceTsc {
    /// Changes when the others do; zero means that the MSR has to be asked.
    pub sequence: U32,
    /// Zero.
    pub reserved: U32,
    /// Fraction of 2^64.
    pub scale: U64,
    /// Added.
    pub offset: U64,
}
const _: () = assert!(size_of::<ReferenceTsc>() == 24);
