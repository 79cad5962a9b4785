//! A guest of a few instructions, and a bus that records what it does.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::layout::*;
use iced_x86::code_asm::CodeAssembler;
use kvm::KvmBackend;
use vm_memory::{Bytes, GuestAddress};
use vmm::registers::{RAX, RBX, RCX};
use vmm::time::{HostClock, Timers};
use vmm::{Backend, BackendVm, Bus, Entry, Exit, GuestMemory, MsrFault, PortCall, RegisterMask, Vcpu, VcpuId, VmConfig};

pub struct Guest {
    pub vm: Arc<dyn BackendVm>,
    pub vcpu: Box<dyn Vcpu>,
    pub memory: GuestMemory,
    pub bus: TestBus,
}

impl Guest {
    /// A guest without local APIC that is about to execute `code` in 64-bit ring 0.
    pub fn new(code: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>) -> Result<Guest, String> {
        Guest::with(false, 1, code)
    }

    /// The same, with or without local APICs.
    pub fn with(
        local_apic: bool,
        vcpus: u32,
        code: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>,
    ) -> Result<Guest, String> {
        let backend = KvmBackend::new().map_err(text)?;
        let memory = vmm::memory::map(&[(0, MEMORY)]).map_err(text)?;
        let config = VmConfig {
            memory: Arc::clone(&memory),
            vcpus,
            local_apic,
            cpuid: backend.supported_cpuid(),
            timers: Timers::new(Arc::new(HostClock::new())),
            deterministic: false,
        };
        let vm = backend.create_vm(config).map_err(text)?;
        let mut vcpu = vm.create_vcpu(0).map_err(text)?;
        lay_out(&memory)?;
        write(&memory, CODE, &assemble(64, CODE, code)?)?;
        vcpu.set_registers(&long_mode(CODE), RegisterMask::all()).map_err(text)?;
        Ok(Guest { vm, vcpu, memory, bus: TestBus::default() })
    }

    /// Sets the handler of `vector`.
    pub fn handle(&self, vector: u8, code: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>) -> Result<(), String> {
        let at = HANDLER + u64::from(vector) * 64;
        write(&self.memory, at, &assemble(64, at, code)?)?;
        let gate = (at & 0xffff) | u64::from(CODE_SELECTOR) << 16 | 0x8e00 << 32 | (at >> 16 & 0xffff) << 48;
        write(&self.memory, IDT + u64::from(vector) * 16, &gate.to_le_bytes())
    }

    /// Runs until an exit.
    pub fn run(&mut self) -> Result<Exit, String> {
        self.enter(Entry::default())
    }

    /// Runs with `entry`; kicks a guest that says nothing for long.
    pub fn enter(&mut self, entry: Entry) -> Result<Exit, String> {
        let (done, watch) = std::sync::mpsc::channel::<()>();
        std::thread::scope(|scope| {
            let vm = &self.vm;
            scope.spawn(move || {
                if watch.recv_timeout(Duration::from_secs(10)) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                    vm.kick(0);
                }
            });
            let exit = self.vcpu.run(&self.bus, entry).map_err(text);
            drop(done);
            exit
        })
    }

    /// Runs and insists on an exit.
    pub fn expect(&mut self, wanted: Exit) -> Result<(), String> {
        let exit = self.run()?;
        same("exit", exit, wanted)
    }

    pub fn rip(&self) -> Result<u64, String> {
        Ok(self.vcpu.registers(RegisterMask::GPR).map_err(text)?.rip)
    }

    pub fn gpr(&self, index: usize) -> Result<u64, String> {
        Ok(self.vcpu.registers(RegisterMask::GPR).map_err(text)?.gpr[index])
    }

    pub fn read_u64(&self, gpa: u64) -> Result<u64, String> {
        self.memory.read_obj(GuestAddress(gpa)).map_err(text)
    }
}

/// The port of [`TestBus`] that takes registers.
pub const REGISTER_PORT: u16 = 0x5658;

/// A bus with what a test puts on it; everything else is declined. Calls of [`REGISTER_PORT`] are noted, and answered in this way: RBX counts
/// them, RAX is all ones, and what is read are the letters from A.
#[derive(Default)]
pub struct TestBus {
    pub ports: Mutex<HashMap<u16, u32>>,
    pub outs: Mutex<Vec<(u16, u32)>>,
    pub calls: Mutex<Vec<PortCall>>,
    pub mmio: Mutex<HashMap<u64, u64>>,
    pub msrs: Mutex<HashMap<u32, u64>>,
    pub eois: Mutex<Vec<u8>>,
    pub extint: Mutex<Vec<u8>>,
}

impl Bus for TestBus {
    fn port_in(&self, _: VcpuId, port: u16, _: u8) -> Option<u32> {
        self.ports.lock().ok()?.get(&port).copied()
    }

    fn port_out(&self, _: VcpuId, port: u16, _: u8, value: u32) -> bool {
        let known = self.ports.lock().is_ok_and(|ports| ports.contains_key(&port));
        if known && let Ok(mut outs) = self.outs.lock() {
            outs.push((port, value));
        }
        known
    }

    fn takes_registers(&self, port: u16) -> bool {
        port == REGISTER_PORT
    }

    fn port_call(&self, _: VcpuId, call: &mut PortCall) {
        if let Ok(mut calls) = self.calls.lock() {
            call.data = if call.write { call.data } else { u32::from(b'A') + calls.len() as u32 };
            calls.push(*call);
        }
        call.gpr[RBX] += 1;
        call.gpr[RCX] = 0x99;
        if !call.string {
            call.gpr[RAX] = u64::MAX;
        }
    }

    fn mmio_read(&self, _: VcpuId, gpa: u64, data: &mut [u8]) -> bool {
        let Some(value) = self.mmio.lock().ok().and_then(|mmio| mmio.get(&gpa).copied()) else { return false };
        let size = data.len();
        data.copy_from_slice(&value.to_le_bytes()[..size]);
        true
    }

    fn mmio_write(&self, _: VcpuId, gpa: u64, data: &[u8]) -> bool {
        let Ok(mut mmio) = self.mmio.lock() else { return false };
        let Some(value) = mmio.get_mut(&gpa) else { return false };
        let mut bytes = [0; 8];
        bytes[..data.len()].copy_from_slice(data);
        *value = u64::from_le_bytes(bytes);
        true
    }

    fn read_msr(&self, _: VcpuId, index: u32) -> Option<Result<u64, MsrFault>> {
        self.msrs.lock().ok()?.get(&index).map(|value| Ok(*value))
    }

    fn write_msr(&self, _: VcpuId, index: u32, value: u64) -> Option<Result<(), MsrFault>> {
        *self.msrs.lock().ok()?.get_mut(&index)? = value;
        Some(Ok(()))
    }

    fn end_of_interrupt(&self, vector: u8) {
        if let Ok(mut eois) = self.eois.lock() {
            eois.push(vector);
        }
    }

    fn acknowledge_extint(&self) -> u8 {
        self.extint.lock().ok().and_then(|mut vectors| vectors.pop()).unwrap_or(0xff)
    }
}
