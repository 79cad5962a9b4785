//! Port I/O: IN, OUT, INS and OUTS, with the permission check of IOPL and the TSS's bitmap.
//!
//! Intel SDM vol. 1 chapter 19 (19.5 protection). A port that the bus declines ends `Vcpu::run`: an IN is entered again with the
//! answer, an OUT is complete by then. A port that takes registers (`vmm::Bus::takes_registers`) is open to every privilege level and is
//! never declined.

use iced_x86::{Instruction, Mnemonic, OpKind};
use vmm::{Exit, PortCall};

use super::descriptor::kind;
use super::{RAX, RCX, RDI, RDX, RSI};
use crate::attention;
use crate::block::Lowering;
use crate::cpu::{Cpu, ES, access, cr0, rflags};
use crate::op::{Flow, Op, Slow, Trap, slow};

/// Set in `op.aux`: the port is in DX.
const PORT_IN_DX: u16 = 1;
/// Set in `op.aux`: REP.
const REPEAT: u16 = 2;
/// Offset of the I/O map base in a 32-bit TSS.
const IO_MAP_BASE: u64 = 0x66;
/// Iterations of a REP before the processor looks for interrupts even if nothing was announced.
const PIECE: u32 = 1024;

/// Makes the op for an instruction of this file.
pub(super) fn lower(_lowering: &Lowering, insn: &Instruction, op: &mut Op) -> bool {
    let (port, data) = match insn.mnemonic() {
        Mnemonic::In => (1, 0),
        Mnemonic::Out => (0, 1),
        Mnemonic::Insb | Mnemonic::Insw | Mnemonic::Insd => {
            op.run = slow::<Ins>;
            op.size = insn.memory_size().size() as u8;
            op.addr_size = match insn.op0_kind() {
                OpKind::MemoryESDI => 2,
                OpKind::MemoryESEDI => 4,
                _ => 8,
            };
            op.aux = if insn.has_rep_prefix() || insn.has_repne_prefix() { REPEAT } else { 0 };
            return true;
        }
        Mnemonic::Outsb | Mnemonic::Outsw | Mnemonic::Outsd => {
            op.run = slow::<Outs>;
            op.size = insn.memory_size().size() as u8;
            op.addr_size = match insn.op1_kind() {
                OpKind::MemorySegSI => 2,
                OpKind::MemorySegESI => 4,
                _ => 8,
            };
            op.seg = insn.memory_segment().number() as u8;
            op.aux = if insn.has_rep_prefix() || insn.has_repne_prefix() { REPEAT } else { 0 };
            return true;
        }
        _ => return false,
    };
    op.size = insn.op_register(data).size() as u8;
    if insn.op_kind(port) == OpKind::Register {
        op.aux = PORT_IN_DX;
    } else {
        op.imm = insn.immediate8().into();
    }
    op.run = if insn.mnemonic() == Mnemonic::In { slow::<In> } else { slow::<Out> };
    true
}

impl Cpu {
    fn op_port(&self, op: &Op) -> u16 {
        if op.aux & PORT_IN_DX != 0 { self.regs[RDX] as u16 } else { op.imm as u16 }
    }

    /// #GP(0) unless IOPL or the I/O permission bitmap allows the access.
    fn check_port(&mut self, port: u16, size: u8) -> Result<(), Trap> {
        let iopl = (self.rflags & rflags::IOPL) >> 12;
        if self.cr0 & cr0::PE == 0 || !self.v86() && u64::from(self.cpl) <= iopl {
            return Ok(());
        }
        let limit = u64::from(self.tr.limit);
        let big = matches!(self.tr.access & access::TYPE, kind::TSS_AVAILABLE | kind::TSS_BUSY);
        if !big || self.tr.access & access::P == 0 || limit < IO_MAP_BASE + 1 {
            return Err(self.gp());
        }
        let base = u64::from(self.load_system::<u16>(self.tr.base.wrapping_add(IO_MAP_BASE))?);
        let at = base + u64::from(port / 8);
        // Two bytes are always read, because the ports may lie across a byte's end.
        if at + 1 > limit {
            return Err(self.gp());
        }
        let bits = self.load_system::<u16>(self.tr.base.wrapping_add(at))?;
        let mask = ((1u16 << size) - 1) << (port % 8);
        if bits & mask != 0 { Err(self.gp()) } else { Ok(()) }
    }

    fn read_port(&mut self, port: u16, size: u8, string: bool) -> Result<u32, Trap> {
        self.watch_port(port, size.into());
        if let Some(value) = self.port_in.take() {
            return Ok(value);
        }
        self.stats.port += 1;
        match self.bus().port_in(self.id, port, size) {
            Some(value) => Ok(value),
            None => {
                self.awaits_port_in = true;
                Err(self.exit(Exit::PortIn { port, size, string }))
            }
        }
    }

    /// `false` when `Vcpu::run` has to return after this instruction.
    fn write_port(&mut self, port: u16, size: u8, value: u32, string: bool) -> bool {
        self.watch_port(port, size.into());
        self.stats.port += 1;
        let taken = self.bus().port_out(self.id, port, size, value);
        if !taken {
            self.pending_exit = Some(Exit::PortOut { port, size, value, string });
            self.attention.set_own(attention::IDLE);
        }
        taken
    }

    /// One access to a port that takes registers. What the bus made of the registers is written back, except those that the instruction itself
    /// moves. The answer is the element's, or IN's; #UD when the bus says so.
    fn call_port(&mut self, port: u16, size: u8, write: bool, element: Option<u32>) -> Result<u32, Trap> {
        self.watch_port(port, size.into());
        self.stats.port += 1;
        let data = element.unwrap_or(truncated(self.regs[RAX], size));
        let (cpl, long_mode, paging) = (self.cpl, self.is_64bit(), self.paging());
        let mut call = PortCall { port, size, write, string: element.is_some(), data, cpl, long_mode, paging, ..PortCall::default() };
        call.gpr.copy_from_slice(&self.regs[RAX..16]);
        self.bus().port_call(self.id, &mut call);
        if call.undefined {
            return Err(self.ud());
        }
        let answer = if call.string { call.data } else { call.gpr[RAX] as u32 };
        let moved: &[usize] = match (call.string, write) {
            (true, _) => &[RCX, RSI, RDI],
            (false, false) => &[RAX],
            (false, true) => &[],
        };
        for &register in moved {
            call.gpr[register] = self.regs[register];
        }
        self.regs[RAX..16].copy_from_slice(&call.gpr);
        Ok(answer)
    }

    /// An index register as the address size has it.
    fn index_register(&self, register: usize, addr_size: u8) -> u64 {
        match addr_size {
            2 => self.regs[register] & 0xffff,
            4 => self.regs[register] & 0xffff_ffff,
            _ => self.regs[register],
        }
    }

    /// Moves an index register by one element, forward or back as DF says.
    fn advance_index(&mut self, register: usize, op: &Op) {
        let step = u64::from(op.size);
        let step = if self.rflags & rflags::DF != 0 { step.wrapping_neg() } else { step };
        let value = self.regs[register].wrapping_add(step);
        self.set_register(register as u8, op.addr_size, value);
    }

    /// Does `element` once, or RCX times. It says whether the repetition may go on at once.
    fn repeat(&mut self, op: &Op, mut element: impl FnMut(&mut Cpu) -> Result<bool, Trap>) -> Result<Flow, Trap> {
        if op.aux & REPEAT == 0 {
            element(self)?;
            return Ok(Flow::Leave);
        }
        for done in 0.. {
            let count = self.index_register(RCX, op.addr_size);
            if count == 0 {
                return Ok(Flow::Leave);
            }
            if done == PIECE {
                break;
            }
            let go_on = element(self)?;
            self.set_register(RCX as u8, op.addr_size, count - 1);
            if !go_on || self.attention.flags() != 0 {
                break;
            }
        }
        if self.index_register(RCX, op.addr_size) == 0 {
            return Ok(Flow::Leave);
        }
        // Entered again: `rip` is still at the instruction.
        Ok(Flow::Jumped)
    }
}

struct In;
impl Slow for In {
    fn execute(cpu: &mut Cpu, op: &Op) -> Result<Flow, Trap> {
        let port = cpu.op_port(op);
        let value = if cpu.bus().takes_registers(port) {
            cpu.call_port(port, op.size, false, None)?
        } else {
            cpu.check_port(port, op.size)?;
            cpu.read_port(port, op.size, false)?
        };
        if op.size == 1 {
            cpu.regs[RAX] = cpu.regs[RAX] & !0xff | u64::from(value & 0xff);
        } else {
            cpu.set_register(RAX as u8, op.size, value.into());
        }
        Ok(Flow::Leave)
    }
}

struct Out;
impl Slow for Out {
    fn execute(cpu: &mut Cpu, op: &Op) -> Result<Flow, Trap> {
        let port = cpu.op_port(op);
        if cpu.bus().takes_registers(port) {
            cpu.call_port(port, op.size, true, None)?;
            return Ok(Flow::Leave);
        }
        cpu.check_port(port, op.size)?;
        let value = truncated(cpu.regs[RAX], op.size);
        cpu.write_port(port, op.size, value, false);
        Ok(Flow::Leave)
    }
}

struct Ins;
impl Slow for Ins {
    fn execute(cpu: &mut Cpu, op: &Op) -> Result<Flow, Trap> {
        let port = cpu.regs[RDX] as u16;
        let size = u64::from(op.size);
        let takes_registers = cpu.bus().takes_registers(port);
        if !takes_registers {
            cpu.check_port(port, op.size)?;
        }
        cpu.repeat(op, |cpu| {
            let offset = cpu.index_register(RDI, op.addr_size);
            let at = cpu.linear(ES, offset, size, true)?;
            // The memory has to be writable before the port is read, because reading may have effects.
            cpu.host_slice(at, 1, true)?;
            cpu.host_slice(at.wrapping_add(size - 1), 1, true)?;
            let answered = cpu.port_in.is_some();
            let value = match takes_registers {
                true => cpu.call_port(port, op.size, false, Some(u32::MAX))?,
                false => cpu.read_port(port, op.size, true)?,
            };
            cpu.store_sized(at, size, value.into())?;
            cpu.advance_index(RDI, op);
            Ok(!answered)
        })
    }
}

struct Outs;
impl Slow for Outs {
    fn execute(cpu: &mut Cpu, op: &Op) -> Result<Flow, Trap> {
        let port = cpu.regs[RDX] as u16;
        let size = u64::from(op.size);
        let takes_registers = cpu.bus().takes_registers(port);
        if !takes_registers {
            cpu.check_port(port, op.size)?;
        }
        cpu.repeat(op, |cpu| {
            let offset = cpu.index_register(RSI, op.addr_size);
            let at = cpu.linear(usize::from(op.seg), offset, size, false)?;
            let value = cpu.load_sized(at, size)?;
            let taken = if takes_registers {
                cpu.call_port(port, op.size, true, Some(value as u32))?;
                true
            } else {
                cpu.write_port(port, op.size, value as u32, true)
            };
            cpu.advance_index(RSI, op);
            Ok(taken)
        })
    }
}

fn truncated(value: u64, size: u8) -> u32 {
    match size {
        1 => value as u8 as u32,
        2 => value as u16 as u32,
        _ => value as u32,
    }
}
