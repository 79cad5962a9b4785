//! Packets of a channel: what the guest's bytes mean, and ours as bytes. See [`abi::hyperv::ring`].

use abi::hyperv::ring::{ALIGN, COMPLETION_REQUESTED, Descriptor, GpaDirect, GpaRange, TransferPages, TransferRange, kind};
use vmm::memory::PAGE_SIZE;
use zerocopy::little_endian::U64;
use zerocopy::{FromBytes, IntoBytes};

use super::range::GuestRange;
use super::ring::BrokenRing;

/// Room for one packet of the guest.
#[derive(Debug, Default)]
pub struct PacketBuf(pub(super) Vec<u8>);

/// A packet of the guest.
#[derive(Debug, Clone, Copy)]
pub struct Packet<'a> {
    /// What it is, and what comes with it.
    pub kind: Kind<'a>,
    /// The guest's number for it, or ours that it completes.
    pub transaction: u64,
    /// Whether the guest waits for [`Outgoing::completion`].
    pub wants_completion: bool,
    /// The payload, padded with up to 7 bytes.
    pub payload: &'a [u8],
}

/// Kinds of packets.
#[derive(Debug, Clone, Copy)]
pub enum Kind<'a> {
    /// The payload alone.
    InBand,
    /// Completes a packet of ours.
    Completion,
    /// With data in these pages.
    GpaDirect(GpaRanges<'a>),
    /// With data in a buffer that was agreed on.
    TransferPages {
        /// Which buffer.
        set_id: u16,
        /// Which bytes of it.
        ranges: &'a [TransferRange],
    },
}

/// The ranges of a GPA-direct packet.
#[derive(Debug, Clone, Copy)]
pub struct GpaRanges<'a> {
    count: u32,
    bytes: &'a [u8],
}

impl<'a> GpaRanges<'a> {
    /// How many ranges.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Each of them.
    pub fn iter(&self) -> impl Iterator<Item = GuestRange<'a>> {
        let mut bytes = self.bytes;
        (0..self.count).map_while(move |_| {
            let (range, rest) = take_range(bytes)?;
            bytes = rest;
            Some(range)
        })
    }
}

impl<'a> Packet<'a> {
    /// The packet in `bytes`, which are the descriptor and all that follows it.
    pub(super) fn parse(bytes: &'a [u8]) -> Result<Packet<'a>, BrokenRing> {
        let (descriptor, _) = Descriptor::ref_from_prefix(bytes).map_err(|_| BrokenRing::Packet)?;
        let (head, payload) = bytes.split_at_checked(usize::from(descriptor.data_offset8.get()) * ALIGN).ok_or(BrokenRing::Packet)?;
        let extra = head.get(size_of::<Descriptor>()..).ok_or(BrokenRing::Packet)?;
        let kind = match descriptor.kind.get() {
            kind::IN_BAND => Kind::InBand,
            kind::COMPLETION => Kind::Completion,
            kind::GPA_DIRECT => Kind::GpaDirect(gpa_direct(extra)?),
            kind::TRANSFER_PAGES => {
                let (header, ranges) = TransferPages::ref_from_prefix(extra).map_err(|_| BrokenRing::Packet)?;
                let count = header.range_count.get() as usize;
                let (ranges, _) = <[TransferRange]>::ref_from_prefix_with_elems(ranges, count).map_err(|_| BrokenRing::Packet)?;
                Kind::TransferPages { set_id: header.set_id.get(), ranges }
            }
            _ => return Err(BrokenRing::Packet),
        };
        let wants_completion = descriptor.flags.get() & COMPLETION_REQUESTED != 0;
        Ok(Packet { kind, transaction: descriptor.transaction.get(), wants_completion, payload })
    }
}

fn gpa_direct(extra: &[u8]) -> Result<GpaRanges<'_>, BrokenRing> {
    let (header, bytes) = GpaDirect::ref_from_prefix(extra).map_err(|_| BrokenRing::Packet)?;
    let count = header.range_count.get();
    let mut rest = bytes;
    // Each range takes bytes, so this ends with them.
    for _ in 0..count {
        rest = take_range(rest).ok_or(BrokenRing::Packet)?.1;
    }
    Ok(GpaRanges { count, bytes })
}

fn take_range(bytes: &[u8]) -> Option<(GuestRange<'_>, &[u8])> {
    let (range, rest) = GpaRange::ref_from_prefix(bytes).ok()?;
    let (len, offset) = (range.byte_count.get(), range.byte_offset.get());
    let pages = (u64::from(len) + u64::from(offset)).div_ceil(PAGE_SIZE);
    let (pfns, rest) = <[U64]>::ref_from_prefix_with_elems(rest, usize::try_from(pages).ok()?).ok()?;
    Some((GuestRange::new(len, offset, pfns)?, rest))
}

/// A packet for the guest.
#[derive(Debug, Clone, Copy)]
pub struct Outgoing<'a> {
    transaction: u64,
    wants_completion: bool,
    payload: &'a [u8],
    form: Form<'a>,
}

#[derive(Debug, Clone, Copy)]
enum Form<'a> {
    InBand,
    Completion,
    TransferPages { set_id: u16, ranges: &'a [TransferRange] },
}

impl<'a> Outgoing<'a> {
    /// Answers the guest's packet `transaction`.
    pub fn completion(transaction: u64, payload: &'a [u8]) -> Outgoing<'a> {
        Outgoing { transaction, wants_completion: false, payload, form: Form::Completion }
    }

    /// A payload alone, without a completion.
    pub fn in_band(transaction: u64, payload: &'a [u8]) -> Outgoing<'a> {
        Outgoing { transaction, wants_completion: false, payload, form: Form::InBand }
    }

    /// Data in `ranges` of the buffer `set_id`, which the guest gives back by completing `transaction`.
    pub fn transfer_pages(transaction: u64, set_id: u16, ranges: &'a [TransferRange], payload: &'a [u8]) -> Outgoing<'a> {
        Outgoing { transaction, wants_completion: true, payload, form: Form::TransferPages { set_id, ranges } }
    }

    /// Everything up to the trailer.
    pub(super) fn write_to(&self, bytes: &mut Vec<u8>) {
        bytes.clear();
        bytes.resize(size_of::<Descriptor>(), 0);
        let kind = match self.form {
            Form::InBand => kind::IN_BAND,
            Form::Completion => kind::COMPLETION,
            Form::TransferPages { set_id, ranges } => {
                let header =
                    TransferPages { set_id: set_id.into(), sender_owns_set: 0, reserved: 0, range_count: (ranges.len() as u32).into() };
                bytes.extend_from_slice(header.as_bytes());
                bytes.extend_from_slice(ranges.as_bytes());
                kind::TRANSFER_PAGES
            }
        };
        let data_offset = bytes.len();
        bytes.extend_from_slice(self.payload);
        bytes.resize(bytes.len().next_multiple_of(ALIGN), 0);
        let eighths = |len: usize| u16::try_from(len / ALIGN).unwrap_or(u16::MAX);
        let descriptor = Descriptor {
            kind: kind.into(),
            data_offset8: eighths(data_offset).into(),
            total_length8: eighths(bytes.len()).into(),
            flags: if self.wants_completion { COMPLETION_REQUESTED } else { 0 }.into(),
            transaction: self.transaction.into(),
        };
        if let Some(place) = bytes.get_mut(..size_of::<Descriptor>()) {
            place.copy_from_slice(descriptor.as_bytes());
        }
    }
}
