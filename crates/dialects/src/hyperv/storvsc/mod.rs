//! Storvsc: a SCSI controller for the guest's storage driver.
//!
//! ```text
//!   channel --packet--> protocol.rs --command, pages--> units.rs --> scsi/ --> disk
//!           <--the same packet, completed--
//! ```
//!
//! Data moves between the guest's pages and the disk directly. Commands are done one after another, on whichever channel they come; several channels
//! are for the guest's processors. Disks come and go while the machine runs ([`Units`]). Specification: Linux `drivers/scsi/storvsc_drv.c`, as
//! [`abi::hyperv::storvsc`] has it.

mod protocol;
pub mod scsi;
#[cfg(test)]
mod tests;
mod units;

use std::sync::Arc;

use abi::hyperv::storvsc::{OLD_PACKET_SIZE, PACKET_SIZE, Packet as Words, Srb, operation, status};
use abi::hyperv::vmbus::{Guid, USER_BYTES, guid};
use zerocopy::IntoBytes;

use self::protocol::{MAX_SUBCHANNELS, State, Wish};
pub use self::units::{Full, UnitState, Units};
use super::vmbus::{BrokenRing, Channel, Device, Kind, Offer, Outgoing, Packet, PacketBuf};
use crate::disk::GuestSlice;
use crate::network::Worked;

/// Packets done on one channel before another has its turn.
const BUDGET: usize = 64;

/// A controller.
pub struct Storvsc {
    instance: Guid,
    units: Arc<Units>,
    state: State,
    channels: Vec<Queue>,
    packet: PacketBuf,
    /// The guest is to be told that disks have come or gone.
    rescan: bool,
}

/// A channel, and an answer that found no room in it.
struct Queue {
    channel: Channel,
    unsent: Option<Answer>,
}

/// The answer to a packet.
struct Answer {
    transaction: u64,
    words: Words,
    length: usize,
}

impl Storvsc {
    /// A controller of this name with these units.
    pub fn new(instance: Guid, units: Arc<Units>) -> Storvsc {
        Storvsc { instance, units, state: State::default(), channels: Vec::new(), packet: PacketBuf::default(), rescan: false }
    }

    /// Tells the guest that disks have come or gone, once it can hear that.
    fn tell_changes(&mut self) -> Result<(), BrokenRing> {
        self.rescan |= self.units.take_changed();
        let Some(first) = self.channels.iter_mut().find(|queue| queue.channel.index() == 0) else { return Ok(()) };
        if self.rescan && self.state == State::Ready {
            let words = words(operation::ENUMERATE_BUS, status::SUCCESS);
            self.rescan = !first.channel.send(&Outgoing::in_band(0, words.as_bytes()))?;
        }
        Ok(())
    }
}

impl Device for Storvsc {
    type Error = BrokenRing;

    fn offer(&self) -> Offer {
        Offer { class: guid::SCSI, instance: self.instance, flags: 0, user_defined: [0; USER_BYTES], sub_channels: MAX_SUBCHANNELS }
    }

    fn opened(&mut self, channel: Channel) {
        if channel.index() == 0 {
            (self.state, self.rescan) = (State::default(), false);
            self.units.begin();
        }
        self.channels.push(Queue { channel, unsent: None });
    }

    fn closed(&mut self, index: u16) {
        self.channels.retain(|queue| queue.channel.index() != index);
    }

    fn work(&mut self) -> Result<Worked, BrokenRing> {
        self.tell_changes()?;
        let mut worked = Worked::default();
        for queue in &mut self.channels {
            worked.more |= queue.pump(&mut self.state, &self.units, &mut self.packet)?;
        }
        Ok(worked)
    }
}

impl Queue {
    /// Does what waits on the channel, as far as there is room for answers; `true` when there may be more.
    fn pump(&mut self, state: &mut State, units: &Units, buffer: &mut PacketBuf) -> Result<bool, BrokenRing> {
        for _ in 0..BUDGET {
            if let Some(answer) = self.unsent.take() {
                let bytes = answer.words.as_bytes().get(..answer.length).unwrap_or_default();
                if !self.channel.send(&Outgoing::completion(answer.transaction, bytes))? {
                    self.unsent = Some(answer);
                    return Ok(false);
                }
            }
            let memory = self.channel.memory().clone();
            let Some(packet) = self.channel.receive(buffer)? else { return Ok(false) };
            let wants_completion = packet.wants_completion;
            let (answer, subchannels) = answer(state, units, &memory, &packet);
            if let Some(count) = subchannels {
                self.channel.offer_sub_channels(count);
            }
            self.unsent = wants_completion.then_some(answer);
        }
        Ok(true)
    }
}

/// Does what a packet asks for; its answer, and how many subchannels are to be offered.
fn answer(state: &mut State, units: &Units, memory: &vmm::GuestMemory, packet: &Packet<'_>) -> (Answer, Option<u16>) {
    let mut subchannels = None;
    let mut words = protocol::parse(packet.payload).unwrap_or_else(|| words(0, status::SUCCESS));
    let status = match state.on(&mut words) {
        Wish::Answer(status) => status,
        Wish::Subchannels(count) => {
            subchannels = Some(count);
            status::SUCCESS
        }
        Wish::Command => {
            let srb: &mut Srb = zerocopy::transmute_mut!(&mut words.body);
            match slices(memory, packet, srb.transfer_length.get()) {
                Some(slices) => units.execute(srb, &slices),
                None => units::refuse(srb),
            }
            status::SUCCESS
        }
    };
    words.operation = operation::COMPLETE_IO.into();
    words.status = status.into();
    // As long as the guest's: drivers drop what is shorter, and those of old versions what is longer.
    let length = packet.payload.len().clamp(OLD_PACKET_SIZE, PACKET_SIZE);
    (Answer { transaction: packet.transaction, words, length }, subchannels)
}

/// The first `length` bytes of a packet's pages; `None` when they are not memory.
fn slices<'m>(memory: &'m vmm::GuestMemory, packet: &Packet<'_>, length: u32) -> Option<Vec<GuestSlice<'m>>> {
    let Kind::GpaDirect(ranges) = packet.kind else { return Some(Vec::new()) };
    let mut slices = Vec::new();
    let mut left = length;
    for range in ranges.iter() {
        let part = range.part(0, range.len().min(left))?;
        left -= part.len();
        slices.extend(part.slices(memory).ok()?);
    }
    Some(slices)
}

/// A packet of ours.
fn words(operation: u32, status: u32) -> Words {
    Words { operation: operation.into(), flags: 0.into(), status: status.into(), body: [0; _] }
}
