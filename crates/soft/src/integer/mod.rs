//! placeholder
use crate::block::Lowering;
use crate::op::Op;
use iced_x86::Instruction;
pub(crate) fn lower(_l: &Lowering, _i: &[Instruction], _op: &mut Op) -> usize {
    0
}
