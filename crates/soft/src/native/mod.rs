//! placeholder
use crate::block::Lowering;
use crate::op::Op;
use iced_x86::Instruction;
pub(crate) struct Natives;
impl Natives {
    pub fn new() -> Natives {
        Natives
    }
    pub fn clear(&mut self) {}
}
pub(crate) struct FxArea(pub [u8; 512]);
impl FxArea {
    pub fn reset() -> FxArea {
        FxArea([0; 512])
    }
    pub fn to_bytes(&self) -> [u8; 512] {
        self.0
    }
    pub fn load_bytes(&mut self, b: &[u8; 512]) -> bool {
        self.0 = *b;
        true
    }
}
pub(crate) fn lower(_n: &mut Natives, _l: &Lowering, _i: &Instruction, _b: &[u8], _op: &mut Op) -> bool {
    false
}
