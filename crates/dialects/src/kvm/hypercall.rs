//! Hypercalls: number in RAX, arguments in RBX, RCX, RDX and RSI, answer in RAX (Linux `Documentation/virt/kvm/x86/hypercalls.rst`).
//!
//! Outside 64-bit mode all of them are 32 bits wide, and so is the answer. Only ring 0 may call.

use abi::apic::{ICR_LOGICAL, MSI_ADDRESS_BASE, MSI_DESTINATION_SHIFT, delivery};
use abi::kvm::{self as words, ClockPairing};
use vm_memory::{Bytes, GuestAddress};
use vmm::registers::{RAX, RBX, RCX, RDX, RSI};
use vmm::{GuestMemory, Hypercall, VcpuId};
use zerocopy::IntoBytes;

use super::clock::PvClock;
use crate::Processors;

/// ICR bits 19:18, destination shorthand: not for a list of destinations.
const ICR_SHORTHAND: u64 = 3 << 18;
/// Highest APIC id that a message of 8 bits reaches.
const MAX_APIC_ID: u64 = 254;

/// What hypercalls work on.
pub(super) struct Surroundings<'a> {
    pub(super) memory: &'a GuestMemory,
    pub(super) clock: &'a PvClock,
    /// `None` before the machine has any.
    pub(super) processors: Option<&'a dyn Processors>,
    /// How many there are; their APIC ids are their numbers.
    pub(super) vcpus: usize,
}

impl Surroundings<'_> {
    /// Carries the call out and leaves the answer in RAX.
    pub(super) fn answer(&self, call: &mut Hypercall) {
        let width = if call.long_mode { u64::MAX } else { u64::from(u32::MAX) };
        let argument = |register: usize| call.gpr[register] & width;
        let answer =
            if call.cpl == 0 { self.dispatch(argument(RAX), [RBX, RCX, RDX, RSI].map(argument), call.long_mode) } else { words::EPERM };
        call.gpr[RAX] = answer.cast_unsigned() & width;
    }

    fn dispatch(&self, number: u64, arguments: [u64; 4], long_mode: bool) -> i64 {
        let [first, second, ..] = arguments;
        match number {
            // That the processor came here is all that is asked for.
            words::HC_VAPIC_POLL_IRQ => 0,
            words::HC_KICK_CPU => self.kick(second),
            words::HC_CLOCK_PAIRING => self.clock_pairing(first, second),
            words::HC_SEND_IPI => self.send_ipi(arguments, if long_mode { 64 } else { 32 }),
            words::HC_SCHED_YIELD => {
                // The host's scheduler knows better than we who of the others is to run.
                std::thread::yield_now();
                0
            }
            _ => words::ENOSYS,
        }
    }

    fn kick(&self, apic_id: u64) -> i64 {
        if let (Some(processors), Ok(id)) = (self.processors, VcpuId::try_from(apic_id)) {
            processors.wake(id);
        }
        0
    }

    fn clock_pairing(&self, gpa: u64, clock: u64) -> i64 {
        if clock != words::CLOCK_PAIRING_WALLCLOCK {
            return words::EOPNOTSUPP;
        }
        let (wall, tsc) = self.clock.pair();
        let pairing = ClockPairing {
            sec: wall.as_secs().cast_signed().into(),
            nsec: i64::from(wall.subsec_nanos()).into(),
            tsc: tsc.into(),
            flags: 0.into(),
            pad: [0.into(); 9],
        };
        match self.memory.write_slice(pairing.as_bytes(), GuestAddress(gpa)) {
            Ok(()) => 0,
            Err(_) => words::EFAULT,
        }
    }

    /// How many processors it was sent to. `half` is the number of bits in each half of the bitmap.
    fn send_ipi(&self, [low, high, first_id, icr]: [u64; 4], half: u32) -> i64 {
        let Some(processors) = self.processors else { return 0 };
        let mode = (icr >> 8 & 7) as u8;
        if icr & (u64::from(ICR_LOGICAL) | ICR_SHORTHAND) != 0 || !matches!(mode, delivery::FIXED | delivery::NMI) {
            return words::EINVAL;
        }
        let data = (icr & 0x7ff) as u32;
        let bitmap = u128::from(low) | u128::from(high) << half;
        let ids = (0..2 * u64::from(half)).filter(|bit| bitmap >> bit & 1 != 0).filter_map(|bit| first_id.checked_add(bit));
        let mut sent = 0;
        for id in ids.filter(|&id| id <= MAX_APIC_ID && id < self.vcpus as u64) {
            processors.signal_msi(MSI_ADDRESS_BASE | id << MSI_DESTINATION_SHIFT, data);
            sent += 1;
        }
        sent
    }
}
