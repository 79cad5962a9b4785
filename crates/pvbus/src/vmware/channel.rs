//! GuestRPC channels: messages of any length over the backdoor.
//!
//! ```text
//!   send      SENDSIZE n   SENDPAYLOAD ... (4 bytes each)  or one high-bandwidth OUT
//!   receive   RECVSIZE n   RECVPAYLOAD ... (4 bytes each)  or one high-bandwidth IN     RECVSTATUS
//! ```
//!
//! Every answer has status bits. `CHECKPOINT` means that the machine was saved or moved in the middle: the message begins again. After
//! that a channel may be gone for good (`CLOSED`); its owner opens another one. High bandwidth is used when the host offers it and the
//! system has it. A message from the host is received whole at the length it announces, up to [`MAX_REPLY`].
//!
//! open-vm-tools `lib/message/message.c`, `lib/include/guest_msg_def.h`.

use alloc::vec::Vec;
use core::cell::Cell;
use core::fmt;

use abi::vmware::backdoor::MESSAGE;
use abi::vmware::message::{
    CLOSE, COOKIE, HB_MESSAGE, MAX_GUEST_MESSAGE, OPEN, RECVPAYLOAD, RECVSIZE, RECVSTATUS, SENDPAYLOAD, SENDSIZE, TYPE_SENDPAYLOAD,
    TYPE_SENDSIZE, status,
};

use super::backdoor::{Answer, Backdoor};
use crate::hal::{HalError, Transfer};

/// Longest message taken from the host. The protocol has no limit; this is twice what our own host stores as one value.
pub const MAX_REPLY: usize = 2 << 20;
/// How often a message is begun again before the channel is given up.
const RESTARTS: usize = 8;
/// EBX of the high-bandwidth port: the command, and that what came before was fine.
const HB_COMMAND: u32 = (status::SUCCESS as u32) << 16 | HB_MESSAGE as u32;

/// An open channel. Closed when dropped.
pub struct Channel<'h> {
    backdoor: Backdoor<'h>,
    id: u16,
    /// High and low half; zero when the host gave none.
    cookie: (u32, u32),
    /// Whether high bandwidth is worth a try: some hosts offer it at every gate and have it at the port only.
    high: Cell<bool>,
}

impl<'h> Channel<'h> {
    /// Opens a channel for `protocol`, [`abi::vmware::message::RPCI`] or [`abi::vmware::message::TCLO`]: with a cookie, or without where the
    /// host has none.
    ///
    /// # Errors
    /// [`ChannelError::Refused`] when the host has no channel to give.
    pub fn open(backdoor: Backdoor<'h>, protocol: u32) -> Result<Channel<'h>, ChannelError> {
        let mut answer = backdoor.command(MESSAGE, OPEN, protocol | COOKIE)?;
        let mut cookie = (answer.esi, answer.edi);
        if status_of(&answer) & status::SUCCESS == 0 {
            answer = backdoor.command(MESSAGE, OPEN, protocol)?;
            cookie = (0, 0);
        }
        done(&answer)?;
        Ok(Channel { backdoor, id: high_half(answer.edx), cookie, high: Cell::new(true) })
    }

    /// Sends a message.
    ///
    /// # Errors
    /// [`ChannelError`].
    pub fn send(&self, message: &[u8]) -> Result<(), ChannelError> {
        let length = u32::try_from(message.len()).ok().filter(|_| message.len() <= MAX_GUEST_MESSAGE).ok_or(ChannelError::TooLong)?;
        restarting(|| {
            let answer = self.step(SENDSIZE, length)?;
            let offered = done(&answer)? & status::HB != 0;
            if message.is_empty() {
                return Ok(());
            }
            if offered && self.high(Transfer::Out(message))? {
                return Ok(());
            }
            for piece in message.chunks(4) {
                let mut word = [0; 4];
                for (to, from) in word.iter_mut().zip(piece) {
                    *to = *from;
                }
                done(&self.step(SENDPAYLOAD, u32::from_le_bytes(word))?)?;
            }
            Ok(())
        })
    }

    /// Receives a message; `None` when there is none.
    ///
    /// # Errors
    /// [`ChannelError`].
    pub fn receive(&self) -> Result<Option<Vec<u8>>, ChannelError> {
        restarting(|| {
            let answer = self.step(RECVSIZE, 0)?;
            let status = done(&answer)?;
            if status & status::DORECV == 0 {
                return Ok(None);
            }
            if high_half(answer.edx) != TYPE_SENDSIZE {
                return Err(ChannelError::Garbled);
            }
            let mut message = match buffer(answer.ebx) {
                Ok(message) => message,
                Err(error) => {
                    // The host may forget the message: it would announce it for ever.
                    self.step(RECVSTATUS, 0)?;
                    return Err(error);
                }
            };
            let high = status & status::HB != 0 && !message.is_empty() && self.high(Transfer::In(&mut message))?;
            if !high {
                for piece in message.chunks_mut(4) {
                    let answer = self.step(RECVPAYLOAD, u32::from(status::SUCCESS))?;
                    done(&answer)?;
                    if high_half(answer.edx) != TYPE_SENDPAYLOAD {
                        return Err(ChannelError::Garbled);
                    }
                    for (to, from) in piece.iter_mut().zip(answer.ebx.to_le_bytes()) {
                        *to = from;
                    }
                }
            }
            done(&self.step(RECVSTATUS, u32::from(status::SUCCESS))?)?;
            Ok(Some(message))
        })
    }

    /// The whole payload in one instruction; `false` when this system cannot. A message that the host refuses this way begins again without.
    fn high(&self, transfer: Transfer<'_>) -> Result<bool, ChannelError> {
        if !self.high.get() {
            return Ok(false);
        }
        match self.backdoor.high(HB_COMMAND, self.id, self.cookie, transfer) {
            // Here the status is in EBX.
            Ok(answer) => match check(high_half(answer.ebx)) {
                Ok(_) => Ok(true),
                Err(ChannelError::Refused) => {
                    self.high.set(false);
                    Err(ChannelError::Checkpoint)
                }
                Err(error) => Err(error),
            },
            Err(HalError::Unavailable) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    fn step(&self, step: u16, ebx: u32) -> Result<Answer, HalError> {
        self.backdoor.low(MESSAGE, step, [ebx, u32::from(self.id), self.cookie.0, self.cookie.1])
    }
}

impl Drop for Channel<'_> {
    fn drop(&mut self) {
        // A host that does not want to close it has closed it already.
        let _ = self.step(CLOSE, 0);
    }
}

/// Why a message did not get through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChannelError {
    /// The host closed the channel.
    Closed,
    /// The machine was saved or moved so often in the middle of the message that it was given up.
    Checkpoint,
    /// The machine is powering off.
    PoweringOff,
    /// The host refused a step.
    Refused,
    /// The message is longer than the protocol (towards the host) or we (from it) allow.
    TooLong,
    /// There is no memory for the message.
    NoMemory,
    /// The host's answer is none of the protocol's.
    Garbled,
    /// The backdoor cannot be reached.
    Hal(HalError),
}

impl ChannelError {
    /// What happened.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            ChannelError::Closed => "the host closed the channel",
            ChannelError::Checkpoint => "the machine is being saved or moved",
            ChannelError::PoweringOff => "the machine is powering off",
            ChannelError::Refused => "the host refused a step of the protocol",
            ChannelError::TooLong => "the message is too long",
            ChannelError::NoMemory => "no memory for the message",
            ChannelError::Garbled => "the host's answer is none of the protocol's",
            ChannelError::Hal(HalError::Unavailable) => "this system has no backdoor",
            ChannelError::Hal(HalError::Denied) => "no permission for the backdoor",
            ChannelError::Hal(HalError::Fault) => "the processor refused the backdoor",
        }
    }
}

impl fmt::Display for ChannelError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text())
    }
}

impl core::error::Error for ChannelError {}

impl From<HalError> for ChannelError {
    fn from(error: HalError) -> ChannelError {
        ChannelError::Hal(error)
    }
}

/// Does it again from the beginning while the host wants that, but not for ever.
fn restarting<T>(mut message: impl FnMut() -> Result<T, ChannelError>) -> Result<T, ChannelError> {
    for _ in 0..RESTARTS {
        match message() {
            Err(ChannelError::Checkpoint) => {}
            result => return result,
        }
    }
    Err(ChannelError::Checkpoint)
}

/// Room for a message from the host.
fn buffer(length: u32) -> Result<Vec<u8>, ChannelError> {
    let length = usize::try_from(length).ok().filter(|length| *length <= MAX_REPLY).ok_or(ChannelError::TooLong)?;
    let mut message = Vec::new();
    message.try_reserve_exact(length).map_err(|_| ChannelError::NoMemory)?;
    message.resize(length, 0);
    Ok(message)
}

/// The status of an answer, if it says that the step was done.
fn done(answer: &Answer) -> Result<u16, ChannelError> {
    check(status_of(answer))
}

fn check(status: u16) -> Result<u16, ChannelError> {
    match status {
        _ if status & status::SUCCESS != 0 => Ok(status),
        _ if status & status::CHECKPOINT != 0 => Err(ChannelError::Checkpoint),
        _ if status & status::CLOSED != 0 => Err(ChannelError::Closed),
        _ if status & status::POWEROFF != 0 => Err(ChannelError::PoweringOff),
        _ => Err(ChannelError::Refused),
    }
}

fn status_of(answer: &Answer) -> u16 {
    high_half(answer.ecx)
}

const fn high_half(register: u32) -> u16 {
    (register >> 16) as u16
}
