//! Packets to a controller that wait for their completions, and the memory that data goes through.
//!
//! A packet has a number that is never used twice, so that a completion that nobody waits for is known as such, and is the end of the controller. Pieces of
//! memory are made as they are needed and stay; a command's is its own until it is ended, even when it was completed long before.

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;

use abi::hyperv::ring::kind;
use abi::hyperv::scsi::{CDB_SIZE, Sense, sense_key, status as scsi_status};
use abi::hyperv::storvsc::{BODY_SIZE, PACKET_SIZE, Packet, REQUEST_COMPLETION, SENSE_SIZE, Srb, direction, operation, srb_status};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::super::Platform;
use super::super::channel::{Channel, PAGE};
use super::super::ring::BrokenRing;
use super::Address;
use crate::block::DiskError;
use crate::hal::{Dma, HalError, Nanos, SECOND};

/// Pages of a piece of memory, and so of the largest command.
const PIECE_PAGES: usize = 16;
/// Bytes of the largest command.
pub(super) const PIECE: usize = PIECE_PAGES * PAGE;
/// Most pieces: 1 MiB.
const PIECES: usize = 16;
/// How long a completion is waited for. A controller that does not answer is not used any more.
const PATIENCE: Nanos = PATIENCE_SECONDS as Nanos * SECOND;
const PATIENCE_SECONDS: u32 = 30;
/// What an SRB says of its own size and of its room for sense data.
const SRB_BYTES: u16 = 52;
const SENSE_BYTES: u8 = 20;
const _: () = assert!(SRB_BYTES as usize == BODY_SIZE && SENSE_BYTES as usize == SENSE_SIZE);
/// How often a command is sent anew after the unit had something else to tell.
const ATTEMPTS: u32 = 4;
/// What the status of an SRB is without its flags.
const SRB_STATUS: u8 = 0x3f;

/// A SCSI command with its data.
#[derive(Debug, Clone, Copy)]
pub(super) struct Command<'a> {
    /// Logical unit.
    pub lun: u8,
    /// The command.
    pub cdb: [u8; CDB_SIZE],
    /// Bytes of the command.
    pub cdb_length: u8,
    /// Its data.
    pub data: Data<'a>,
}

/// Data of a command, at most [`PIECE`] bytes.
#[derive(Debug, Clone, Copy)]
pub(super) enum Data<'a> {
    None,
    Read(usize),
    Write(&'a [u8]),
}

pub(super) struct Queue<'h> {
    platform: Arc<Platform<'h>>,
    channel: Channel<'h>,
    address: Address,
    /// Pieces that no command has, and how many there are at all.
    free: Vec<Dma>,
    pieces: usize,
    /// By their numbers.
    open: BTreeMap<u64, Open>,
    next_id: u64,
    /// The host says that units came or went.
    has_changed: bool,
}

/// A packet that was begun.
struct Open {
    packet: Packet,
    data: Option<Dma>,
    length: usize,
    is_read: bool,
    is_sent: bool,
    attempts: u32,
    since: Nanos,
    answer: Option<Packet>,
}

impl<'h> Queue<'h> {
    pub fn new(platform: &Arc<Platform<'h>>, channel: Channel<'h>, address: Address) -> Queue<'h> {
        let (free, open) = (Vec::new(), BTreeMap::new());
        Queue { platform: Arc::clone(platform), channel, address, free, pieces: 0, open, next_id: 1, has_changed: false }
    }

    /// Begins an operation of the controller's; its number, or `None` when there is no room.
    pub fn operate(&mut self, operation: u32, body: &[u8]) -> Result<Option<u64>, DiskError> {
        let mut packet = Packet::new_zeroed();
        (packet.operation, packet.flags) = (operation.into(), REQUEST_COMPLETION.into());
        packet.body.iter_mut().zip(body).for_each(|(to, from)| *to = *from);
        self.push(packet, None, Data::None)
    }

    /// Begins a command; its number, or `None` when there is no room.
    pub fn begin(&mut self, command: Command<'_>) -> Result<Option<u64>, DiskError> {
        let (length, data_in) = match command.data {
            Data::None => (0, direction::NONE),
            Data::Read(length) => (length, direction::READ),
            Data::Write(bytes) => (bytes.len(), direction::WRITE),
        };
        let Some(piece) = (if length == 0 { Some(None) } else { self.piece()?.map(Some) }) else { return Ok(None) };
        if let (Some(piece), Data::Write(bytes)) = (&piece, command.data) {
            piece.write(0, bytes)?;
        }
        let mut srb = Srb::new_zeroed();
        srb.length = SRB_BYTES.into();
        (srb.path, srb.target, srb.lun) = (self.address.path, self.address.target, command.lun);
        (srb.cdb_length, srb.sense_length, srb.data_in) = (command.cdb_length, SENSE_BYTES, data_in);
        srb.transfer_length = u32::try_from(length).map_err(|_| DiskError::Range)?.into();
        srb.timeout = PATIENCE_SECONDS.into();
        srb.payload.iter_mut().zip(command.cdb).for_each(|(to, from)| *to = from);
        let mut packet = Packet::new_zeroed();
        (packet.operation, packet.flags) = (operation::EXECUTE_SRB.into(), REQUEST_COMPLETION.into());
        packet.body.copy_from_slice(srb.as_bytes());
        self.push(packet, piece, command.data)
    }

    /// Ends what was begun if the host has completed it: the completion, with what was read copied to `bytes` as far as it fits.
    pub fn end(&mut self, id: u64, bytes: &mut [u8]) -> Result<Option<Packet>, DiskError> {
        self.platform.synic.acknowledge()?;
        self.reap()?;
        let open = self.open.get(&id).ok_or(DiskError::Gone)?;
        let Some(answer) = open.answer else { return self.judge_patience().map(|()| None) };
        let Some(Open { data, length, is_read, .. }) = self.open.remove(&id) else { return Err(DiskError::Gone) };
        if let Some(data) = data {
            if is_read {
                let length = length.min(bytes.len());
                data.read(0, bytes.get_mut(..length).unwrap_or_default())?;
            }
            self.free.push(data);
        }
        Ok(Some(answer))
    }

    /// Takes note of completions; whether there are any that nobody has ended yet.
    pub fn has_answers(&mut self) -> Result<bool, DiskError> {
        self.platform.synic.acknowledge()?;
        self.reap()?;
        Ok(self.open.values().any(|open| open.answer.is_some()))
    }

    /// Whether the host has said that units came or went, since this was asked last.
    pub fn take_changed(&mut self) -> bool {
        core::mem::take(&mut self.has_changed)
    }

    /// The channel is closed: memory that the host does not use is the system's again.
    pub fn close(self) {
        self.free.into_iter().for_each(|piece| self.platform.hal.dma_free(piece));
    }

    fn push(&mut self, packet: Packet, data: Option<Dma>, about: Data<'_>) -> Result<Option<u64>, DiskError> {
        let (id, since) = (self.next_id, self.platform.hal.now());
        let (length, is_read) = match about {
            Data::None => (0, false),
            Data::Read(length) => (length, true),
            Data::Write(bytes) => (bytes.len(), false),
        };
        let mut open = Open { packet, data, length, is_read, is_sent: false, attempts: 1, since, answer: None };
        send(&mut self.channel, id, &mut open)?;
        if !open.is_sent {
            self.free.extend(open.data);
            return Ok(None);
        }
        self.next_id += 1;
        self.open.insert(id, open);
        Ok(Some(id))
    }

    /// A piece of memory, if there is one free or one more can be made.
    fn piece(&mut self) -> Result<Option<Dma>, HalError> {
        if let Some(piece) = self.free.pop() {
            return Ok(Some(piece));
        }
        if self.pieces == PIECES {
            return Ok(None);
        }
        match self.platform.hal.dma_alloc(PIECE_PAGES) {
            Ok(piece) => {
                self.pieces += 1;
                Ok(Some(piece))
            }
            // Those there are will do.
            Err(_) if self.pieces > 0 => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Takes note of what the host has sent.
    fn reap(&mut self) -> Result<(), DiskError> {
        while let Some(packet) = self.channel.receive()? {
            if packet.kind == kind::IN_BAND {
                let said = Packet::read_from_prefix(packet.payload()).map(|(said, _)| said.operation.get());
                self.has_changed |= matches!(said, Ok(operation::ENUMERATE_BUS | operation::REMOVE_DEVICE));
                continue;
            }
            let answer = Packet::ref_from_prefix(packet.payload()).map(|(answer, _)| *answer).map_err(|_| DiskError::Broken)?;
            const { assert!(size_of::<Packet>() == PACKET_SIZE) };
            let open = self.open.get_mut(&packet.transaction).filter(|open| open.answer.is_none() && open.is_sent);
            let open = open.ok_or(DiskError::Broken)?;
            if packet.kind != kind::COMPLETION || answer.operation.get() != operation::COMPLETE_IO {
                return Err(DiskError::Broken);
            }
            if open.packet.operation.get() == operation::EXECUTE_SRB {
                let srb = srb(&answer)?;
                if usize::try_from(srb.transfer_length.get()).map_or(true, |moved| moved > open.length) {
                    return Err(DiskError::Broken);
                }
                if sense(&srb).is_some_and(|sense| sense.key == sense_key::UNIT_ATTENTION) && open.attempts < ATTEMPTS {
                    (open.is_sent, open.attempts) = (false, open.attempts + 1);
                    continue;
                }
            }
            open.answer = Some(answer);
        }
        for (id, open) in self.open.iter_mut().filter(|(_, open)| !open.is_sent) {
            send(&mut self.channel, *id, open)?;
        }
        Ok(())
    }

    /// Whether the oldest packet without a completion is too old.
    fn judge_patience(&self) -> Result<(), DiskError> {
        let oldest = self.open.values().find(|open| open.answer.is_none());
        let is_over = oldest.is_some_and(|open| open.since.saturating_add(PATIENCE) <= self.platform.hal.now());
        if is_over { Err(DiskError::Timeout) } else { Ok(()) }
    }
}

fn send(channel: &mut Channel<'_>, id: u64, open: &mut Open) -> Result<(), BrokenRing> {
    open.is_sent = match &open.data {
        Some(data) => channel.request_about(id, data, open.length, open.packet.as_bytes())?,
        None => channel.request(id, open.packet.as_bytes())?,
    };
    Ok(())
}

/// What came of a command.
fn srb(answer: &Packet) -> Result<Srb, DiskError> {
    Srb::read_from_bytes(&answer.body).map_err(|_| DiskError::Broken)
}

fn sense(srb: &Srb) -> Option<Sense> {
    let is_there = srb.srb_status & srb_status::AUTOSENSE_VALID != 0;
    Sense::read_from_prefix(&srb.payload).ok().map(|(sense, _)| sense).filter(|_| is_there)
}

/// How a command ended: the bytes that were moved.
pub(super) fn verdict(answer: &Packet) -> Result<usize, DiskError> {
    let srb = srb(answer)?;
    match (srb.srb_status & SRB_STATUS, sense(&srb).map(|sense| sense.key)) {
        (srb_status::SUCCESS, _) if srb.scsi_status == scsi_status::GOOD => {}
        (srb_status::DATA_OVERRUN, _) => {}
        (srb_status::INVALID_LUN, _) => return Err(DiskError::Gone),
        (_, Some(sense_key::ILLEGAL_REQUEST)) => return Err(DiskError::Unsupported),
        (_, Some(sense_key::DATA_PROTECT)) => return Err(DiskError::ReadOnly),
        _ => return Err(DiskError::Failed),
    }
    usize::try_from(srb.transfer_length.get()).map_err(|_| DiskError::Broken)
}
