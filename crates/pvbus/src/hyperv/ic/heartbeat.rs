//! Heartbeat: the host counts, the guest counts one further.

use alloc::vec::Vec;

use abi::hyperv::ic::{self, Version, kind, status, version};
use zerocopy::FromBytes;

use super::{Answer, Request, Service};
use crate::driver::Event;

/// The component.
pub(in super::super) struct Heartbeat;

impl Service for Heartbeat {
    const NAME: &'static str = "heartbeat";
    const KIND: u16 = kind::HEARTBEAT;
    const VERSIONS: &'static [Version] = &version::HEARTBEAT;

    fn answer(&mut self, request: Request<'_>, _events: &mut Vec<Event>) -> Answer {
        // Older bodies have the count alone; of programs nothing is said.
        let Ok((sequence, _)) = zerocopy::little_endian::U64::mut_from_prefix(request.body) else { return Answer::Now(status::FAIL) };
        const { assert!(core::mem::offset_of!(ic::Heartbeat, sequence) == 0) };
        *sequence = sequence.get().wrapping_add(1).into();
        Answer::Now(status::OK)
    }
}
