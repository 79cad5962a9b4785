//! vmm(4)'s command words over a real backend: one small guest each. Run on the software CPU by `tests/vmm_ioctl.rs`, on KVM in the rig.

use abi::vmm as words;
use iced_x86::code_asm::*;
use rustix::io::Errno;
use vmm::Vmm;
use vmm::ioctl::UserMemory;
use zerocopy::little_endian::{I32, U32, U64};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::layout::*;

/// The caller's memory: one `vm_exit` at address 0x1000.
struct Process(Vec<u8>);

const EXIT_AT: u64 = 0x1000;

impl UserMemory for Process {
    fn copy_in(&self, address: u64, data: &mut [u8]) -> Result<(), Errno> {
        let start = address.checked_sub(EXIT_AT).ok_or(Errno::FAULT)? as usize;
        data.copy_from_slice(self.0.get(start..start + data.len()).ok_or(Errno::FAULT)?);
        Ok(())
    }

    fn copy_out(&mut self, address: u64, data: &[u8]) -> Result<(), Errno> {
        let start = address.checked_sub(EXIT_AT).ok_or(Errno::FAULT)? as usize;
        self.0.get_mut(start..start + data.len()).ok_or(Errno::FAULT)?.copy_from_slice(data);
        Ok(())
    }
}

struct Client {
    vmm: Vmm,
    process: Process,
    vm: u32,
}

impl Client {
    /// CREATE, with `code` in 64-bit ring 0.
    fn new(vmm: Vmm, code: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>) -> Result<Client, String> {
        let mut client = Client { vmm, process: Process(vec![0; 4096]), vm: 0 };
        let mut params = words::CreateParams::zeroed();
        params.nmemranges = U64::new(2);
        params.ncpus = U64::new(1);
        (params.memranges[0].size, params.memranges[0].kind) = (U64::new(MEMORY), I32::new(words::MEM_RAM));
        (params.memranges[1].gpa, params.memranges[1].size) = (U64::new(NOWHERE), U64::new(0x1000));
        params.memranges[1].kind = I32::new(words::MEM_MMIO);
        params.name[..3].copy_from_slice(b"rig");
        client.ioctl("CREATE", words::CREATE, &mut params)?;
        client.vm = params.id.get();
        let memory = client.vmm.memory(client.vm).map_err(text)?;
        lay_out(&memory)?;
        write(&memory, CODE, &assemble(64, CODE, code)?)?;
        let mut reset = words::ResetCpuParams::zeroed();
        reset.vm_id = U32::new(client.vm);
        // Registers as READREGS lays them out, from a machine word's point of view the same thing.
        client.vmm.write_registers(client.vm, 0, &long_mode(CODE), vmm::RegisterMask::all()).map_err(text)?;
        let mut registers = words::RegistersParams::zeroed();
        (registers.vm_id, registers.mask) = (U32::new(client.vm), U64::new(words::RWREGS_ALL));
        client.ioctl("READREGS", words::READREGS, &mut registers)?;
        reset.state = registers.state;
        client.ioctl("RESETCPU", words::RESETCPU, &mut reset)?;
        Ok(client)
    }

    fn ioctl<T: IntoBytes + FromBytes>(&mut self, name: &str, word: u32, argument: &mut T) -> Result<(), String> {
        self.vmm.vmm_ioctl(word, argument.as_mut_bytes(), &mut self.process).map_err(|e| format!("{name}: {e}"))
    }

    /// RUN: the raw reason and the exit.
    fn run(&mut self) -> Result<(u16, words::VmExit), String> {
        let mut params = words::RunParams::zeroed();
        params.vm_id = U32::new(self.vm);
        params.exit = U64::new(EXIT_AT);
        self.ioctl("RUN", words::RUN, &mut params)?;
        let exit = words::VmExit::read_from_prefix(&self.process.0).map_err(text)?.0;
        Ok((params.exit_reason.get(), exit))
    }

    /// Raw reasons of this host: I/O, EPT violation, triple fault.
    fn codes(&self) -> (u16, u16, u16) {
        if self.vmm.backend().technology() == "SVM/RVI" { (0x7b, 0x400, 0x7f) } else { (0x1e, 0x30, 2) }
    }
}

pub fn run_a_guest(vmm: Vmm) -> Result<(), String> {
    let mut client = Client::new(vmm, |a| {
        a.in_(al, 0x60)?;
        a.inc(al)?;
        a.out(0x61, al)?;
        a.mov(rbx, NOWHERE)?;
        a.mov(dword_ptr(rbx), eax)?;
        a.ud2()
    })?;
    let (io, ept, triple_fault) = client.codes();
    let (reason, exit) = client.run()?;
    let record = words::ExitInOut::read_from_prefix(&exit.record).map_err(text)?.0;
    same("IN", (reason, record.dir, record.port.get(), record.size), (io, words::DIRECTION_IN, 0x60, 1))?;
    // The answer goes where the question was.
    client.process.0[8..12].copy_from_slice(&0x41u32.to_le_bytes());
    let (reason, exit) = client.run()?;
    let record = words::ExitInOut::read_from_prefix(&exit.record).map_err(text)?.0;
    same("OUT", (reason, record.dir, record.port.get(), record.data.get()), (io, words::DIRECTION_OUT, 0x61, 0x42))?;
    let (reason, exit) = client.run()?;
    same("MMIO", (reason, exit.record[0]), (ept, words::FAULT_MMIO_ASSIST))?;
    same("bytes of the instruction", exit.record[3..5].to_vec(), vec![0x89, 0x03])?;
    let mut registers = words::RegistersParams::zeroed();
    (registers.vm_id, registers.mask) = (U32::new(client.vm), U64::new(1));
    client.ioctl("READREGS", words::READREGS, &mut registers)?;
    same("RIP", registers.state.gpr[16], exit.state.gpr[16])?;
    registers.state.gpr[16] = U64::new(registers.state.gpr[16].get() + 2);
    client.ioctl("WRITEREGS", words::WRITEREGS, &mut registers)?;
    same("triple fault", client.run()?.0, triple_fault)?;
    let mut info = words::InfoParams::zeroed();
    client.ioctl("INFO", words::INFO, &mut info)?;
    same("machines", (info.count.get(), info.size.get()), (1, 160))?;
    let mut term = words::TerminateParams { vm_id: U32::new(client.vm) };
    client.ioctl("TERM", words::TERM, &mut term)?;
    same("machines", client.vmm.info().len(), 0)
}

pub fn protect(vmm: Vmm) -> Result<(), String> {
    let mut client = Client::new(vmm, |a| {
        a.mov(rbx, DATA)?;
        a.mov(byte_ptr(rbx), 1)?;
        a.out(0x61, al)
    })?;
    let (io, ept, _) = client.codes();
    let mut params = words::MprotectEptParams::zeroed();
    params.vm_id = U32::new(client.vm);
    (params.sgpa, params.size, params.prot) = (U64::new(DATA), U64::new(0x1000), I32::new(5));
    client.ioctl("MPROTECT_EPT", words::MPROTECT_EPT, &mut params)?;
    let (reason, exit) = client.run()?;
    same("write", (reason, exit.record[0]), (ept, words::FAULT_PROTECT))?;
    params.prot = I32::new(7);
    client.ioctl("MPROTECT_EPT", words::MPROTECT_EPT, &mut params)?;
    same("after", client.run()?.0, io)?;
    let memory = client.vmm.memory(client.vm).map_err(text)?;
    let byte: u8 = vm_memory::Bytes::read_obj(memory.as_ref(), vm_memory::GuestAddress(DATA)).map_err(text)?;
    same("memory", byte, 1)
}

pub fn pvclock(vmm: Vmm) -> Result<(), String> {
    let mut client = Client::new(vmm, |a| {
        a.rdtsc()?;
        a.out(0x61, al)
    })?;
    let mut params = words::VmParams::zeroed();
    (params.vm_id, params.mask) = (U32::new(client.vm), U32::new(words::VMPARAMS_ALL));
    (params.pvclock_gpa, params.pvclock_version) = (U64::new(DATA | 1), U32::new(40));
    client.ioctl("WRITEVMPARAMS", words::WRITEVMPARAMS, &mut params)?;
    let (_, exit) = client.run()?;
    params.zero();
    (params.vm_id, params.mask) = (U32::new(client.vm), U32::new(words::VMPARAMS_ALL));
    client.ioctl("READVMPARAMS", words::READVMPARAMS, &mut params)?;
    same("address", params.pvclock_gpa.get(), DATA | 1)?;
    if params.pvclock_version.get() <= 40 {
        return Err(format!("the version did not go on from 40: {}", params.pvclock_version.get()));
    }
    let tsc = exit.state.gpr[2].get() << 32 | exit.state.gpr[0].get();
    let memory = client.vmm.memory(client.vm).map_err(text)?;
    let time = pvclock_time(&memory, DATA, tsc)?;
    if time < 60_000_000_000 { Ok(()) } else { Err(format!("the clock says {time} ns")) }
}
