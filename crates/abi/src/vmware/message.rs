//! GuestRPC's transport: channels of messages over backdoor command [`super::backdoor::MESSAGE`].
//!
//! The high half of ECX holds the step; in answers it holds status bits, and the high half of EDX the channel or the kind of message.
//! (open-vm-tools `lib/include/guest_msg_def.h` and `lib/message/message.c`.)

/// Step: open a channel. EBX: protocol, with [`COOKIE`]. Answer: channel in the high half of EDX, cookie in ESI (high) and EDI (low).
pub const OPEN: u16 = 0;
/// Step: length in EBX of the message that the guest sends next.
pub const SENDSIZE: u16 = 1;
/// Step: four bytes of it in EBX.
pub const SENDPAYLOAD: u16 = 2;
/// Step: asks for a message; EBX of the answer is its length, the high half of EDX [`TYPE_SENDSIZE`].
pub const RECVSIZE: u16 = 3;
/// Step: asks for its next four bytes in EBX, the high half of EDX is [`TYPE_SENDPAYLOAD`]. EBX of the call is the status of the step before.
pub const RECVPAYLOAD: u16 = 4;
/// Step: the guest has the message. EBX of the call is the status of the step before.
pub const RECVSTATUS: u16 = 5;
/// Step: close the channel.
pub const CLOSE: u16 = 6;

/// Protocol of requests by the guest: `RPCI`.
pub const RPCI: u32 = 0x4943_5052;
/// Protocol of requests by the host: `TCLO`.
pub const TCLO: u32 = 0x4f4c_4354;
/// In the protocol of [`OPEN`]: the guest shows a cookie with every step.
pub const COOKIE: u32 = 0x8000_0000;

/// Answer to [`RECVSIZE`]: a length follows.
pub const TYPE_SENDSIZE: u16 = 1;
/// Answer to [`RECVPAYLOAD`]: bytes follow.
pub const TYPE_SENDPAYLOAD: u16 = 2;

/// Status bits.
pub mod status {
    /// Done.
    pub const SUCCESS: u16 = 1 << 0;
    /// A message waits for the guest.
    pub const DORECV: u16 = 1 << 1;
    /// The channel was closed.
    pub const CLOSED: u16 = 1 << 2;
    /// The host dropped the message before it could be sent.
    pub const UNSENT: u16 = 1 << 3;
    /// Start the message again.
    pub const CHECKPOINT: u16 = 1 << 4;
    /// The machine is powering off.
    pub const POWEROFF: u16 = 1 << 5;
    /// Too late.
    pub const TIMEOUT: u16 = 1 << 6;
    /// The payload may go by the high-bandwidth port.
    pub const HB: u16 = 1 << 7;
}

/// High-bandwidth command in the low half of EBX: payload of a message. In answers the high half of EBX holds status bits.
pub const HB_MESSAGE: u16 = 0;

/// Most channels that a machine has.
pub const MAX_CHANNELS: usize = 128;
/// Most bytes of a message by the guest.
pub const MAX_GUEST_MESSAGE: usize = 64 * 1024;
