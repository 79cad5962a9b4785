//! Shutdown: the host asks for power off or reboot. The answer says that the guest will do it, not that it has been done.

use alloc::vec::Vec;

use abi::hyperv::ic::{self, Version, kind, shutdown, status, version};
use zerocopy::FromBytes;

use super::{Answer, Request, Service};
use crate::detect::Kind;
use crate::driver::Event;

/// The component.
pub(in super::super) struct Shutdown;

impl Service for Shutdown {
    const NAME: &'static str = "shutdown";
    const KIND: u16 = kind::SHUTDOWN;
    const VERSIONS: &'static [Version] = &version::SHUTDOWN;

    fn answer(&mut self, request: Request<'_>, events: &mut Vec<Event>) -> Answer {
        let Ok((wish, _)) = ic::Shutdown::ref_from_prefix(request.body) else { return Answer::Now(status::FAIL) };
        events.push(match wish.flags.get() & !shutdown::FORCE {
            shutdown::POWER_OFF => Event::Shutdown(Kind::HyperV),
            shutdown::REBOOT => Event::Reboot(Kind::HyperV),
            _ => return Answer::Now(status::FAIL),
        });
        Answer::Now(status::OK)
    }
}
