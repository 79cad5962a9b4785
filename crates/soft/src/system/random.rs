//! RDRAND and RDSEED.
//!
//! Numbers come from the host's generator; in the deterministic mode from a seeded one (splitmix64), so that equal runs are equal.
//! Intel SDM vol. 1 section 7.3.17: CF says that there was a number, the other arithmetic flags are cleared.
#![allow(unsafe_code)] // getrandom(2).

use iced_x86::{Instruction, Mnemonic};

use crate::cpu::{Cpu, rflags};
use crate::op::{Flow, Op, Slow, Trap, slow};

/// Numbers fetched from the host at once.
const BATCH: usize = 32;

/// Makes the op for an instruction of this file.
pub(super) fn lower(insn: &Instruction, op: &mut Op) -> bool {
    if !matches!(insn.mnemonic(), Mnemonic::Rdrand | Mnemonic::Rdseed) {
        return false;
    }
    op.a = insn.op0_register().number() as u8;
    op.size = insn.op0_register().size() as u8;
    op.run = slow::<RandomNumber>;
    true
}

/// Where a processor's random numbers come from.
pub(crate) struct Random {
    /// State of the seeded generator.
    seeded: Option<u64>,
    numbers: [u64; BATCH],
    left: usize,
}

impl Random {
    /// The host's generator, or one that starts from `seed`.
    pub fn new(seed: Option<u64>) -> Random {
        Random { seeded: seed, numbers: [0; BATCH], left: 0 }
    }

    /// The next number; `None` when the host has none at the moment.
    fn next(&mut self) -> Option<u64> {
        if let Some(state) = &mut self.seeded {
            *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = *state;
            z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            return Some(z ^ z >> 31);
        }
        if self.left == 0 {
            let size = size_of_val(&self.numbers);
            // SAFETY: the buffer is ours and `size` bytes long.
            let got = unsafe { libc::getrandom(self.numbers.as_mut_ptr().cast(), size, 0) };
            if got != size as isize {
                return None;
            }
            self.left = BATCH;
        }
        self.left -= 1;
        // A number is given out once.
        Some(std::mem::take(&mut self.numbers[self.left]))
    }
}

struct RandomNumber;
impl Slow for RandomNumber {
    fn execute(cpu: &mut Cpu, op: &Op) -> Result<Flow, Trap> {
        let number = cpu.random.next();
        cpu.set_register(op.a, op.size, number.unwrap_or(0));
        cpu.set_status(if number.is_some() { rflags::CF } else { 0 });
        Ok(Flow::Next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeded_numbers_repeat_and_host_numbers_do_not() {
        let take = |seed| {
            let mut random = Random::new(seed);
            [random.next().unwrap(), random.next().unwrap()]
        };
        assert_eq!(take(Some(7)), take(Some(7)));
        assert_ne!(take(None), take(None));
    }
}
