//! A machine without a processor: what the guest's half asks of its [`Hal`] goes to the host's halves at once. Time passes only by waiting.
#![allow(unsafe_code, reason = "guest memory is seen from both sides")]

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use abi::hypervisor::{PRESENT, Signature, registers};
use abi::xen::hvm::{SPECIAL_PAGES, SPECIAL_PAGES_SIZE};
use devices::DeviceMap;
use dialects::{Dialect, Processors};
use pvbus::hal::{Cpuid, Gate, Registers, Transfer, Width};
use pvbus::{Dma, Hal, HalError, Nanos};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm::backend::EoiFlag;
use vmm::registers::{RAX, RBP, RBX, RCX, RDI, RDX, RSI};
use vmm::time::{Clock, StepClock, Timers};
use vmm::{CpuidEntry, CpuidTable, GuestMemory, Hypercall, Paging, PortCall, VcpuId};

const PAGE: u64 = 4096;
const MEMORY: u64 = 1024 * PAGE;
/// Words of a page.
const WORDS: usize = PAGE as usize / 4;
/// Where arguments of hypercalls are, in the page that is never handed out.
const EXCHANGE: u64 = 0x100;
/// Time of day when the machine started.
pub const EPOCH: Duration = Duration::from_micros(1_785_369_600_123_456);

type Work = Box<dyn FnMut() + Send>;

/// Vectors of interrupts that were sent.
#[derive(Default)]
pub struct Interrupts(pub Mutex<Vec<u32>>);

impl Processors for Interrupts {
    fn signal_msi(&self, _address: u64, data: u32) {
        self.0.lock().unwrap().push(data);
    }
    fn wake(&self, _id: VcpuId) {}
    fn set_eoi_flag(&self, _id: VcpuId, _flag: Option<Arc<dyn EoiFlag>>) {}
}

pub struct Machine {
    pub memory: GuestMemory,
    pub clock: Arc<StepClock>,
    pub timers: Arc<Timers>,
    pub ports: DeviceMap,
    dialects: Vec<Arc<dyn Dialect>>,
    cpuid: CpuidTable,
    next_page: AtomicU64,
    free_pages: Mutex<Vec<Dma>>,
    /// What other threads of the host do, which run while the guest waits.
    others: Mutex<Vec<Work>>,
    paused: AtomicBool,
    hypercalls: AtomicU64,
    waits: AtomicU64,
    /// The vector by which the guest takes calls of hypervisors.
    pub upcall_vector: Option<u8>,
    /// The processor by which everything is done.
    pub processor: VcpuId,
    /// What the processor calls its hypercall instruction.
    pub vmmcall: bool,
}

impl Machine {
    pub fn new() -> Machine {
        let memory = vmm::memory::map(&[(0, MEMORY), (SPECIAL_PAGES, SPECIAL_PAGES_SIZE)]).unwrap();
        // The pages that a driver has outlive the machine of their test.
        std::mem::forget(Arc::clone(&memory));
        let clock = Arc::new(StepClock::new(EPOCH));
        let mut cpuid = CpuidTable::default();
        cpuid.set(CpuidEntry { leaf: 1, subleaf: None, eax: 0, ebx: 0, ecx: PRESENT, edx: 0 });
        Machine {
            memory,
            timers: Timers::new(clock.clone()),
            clock,
            ports: DeviceMap::default(),
            dialects: Vec::new(),
            cpuid,
            next_page: AtomicU64::new(PAGE),
            free_pages: Mutex::default(),
            others: Mutex::default(),
            paused: AtomicBool::new(false),
            hypercalls: AtomicU64::new(0),
            waits: AtomicU64::new(0),
            upcall_vector: None,
            processor: 0,
            vmmcall: false,
        }
    }

    /// Adds a dialect, with its leaves at `base`.
    pub fn with(mut self, base: u32, dialect: Arc<dyn Dialect>) -> Machine {
        dialect.add_cpuid(base, &mut self.cpuid);
        self.dialects.push(dialect);
        self
    }

    /// Gives the interface at `base` another name.
    pub fn rename(&mut self, base: u32, signature: Signature) {
        let Cpuid { eax, .. } = self.cpuid(base, 0);
        let [ebx, ecx, edx] = registers(signature);
        self.cpuid.set(CpuidEntry { leaf: base, subleaf: None, eax, ebx, ecx, edx });
    }

    /// Adds a thread of the host's, as what it does at each turn.
    pub fn spawn(&self, work: impl FnMut() + Send + 'static) {
        self.others.lock().unwrap().push(Box::new(work));
    }

    /// Ends the host's latest thread.
    pub fn end_latest_thread(&self) {
        self.others.lock().unwrap().pop();
    }

    /// Lets the host's threads have a turn, unless they are paused.
    pub fn let_others_run(&self) {
        if !self.paused.load(Ordering::Relaxed) {
            self.others.lock().unwrap().iter_mut().for_each(|work| work());
        }
    }

    /// Stops the host's threads, or lets them go on.
    pub fn pause_others(&self, pause: bool) {
        self.paused.store(pause, Ordering::Relaxed);
    }

    /// Writes to memory, as the host does.
    pub fn write(&self, gpa: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(gpa)).unwrap();
    }

    /// Pages that were handed out and not given back.
    pub fn pages_in_use(&self) -> u64 {
        let free: usize = self.free_pages.lock().unwrap().iter().map(|dma| dma.words().len() / WORDS).sum();
        self.next_page.load(Ordering::Relaxed) / PAGE - 1 - free as u64
    }

    /// Hypercalls so far.
    pub fn hypercalls(&self) -> u64 {
        self.hypercalls.load(Ordering::Relaxed)
    }

    /// How often the guest has waited.
    pub fn waits(&self) -> u64 {
        self.waits.load(Ordering::Relaxed)
    }

    /// A hypercall whose structure is copied to the guest's first page and back.
    fn exchange(&self, vmmcall: bool, registers: &mut Registers, bytes: &mut [u8]) -> Result<(), HalError> {
        self.memory.write_slice(bytes, GuestAddress(EXCHANGE)).map_err(|_| HalError::Fault)?;
        self.hypercall(vmmcall, &mut Registers { rsi: EXCHANGE, ..*registers }).map(|done| *registers = done)?;
        self.memory.read_slice(bytes, GuestAddress(EXCHANGE)).map_err(|_| HalError::Fault)
    }

    fn hypercall(&self, vmmcall: bool, registers: &mut Registers) -> Result<Registers, HalError> {
        self.hypercalls.fetch_add(1, Ordering::Relaxed);
        let mut call = Hypercall { gpr: gpr(registers), long_mode: true, vmmcall, ..Hypercall::default() };
        if vmmcall != self.vmmcall || !self.dialects.iter().any(|dialect| dialect.hypercall(self.processor, &mut call)) {
            return Err(HalError::Fault);
        }
        Ok(from_gpr(&call.gpr))
    }

    fn port_call(&self, call: &mut PortCall) {
        if let Some(dialect) = self.dialects.iter().find(|dialect| dialect.takes_registers(call.port)) {
            dialect.port_call(self.processor, call);
        } else if !call.write {
            call.gpr[RAX] |= 0xffff_ffff;
        }
    }

    /// REP INSB or REP OUTSB: one call for each byte, as a processor makes them.
    fn string(&self, registers: &mut Registers, transfer: Transfer<'_>) {
        let (write, mut bytes) = match &transfer {
            Transfer::Out(bytes) => (true, bytes.to_vec()),
            Transfer::In(bytes) => (false, vec![0; bytes.len()]),
            Transfer::None | Transfer::Exchange(_) => return,
        };
        for byte in &mut bytes {
            let mut call = PortCall {
                port: port(registers),
                size: 1,
                write,
                string: true,
                data: u32::from(*byte),
                gpr: gpr(registers),
                ..PortCall::default()
            };
            self.port_call(&mut call);
            *registers = Registers { rcx: registers.rcx - 1, rsi: registers.rsi, rdi: registers.rdi, ..from_gpr(&call.gpr) };
            *byte = call.data as u8;
        }
        if let Transfer::In(to) = transfer {
            to.copy_from_slice(&bytes);
        }
    }
}

impl Hal for Machine {
    fn cpuid(&self, leaf: u32, subleaf: u32) -> Cpuid {
        self.cpuid.get(leaf, subleaf).map_or(Cpuid::default(), |e| Cpuid { eax: e.eax, ebx: e.ebx, ecx: e.ecx, edx: e.edx })
    }

    fn now(&self) -> Nanos {
        self.clock.now()
    }

    fn wait_until(&self, deadline: Nanos) {
        self.waits.fetch_add(1, Ordering::Relaxed);
        self.clock.advance_to(deadline);
        self.timers.run_due();
        self.let_others_run();
    }

    fn call(&self, gate: Gate, registers: &mut Registers, transfer: Transfer<'_>) -> Result<(), HalError> {
        match (gate, transfer) {
            (Gate::In | Gate::Out, Transfer::None) => {
                let mut call = PortCall {
                    port: port(registers),
                    size: 4,
                    write: gate == Gate::Out,
                    string: false,
                    data: registers.rax as u32,
                    gpr: gpr(registers),
                    ..PortCall::default()
                };
                self.port_call(&mut call);
                *registers = from_gpr(&call.gpr);
            }
            (Gate::In | Gate::Out, transfer) => self.string(registers, transfer),
            (_, Transfer::None) => *registers = self.hypercall(gate == Gate::Vmmcall, registers)?,
            (_, Transfer::Exchange(bytes)) => return self.exchange(gate == Gate::Vmmcall, registers, bytes),
            // The buffer's address is one of this process and not of the machine.
            _ => return Err(HalError::Unavailable),
        }
        Ok(())
    }

    fn call_code(&self, gpa: u64, registers: &mut Registers) -> Result<(), HalError> {
        // The code that Hyper-V's host writes: `out imm8, eax; ret`.
        let code: [u8; 3] = self.memory.read_obj(GuestAddress(gpa)).map_err(|_| HalError::Fault)?;
        let [0xe7, port, 0xc3] = code else { return Err(HalError::Fault) };
        let mut call = PortCall {
            port: port.into(),
            size: 4,
            write: true,
            long_mode: true,
            paging: Paging { cr0: 1, ..Paging::default() },
            gpr: gpr(registers),
            ..PortCall::default()
        };
        self.port_call(&mut call);
        *registers = from_gpr(&call.gpr);
        Ok(())
    }

    fn read_msr(&self, index: u32) -> Result<u64, HalError> {
        let answer = self.dialects.iter().find_map(|dialect| dialect.read_msr(self.processor, index));
        answer.and_then(Result::ok).ok_or(HalError::Fault)
    }

    fn write_msr(&self, index: u32, value: u64) -> Result<(), HalError> {
        let answer = self.dialects.iter().find_map(|dialect| dialect.write_msr(self.processor, index, value));
        answer.and_then(Result::ok).ok_or(HalError::Fault)
    }

    fn port_in(&self, port: u16, width: Width) -> Result<u32, HalError> {
        Ok(self.ports.port(port).map_or(u32::MAX, |device| device.port_in(port, bytes(width))))
    }

    fn port_out(&self, port: u16, width: Width, value: u32) -> Result<(), HalError> {
        if let Some(device) = self.ports.port(port) {
            device.port_out(port, bytes(width), value);
        }
        Ok(())
    }

    fn dma_alloc(&self, pages: usize) -> Result<Dma, HalError> {
        let mut free = self.free_pages.lock().unwrap();
        if let Some(at) = free.iter().position(|dma| dma.words().len() == pages * WORDS) {
            let dma = free.swap_remove(at);
            dma.words().iter().for_each(|word| word.store(0, Ordering::Relaxed));
            return Ok(dma);
        }
        let length = pages as u64 * PAGE;
        let gpa = self.next_page.fetch_add(length, Ordering::Relaxed);
        if gpa + length > MEMORY { Err(HalError::Unavailable) } else { self.map(gpa, pages) }
    }

    fn dma_free(&self, dma: Dma) {
        self.free_pages.lock().unwrap().push(dma);
    }

    fn map(&self, gpa: u64, pages: usize) -> Result<Dma, HalError> {
        let host = self.memory.get_host_address(GuestAddress(gpa)).map_err(|_| HalError::Unavailable)?;
        // SAFETY: the range is inside the mapping, which is aligned to pages and never unmapped (`Machine::new`); host and guest access it by
        // atomics or vm-memory's volatile copies only.
        let words = unsafe { std::slice::from_raw_parts(host.cast::<AtomicU32>(), pages * WORDS) };
        Ok(Dma::new(gpa, words))
    }

    fn upcall_vector(&self) -> Option<u8> {
        self.upcall_vector
    }

    fn tsc(&self) -> Result<u64, HalError> {
        // One tick a nanosecond.
        Ok(self.clock.now())
    }
}

const fn bytes(width: Width) -> u8 {
    match width {
        Width::U8 => 1,
        Width::U16 => 2,
        Width::U32 => 4,
    }
}

const fn port(registers: &Registers) -> u16 {
    registers.rdx as u16
}

fn gpr(registers: &Registers) -> [u64; 16] {
    let mut gpr = [0; 16];
    let Registers { rax, rbx, rcx, rdx, rsi, rdi, rbp } = *registers;
    for (index, value) in [(RAX, rax), (RBX, rbx), (RCX, rcx), (RDX, rdx), (RSI, rsi), (RDI, rdi), (RBP, rbp)] {
        gpr[index] = value;
    }
    gpr
}

fn from_gpr(gpr: &[u64; 16]) -> Registers {
    let [rax, rbx, rcx, rdx, rsi, rdi, rbp] = [RAX, RBX, RCX, RDX, RSI, RDI, RBP].map(|index| gpr[index]);
    Registers { rax, rbx, rcx, rdx, rsi, rdi, rbp }
}
