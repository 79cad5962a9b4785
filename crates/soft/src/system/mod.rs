//! placeholder
use crate::block::Lowering;
use crate::cpu::Cpu;
use crate::op::{Op, Trap};
use iced_x86::Instruction;
#[derive(Default)]
pub(crate) struct Msrs {
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub sfmask: u64,
    pub kernel_gs_base: u64,
    pub misc_enable: u64,
}
impl Msrs {
    pub fn efer_reset(&mut self) {}
}
pub(crate) struct Shutdown;
pub(crate) enum Interrupt {
    External,
    Nmi,
}
pub(crate) const SIGNATURE: u32 = 0;
pub(crate) fn supported_cpuid() -> vmm::CpuidTable {
    vmm::CpuidTable::default()
}
pub(crate) fn lower(_l: &Lowering, _i: &Instruction, _op: &mut Op) -> bool {
    false
}
impl Cpu {
    pub fn deliver_exception(&mut self, _v: u8, _e: Option<u32>, _a: u64) -> Result<(), Shutdown> {
        Err(Shutdown)
    }
    pub fn deliver_interrupt(&mut self, _v: u8, _k: Interrupt) -> Result<(), Shutdown> {
        Err(Shutdown)
    }
    pub fn tsc_offset(&self) -> u64 {
        0
    }
    pub fn peek_msr(&self, _i: u32) -> Option<u64> {
        None
    }
    pub fn poke_msr(&mut self, _i: u32, _v: u64) -> Option<()> {
        None
    }
    pub fn debug_check_before(&mut self) -> Result<(), Trap> {
        Ok(())
    }
    pub fn debug_check_after(&mut self, _t: bool) -> Result<(), Trap> {
        Ok(())
    }
}
