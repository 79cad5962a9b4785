//! The general-purpose instructions (Intel SDM vol. 1 section 5.1).
//!
//! Each module lowers one group: it chooses a handler for operation, operand size and operand form when the instruction is
//! decoded, so that handlers have nothing left to decide. The arithmetic is the host's own ([`host`]): guest and host are the same
//! architecture, and results and flags cannot differ.
//!
//! ```text
//!   lower -> moves arithmetic branch stack shift bits multiply string exchange misc -> Op::run
//!                |                                                  |
//!       operand (register fields, sizes)   memory (fast accesses)   host (ALU instructions with flags)
//! ```

use iced_x86::Instruction;

use crate::block::Lowering;
use crate::op::Op;

pub(crate) use branch::condition_code;

mod arithmetic;
mod bits;
mod branch;
mod exchange;
mod host;
mod memory;
mod misc;
mod moves;
mod multiply;
mod operand;
mod shift;
mod stack;
mod string;
#[cfg(test)]
mod tests;

/// Lowers the first of `insns`, or it and the one after it together. Returns how many that were: 0 when the first is not a
/// general-purpose instruction, or one that belongs to the system (segment and control registers, I/O).
pub(crate) fn lower(low: &Lowering, insns: &[Instruction], op: &mut Op) -> usize {
    let Some(insn) = insns.first() else { return 0 };
    let template = *op;
    let mut taken = arithmetic::lower(low, insns, op);
    let groups = [
        moves::lower,
        branch::lower,
        stack::lower,
        shift::lower,
        bits::lower,
        multiply::lower,
        string::lower,
        exchange::lower,
        misc::lower,
    ];
    for group in groups {
        if taken != 0 {
            break;
        }
        // A group that finds the instruction is not its own may have begun to fill the op.
        *op = template;
        taken = group(low, insn, op);
    }
    taken
}
