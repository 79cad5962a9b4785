//! A system for tests: CPUID from a table, time that passes only by waiting, and a host that the test writes.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use abi::hypervisor::{PRESENT, Signature, registers};

use crate::hal::{Cpuid, Dma, Gate, Hal, HalError, Nanos, Registers, Transfer, Width};

/// The host half of a test. What it does not have the system does not offer.
pub(crate) trait Host: Send {
    fn call(&mut self, _gate: Gate, _registers: &mut Registers, _transfer: Transfer<'_>) -> Result<(), HalError> {
        Err(HalError::Unavailable)
    }
    fn write_msr(&mut self, _memory: &Memory, _index: u32, _value: u64) -> Result<(), HalError> {
        Err(HalError::Fault)
    }
    fn read_msr(&mut self, _index: u32) -> Result<u64, HalError> {
        Err(HalError::Unavailable)
    }
    fn port_in(&mut self, _port: u16, _width: Width) -> Result<u32, HalError> {
        Ok(u32::MAX)
    }
    fn port_out(&mut self, _port: u16, _width: Width, _value: u32) -> Result<(), HalError> {
        Ok(())
    }
    /// Runs before each reading of the time-stamp counter.
    fn tsc(&mut self, _memory: &Memory) -> u64 {
        0
    }
}

/// A host without anything.
pub(crate) struct Nothing;
impl Host for Nothing {}

/// Pages that were handed out.
#[derive(Clone, Default)]
pub(crate) struct Memory(Arc<Mutex<BTreeMap<u64, &'static [AtomicU32]>>>);

impl Memory {
    /// Stores words at a guest physical address.
    pub(crate) fn store(&self, gpa: u64, words: &[u32]) {
        let pages = self.0.lock().unwrap();
        let (start, page) = pages.range(..=gpa).next_back().expect("a page that was handed out");
        let first = usize::try_from(gpa - start).unwrap() / 4;
        for (to, from) in page[first..].iter().zip(words) {
            to.store(*from, Ordering::Release);
        }
    }

    /// Number of pages that have not been given back.
    pub(crate) fn in_use(&self) -> usize {
        self.0.lock().unwrap().len()
    }
}

pub(crate) struct FakeHal<H> {
    leaves: BTreeMap<u32, Cpuid>,
    absent: Cpuid,
    pub(crate) cpuids: AtomicUsize,
    clock: AtomicU64,
    pub(crate) memory: Memory,
    host: Mutex<H>,
}

impl<H: Host> FakeHal<H> {
    pub(crate) fn new(host: H) -> FakeHal<H> {
        let leaves = BTreeMap::from([(1, Cpuid { ecx: PRESENT, ..Cpuid::default() })]);
        let (cpuids, clock) = (AtomicUsize::new(0), AtomicU64::new(0));
        FakeHal { leaves, absent: Cpuid::default(), cpuids, clock, memory: Memory::default(), host: Mutex::new(host) }
    }

    /// Adds a leaf.
    pub(crate) fn leaf(mut self, leaf: u32, eax: u32, ebx: u32, ecx: u32, edx: u32) -> Self {
        self.leaves.insert(leaf, Cpuid { eax, ebx, ecx, edx });
        self
    }

    /// Adds the first leaf of an interface.
    pub(crate) fn base(self, base: u32, max_leaf: u32, signature: Signature) -> Self {
        let [ebx, ecx, edx] = registers(signature);
        self.leaf(base, max_leaf, ebx, ecx, edx)
    }

    /// What leaves that do not exist answer.
    pub(crate) fn absent(mut self, absent: Cpuid) -> Self {
        self.absent = absent;
        self
    }

    pub(crate) fn host(&self) -> MutexGuard<'_, H> {
        self.host.lock().unwrap()
    }
}

impl<H: Host> Hal for FakeHal<H> {
    fn cpuid(&self, leaf: u32, _subleaf: u32) -> Cpuid {
        self.cpuids.fetch_add(1, Ordering::Relaxed);
        self.leaves.get(&leaf).copied().unwrap_or(self.absent)
    }

    fn now(&self) -> Nanos {
        self.clock.load(Ordering::Relaxed)
    }

    fn wait_until(&self, deadline: Nanos) {
        self.clock.fetch_max(deadline, Ordering::Relaxed);
    }

    fn call(&self, gate: Gate, registers: &mut Registers, transfer: Transfer<'_>) -> Result<(), HalError> {
        self.host().call(gate, registers, transfer)
    }

    fn write_msr(&self, index: u32, value: u64) -> Result<(), HalError> {
        self.host().write_msr(&self.memory, index, value)
    }

    fn read_msr(&self, index: u32) -> Result<u64, HalError> {
        self.host().read_msr(index)
    }

    fn port_in(&self, port: u16, width: Width) -> Result<u32, HalError> {
        self.host().port_in(port, width)
    }

    fn port_out(&self, port: u16, width: Width, value: u32) -> Result<(), HalError> {
        self.host().port_out(port, width, value)
    }

    fn tsc(&self) -> Result<u64, HalError> {
        Ok(self.host().tsc(&self.memory))
    }

    fn dma_alloc(&self, pages: usize) -> Result<Dma, HalError> {
        let words: Vec<AtomicU32> = (0..pages * 1024).map(|_| AtomicU32::new(0)).collect();
        let words: &'static [AtomicU32] = Box::leak(words.into_boxed_slice());
        let mut memory = self.memory.0.lock().unwrap();
        let gpa = memory.last_key_value().map_or(0x10_0000, |(gpa, words)| gpa + words.len() as u64 * 4);
        memory.insert(gpa, words);
        Ok(Dma::new(gpa, words))
    }

    fn dma_free(&self, dma: Dma) {
        self.memory.0.lock().unwrap().remove(&dma.gpa());
    }
}
