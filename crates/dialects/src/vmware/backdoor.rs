//! The backdoor's registers, and the commands that are answered at once from what the machine is and what time it is.
//!
//! Commands and their registers: open-vm-tools `lib/include/backdoor_def.h` and `lib/include/backdoor_types.h`; Linux
//! `arch/x86/kernel/cpu/vmware.c` for GETHZ and GET_VCPU_INFO; open-vm-tools `services/plugins/timeSync` for the time commands.
//! What a command does not answer with stays as it was: open-vm-tools gives all registers and looks at some.

use std::time::Duration;

use abi::vmware::backdoor as words;
use vmm::registers::{RAX, RBP, RBX, RCX, RDI, RDX, RSI};
use vmm::time::Clock;

use super::Platform;

/// EAX of GETHWVERSION: the virtual hardware of ESXi 7.0 (VMware KB 315655).
const HARDWARE_VERSION: u32 = 17;
/// Most microseconds by which the time told may lag: a second, as VMware's hosts say.
const MAX_LAG: u32 = 1_000_000;
const HZ_IN_MHZ: u64 = 1_000_000;
const BYTES_IN_MIB: u64 = 1 << 20;

/// The registers of a call, as much of them as the backdoor has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Frame {
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
    pub esi: u32,
    pub edi: u32,
    pub ebp: u32,
}

impl Frame {
    /// Takes the registers out of `gpr`.
    pub fn of(gpr: &[u64; 16]) -> Frame {
        let low = |register: usize| gpr[register] as u32;
        Frame { eax: low(RAX), ebx: low(RBX), ecx: low(RCX), edx: low(RDX), esi: low(RSI), edi: low(RDI), ebp: low(RBP) }
    }

    /// Writes into `gpr` those that are not as they were `before`. The upper halves of these become zero, as after any 32-bit operation.
    pub fn write_changes(&self, before: &Frame, gpr: &mut [u64; 16]) {
        let registers = [
            (RAX, self.eax, before.eax),
            (RBX, self.ebx, before.ebx),
            (RCX, self.ecx, before.ecx),
            (RDX, self.edx, before.edx),
            (RSI, self.esi, before.esi),
            (RDI, self.edi, before.edi),
            (RBP, self.ebp, before.ebp),
        ];
        for (register, new, old) in registers {
            if new != old {
                gpr[register] = new.into();
            }
        }
    }

    /// The command. Callers leave anything in the upper half of ECX.
    pub fn command(&self) -> u16 {
        self.ecx as u16
    }
}

/// Upper half of a register.
pub(super) fn high(register: u32) -> u16 {
    (register >> 16) as u16
}

/// A register with another upper half.
pub(super) fn with_high(register: u32, high: u16) -> u32 {
    register & 0xffff | u32::from(high) << 16
}

/// Answers a command other than MESSAGE.
pub(super) fn answer(frame: &mut Frame, platform: &Platform, clock: &dyn Clock) {
    match frame.command() {
        words::GETMHZ => frame.eax = u32::try_from(platform.tsc_hz / HZ_IN_MHZ).unwrap_or(u32::MAX - 1),
        words::GETVERSION => (frame.eax, frame.ebx, frame.ecx) = (words::VERSION, words::MAGIC, words::PRODUCT_ESX),
        words::GETHWVERSION => frame.eax = HARDWARE_VERSION,
        words::GETUUID => [frame.eax, frame.ebx, frame.ecx, frame.edx] = little_endian_words(&platform.uuid),
        words::GETMEMSIZE => frame.eax = u32::try_from(platform.memory / BYTES_IN_MIB).unwrap_or(u32::MAX - 1),
        words::GETTIME => {
            let wall = clock.wall();
            // All ones would be an error; the seconds get there in 2106.
            (frame.eax, frame.ebx, frame.ecx) = (wall.as_secs() as u32, wall.subsec_micros(), MAX_LAG);
            // Minutes west of Greenwich: the host's time is told in UTC.
            frame.edx = 0;
        }
        words::GETTIMEFULL => full_time(frame, clock.wall()),
        words::GETTIMEFULL_WITH_LAG => {
            full_time(frame, clock.wall());
            frame.edi = 0;
        }
        // Ticks are never late for long, and never made up for.
        words::STOPCATCHUP => frame.eax = 0,
        words::GETHZ => {
            (frame.eax, frame.ebx) = (platform.tsc_hz as u32, (platform.tsc_hz >> 32) as u32);
            frame.ecx = platform.bus_hz;
        }
        words::GET_VCPU_INFO => frame.eax = words::vcpu_info::SYNC_VTSCS | words::vcpu_info::LEGACY_X2APIC,
        // Among them NESTING_CONTROL and STEALCLOCK, whose "not supported" this is.
        _ => frame.eax = words::UNKNOWN,
    }
}

/// EAX stays the magic number on success.
fn full_time(frame: &mut Frame, wall: Duration) {
    (frame.esi, frame.edx) = ((wall.as_secs() >> 32) as u32, wall.as_secs() as u32);
    (frame.ebx, frame.ecx) = (wall.subsec_micros(), MAX_LAG);
}

fn little_endian_words(bytes: &[u8; 16]) -> [u32; 4] {
    let mut words = [0; 4];
    for (word, bytes) in words.iter_mut().zip(bytes.as_chunks::<4>().0) {
        *word = u32::from_le_bytes(*bytes);
    }
    words
}

#[cfg(test)]
mod tests {
    use vmm::time::StepClock;

    use super::*;

    /// The registers after a command, out of distinct ones before.
    fn call(command: u16) -> (Frame, Frame) {
        let platform = Platform {
            tsc_hz: 5_000_000_123,
            bus_hz: 1_000_000_000,
            memory: 3 << 30,
            uuid: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
        };
        let clock = StepClock::new(Duration::new((7 << 32) + 1_700_000_000, 0));
        clock.advance_to(1_234_567_000);
        // The upper half of ECX is what callers happen to have there.
        let before =
            Frame { eax: words::MAGIC, ebx: 0xb, ecx: 0xffff_0000 | u32::from(command), edx: 0x5658, esi: 0x51, edi: 0xd1, ebp: 0xbb };
        let mut after = before;
        answer(&mut after, &platform, &clock);
        (before, after)
    }

    #[test]
    fn getmhz() {
        let (before, after) = call(words::GETMHZ);
        assert_eq!(after, Frame { eax: 5000, ..before });
    }

    #[test]
    fn getversion_is_what_open_vm_tools_insists_on() {
        let (before, after) = call(words::GETVERSION);
        assert_eq!(after, Frame { eax: 6, ebx: 0x564d_5868, ecx: 2, ..before });
    }

    #[test]
    fn gethwversion() {
        let (before, after) = call(words::GETHWVERSION);
        assert_eq!(after, Frame { eax: 17, ..before });
    }

    #[test]
    fn getuuid_is_sixteen_bytes_in_order() {
        let (before, after) = call(words::GETUUID);
        assert_eq!(after, Frame { eax: 0x0302_0100, ebx: 0x0706_0504, ecx: 0x0b0a_0908, edx: 0x0f0e_0d0c, ..before });
    }

    #[test]
    fn getmemsize_is_in_mebibytes() {
        let (before, after) = call(words::GETMEMSIZE);
        assert_eq!(after, Frame { eax: 3072, ..before });
    }

    #[test]
    fn gettime_is_utc() {
        let (before, after) = call(words::GETTIME);
        assert_eq!(after, Frame { eax: 1_700_000_001, ebx: 234_567, ecx: 1_000_000, edx: 0, ..before });
    }

    #[test]
    fn gettimefull_keeps_the_magic_and_has_all_seconds() {
        let (before, after) = call(words::GETTIMEFULL);
        assert_eq!(after, Frame { ebx: 234_567, ecx: 1_000_000, edx: 1_700_000_001, esi: 7, ..before });
        let (before, after) = call(words::GETTIMEFULL_WITH_LAG);
        assert_eq!(after, Frame { ebx: 234_567, ecx: 1_000_000, edx: 1_700_000_001, esi: 7, edi: 0, ..before });
    }

    #[test]
    fn gethz_tells_both_frequencies() {
        let (before, after) = call(words::GETHZ);
        assert_eq!(after, Frame { eax: 705_032_827, ebx: 1, ecx: 1_000_000_000, ..before });
    }

    #[test]
    fn get_vcpu_info_has_bit_31_clear() {
        let (before, after) = call(words::GET_VCPU_INFO);
        assert_eq!(after, Frame { eax: 0b1010, ..before });
    }

    #[test]
    fn stopcatchup_succeeds() {
        let (before, after) = call(words::STOPCATCHUP);
        assert_eq!(after, Frame { eax: 0, ..before });
    }

    #[test]
    fn what_is_not_there_is_all_ones_and_changes_nothing_else() {
        for command in [words::NESTING_CONTROL, words::STEALCLOCK, 0, 2, 4, 15, 99, u16::MAX] {
            let (before, after) = call(command);
            assert_eq!(after, Frame { eax: u32::MAX, ..before }, "{command}");
        }
    }

    #[test]
    fn only_changed_registers_are_written_back() {
        let mut gpr = [0x1111_1111_1111_1111; 16];
        let before = Frame::of(&gpr);
        Frame { ebx: 5, ..before }.write_changes(&before, &mut gpr);
        assert_eq!(gpr[RBX], 5);
        gpr[RBX] = 0x1111_1111_1111_1111;
        assert_eq!(gpr, [0x1111_1111_1111_1111; 16]);
    }
}
