//! The backend and its machines.
#![allow(unsafe_code)] // Guest RAM by host pointer, page-table entries as host atomics.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use devices::lapic::{ApicBus, ApicClient, ApicClock, Message};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm::memory::{CodeMap, GuestMemory, PAGE_SIZE, Protection};
use vmm::time::Timers;
use vmm::{Backend, BackendError, BackendVm, CpuidTable, EoiFlag, Frequencies, MsrFault, Vcpu, VcpuId, VmConfig};

use crate::attention::{self, Attention};
use crate::cpu::Cpu;
use crate::flush::{self, PageList};
use crate::run::SoftVcpu;
use crate::system;

/// Guest TSC and LAPIC timer tick once a nanosecond of the machine's clock.
const NANOSECOND_HZ: u32 = 1_000_000_000;
/// Processors of a machine at most, as vmm(4) allows.
const MAX_VCPUS: u32 = 64;

/// How often a run of instructions is interpreted before it is translated, when nobody says otherwise: most of what a boot
/// executes is executed less often, and would cost memory. From 8 to 128 a boot takes as long.
const TRANSLATE_AFTER: u32 = 128;

/// The software CPU as a backend.
#[derive(Debug, Clone, Copy)]
pub struct Soft {
    translate_after: u32,
}

impl Soft {
    /// The backend; there is nothing to set up.
    pub fn new() -> Soft {
        Soft::translating_after(TRANSLATE_AFTER)
    }

    /// The backend that interprets a run of instructions so many times before it translates it: 0 translates everything at once, and
    /// `u32::MAX` nothing. The deterministic mode never translates.
    pub fn translating_after(executions: u32) -> Soft {
        Soft { translate_after: executions }
    }
}

impl Default for Soft {
    fn default() -> Soft {
        Soft::new()
    }
}

impl Backend for Soft {
    fn name(&self) -> &'static str {
        "soft"
    }

    fn technology(&self) -> &'static str {
        "soft"
    }

    fn supported_cpuid(&self) -> CpuidTable {
        system::supported_cpuid()
    }

    fn frequencies(&self) -> Result<Frequencies, BackendError> {
        Ok(Frequencies { tsc_hz: NANOSECOND_HZ.into(), apic_hz: NANOSECOND_HZ })
    }

    fn create_vm(&self, config: VmConfig) -> Result<Arc<dyn BackendVm>, BackendError> {
        if config.vcpus == 0 || config.vcpus > MAX_VCPUS {
            return Err(BackendError::Invalid(format!("{} processors: 1 to {MAX_VCPUS} are possible", config.vcpus)));
        }
        if config.deterministic && config.vcpus != 1 {
            return Err(BackendError::Unsupported(
                "the deterministic mode runs one processor: the order in which several reach memory is the host's".into(),
            ));
        }
        Ok(Arc::new(SoftVm { shared: VmShared::new(config, self.translate_after), created: Mutex::new(0) }))
    }
}

/// One machine.
struct SoftVm {
    shared: Arc<VmShared>,
    /// Bit by processor that was made.
    created: Mutex<u64>,
}

impl BackendVm for SoftVm {
    fn create_vcpu(&self, id: VcpuId) -> Result<Box<dyn Vcpu>, BackendError> {
        let mut created = self.created.lock().unwrap_or_else(PoisonError::into_inner);
        if id as usize >= self.shared.attentions.len() {
            return Err(BackendError::Invalid(format!("no processor {id} in a machine of {}", self.shared.attentions.len())));
        }
        if *created & 1 << id != 0 {
            return Err(BackendError::Invalid(format!("processor {id} exists already")));
        }
        *created |= 1 << id;
        Ok(Box::new(SoftVcpu::new(Cpu::new(id, Arc::clone(&self.shared)))))
    }

    fn signal_msi(&self, address: u64, data: u32) {
        if let Some(bus) = &self.shared.apics
            && let Some(message) = Message::from_msi(address, data)
        {
            bus.deliver(&message);
        }
    }

    fn set_extint(&self, asserted: bool) {
        if let Some(bus) = &self.shared.apics {
            bus.set_extint(asserted);
        }
    }

    fn kick(&self, id: VcpuId) {
        if let Some(attention) = self.shared.attentions.get(id as usize) {
            attention.set(attention::KICK);
        }
    }

    fn wake(&self, id: VcpuId) {
        if let Some(attention) = self.shared.attentions.get(id as usize) {
            attention.wake();
        }
    }

    fn is_idle(&self) -> bool {
        self.shared.attentions.iter().all(|attention| attention.is_idle())
    }

    fn set_eoi_flag(&self, id: VcpuId, flag: Option<Arc<dyn EoiFlag>>) {
        if let Some(apic) = self.shared.apics.as_ref().and_then(|bus| bus.apic(id)) {
            apic.set_eoi_flag(flag);
        }
    }

    fn set_auto_eoi(&self, id: VcpuId, vector: u8, ends_by_itself: bool) -> bool {
        match self.shared.apics.as_ref().and_then(|bus| bus.apic(id)) {
            Some(apic) => {
                apic.set_auto_eoi(vector, ends_by_itself);
                true
            }
            None => false,
        }
    }

    fn read_local_apic(&self, id: VcpuId, offset: u64) -> Result<u64, MsrFault> {
        self.shared.apics.as_ref().and_then(|bus| bus.apic(id)).ok_or(MsrFault)?.read(offset)
    }

    fn write_local_apic(&self, id: VcpuId, offset: u64, value: u64) -> Result<Option<u8>, MsrFault> {
        self.shared.apics.as_ref().and_then(|bus| bus.apic(id)).ok_or(MsrFault)?.write(offset, value)
    }

    fn flush_translations(&self, caller: VcpuId, processors: u64, pages: Option<&[u64]>) {
        flush::flush_translations(&self.shared, caller, processors, pages);
    }

    fn protect(&self, gpa: u64, size: u64, protection: Protection) -> Result<(), BackendError> {
        self.shared.protect(gpa, size, protection)
    }
}

/// A contiguous range of RAM.
struct Region {
    gpa: u64,
    size: u64,
    host: *mut u8,
    code: CodeMap,
}

/// What the processors of a machine share.
pub(crate) struct VmShared {
    regions: Vec<Region>,
    /// Keeps what `regions` points into.
    _memory: GuestMemory,
    pub timers: Arc<Timers>,
    pub apics: Option<Arc<ApicBus>>,
    pub attentions: Vec<Arc<Attention>>,
    pub cpuid: CpuidTable,
    pub deterministic: bool,
    /// Executions of a block after which it is translated; `u32::MAX` for never.
    pub translate_after: u32,
    /// Held for locked accesses that one host instruction cannot do.
    pub bus_lock: Mutex<()>,
    /// By processor: pages that it must not write without being noticed any more, and how many it was told and has seen.
    code_pages: Vec<CodePages>,
    /// By processor: translations that others want it to forget.
    pub flushes: Vec<PageList>,
    protected: AtomicBool,
    protections: RwLock<HashMap<u64, Protection>>,
}

#[derive(Default)]
struct CodePages {
    pages: Mutex<Vec<u64>>,
    pending: AtomicU32,
}

// SAFETY: the host pointers lead to guest RAM, which lives as long as `_memory` and which all threads may access; they do so
// only by single host instructions or atomics.
unsafe impl Send for VmShared {}
// SAFETY: as above.
unsafe impl Sync for VmShared {}

impl VmShared {
    /// The shared part of a machine without processors.
    pub fn new(config: VmConfig, translate_after: u32) -> Arc<VmShared> {
        let regions = config
            .memory
            .iter()
            .map(|region| Region { gpa: region.start_addr().0, size: region.len(), host: region.as_ptr(), code: region.bitmap().clone() })
            .collect();
        let attentions: Vec<Arc<Attention>> = (0..config.vcpus).map(|_| Arc::default()).collect();
        let apics = config.local_apic.then(|| {
            let clients = attentions.iter().map(|attention| Arc::clone(attention) as Arc<dyn ApicClient>).collect();
            ApicBus::new(clients, &config.timers, ApicClock { tsc_hz: NANOSECOND_HZ.into(), timer_hz: NANOSECOND_HZ.into() })
        });
        Arc::new(VmShared {
            regions,
            _memory: config.memory,
            timers: config.timers,
            apics,
            code_pages: attentions.iter().map(|_| CodePages::default()).collect(),
            flushes: attentions.iter().map(|_| PageList::default()).collect(),
            attentions,
            cpuid: config.cpuid,
            deterministic: config.deterministic,
            translate_after: if config.deterministic { u32::MAX } else { translate_after },
            bus_lock: Mutex::default(),
            protected: AtomicBool::new(false),
            protections: RwLock::default(),
        })
    }

    /// Processors and memory, and nothing around them, for tests; all is interpreted.
    #[cfg(test)]
    pub fn plain(memory: &GuestMemory, vcpus: u32) -> Arc<VmShared> {
        let timers = Timers::new(Arc::new(vmm::time::HostClock::new()));
        let memory = Arc::clone(memory);
        VmShared::new(VmConfig { memory, vcpus, local_apic: false, cpuid: CpuidTable::default(), timers, deterministic: false }, u32::MAX)
    }

    /// Host address of the page that holds `gpa`, the code map of its region, and the page's number there.
    #[inline]
    pub fn ram(&self, gpa: u64) -> Option<(*mut u8, &CodeMap, usize)> {
        let region = self.regions.iter().find(|region| gpa.wrapping_sub(region.gpa) < region.size)?;
        let offset = (gpa - region.gpa) & !(PAGE_SIZE - 1);
        Some((region.host.wrapping_add(offset as usize), &region.code, (offset / PAGE_SIZE) as usize))
    }

    /// Copies bytes from `start` of the page at `gpa`; the page must be RAM and hold them all.
    pub fn read_page(&self, gpa: u64, start: usize, into: &mut [u8]) {
        let Some((host, _, _)) = self.ram(gpa) else { return };
        for (n, byte) in into.iter_mut().enumerate() {
            // SAFETY: the page is mapped, and `start + n` stays inside (the caller's promise, held by the mask).
            *byte = unsafe { &*host.add((start + n) & (PAGE_SIZE as usize - 1)).cast::<AtomicU8>() }.load(Ordering::Relaxed);
        }
    }

    fn entry_64(&self, gpa: u64) -> Option<&AtomicU64> {
        let (host, _, _) = self.ram(gpa)?;
        // SAFETY: the page is mapped, the offset is aligned and inside.
        Some(unsafe { &*host.add((gpa & (PAGE_SIZE - 8)) as usize).cast::<AtomicU64>() })
    }

    fn entry_32(&self, gpa: u64) -> Option<&AtomicU32> {
        let (host, _, _) = self.ram(gpa)?;
        // SAFETY: the page is mapped, the offset is aligned and inside.
        Some(unsafe { &*host.add((gpa & (PAGE_SIZE - 4)) as usize).cast::<AtomicU32>() })
    }

    /// Page-table entry at an 8-byte aligned address; outside RAM nothing is present.
    pub fn read_entry(&self, gpa: u64) -> u64 {
        self.entry_64(gpa).map_or(0, |entry| entry.load(Ordering::Relaxed))
    }

    /// Sets accessed and dirty bits as the processor does, locked.
    pub fn set_entry_bits(&self, gpa: u64, bits: u64) {
        if let Some(entry) = self.entry_64(gpa) {
            entry.fetch_or(bits, Ordering::SeqCst);
        }
    }

    /// Page-table entry at a 4-byte aligned address.
    pub fn read_entry_32(&self, gpa: u64) -> u32 {
        self.entry_32(gpa).map_or(0, |entry| entry.load(Ordering::Relaxed))
    }

    /// Sets accessed and dirty bits of a 4-byte entry.
    pub fn set_entry_bits_32(&self, gpa: u64, bits: u32) {
        if let Some(entry) = self.entry_32(gpa) {
            entry.fetch_or(bits, Ordering::SeqCst);
        }
    }

    /// Tells all processors but `own` that the page at `gpa` holds decoded instructions now.
    pub fn tell_code_page(&self, own: VcpuId, gpa: u64) {
        for (id, attention) in self.attentions.iter().enumerate() {
            if id == own as usize {
                continue;
            }
            let told = &self.code_pages[id];
            let mut pages = told.pages.lock().unwrap_or_else(PoisonError::into_inner);
            pages.push(gpa);
            told.pending.store(1, Ordering::SeqCst);
            drop(pages);
            attention.set(attention::CODE_PAGES);
        }
    }

    /// Whether some running processor has not yet seen what it was told. One that does not run looks before it does.
    pub fn code_page_unseen(&self, own: VcpuId) -> bool {
        self.attentions
            .iter()
            .enumerate()
            .any(|(id, attention)| id != own as usize && self.code_pages[id].pending.load(Ordering::SeqCst) != 0 && attention.in_guest())
    }

    /// The pages that processor `id` was told about.
    pub fn take_code_pages(&self, id: VcpuId) -> Vec<u64> {
        std::mem::take(&mut *self.code_pages[id as usize].pages.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Processor `id` has acted on what [`VmShared::take_code_pages`] gave it.
    pub fn code_pages_seen(&self, id: VcpuId) {
        let told = &self.code_pages[id as usize];
        let pages = told.pages.lock().unwrap_or_else(PoisonError::into_inner);
        if pages.is_empty() {
            told.pending.store(0, Ordering::SeqCst);
        }
    }

    /// Whether any page has less than all rights.
    #[inline(always)]
    pub fn has_protections(&self) -> bool {
        self.protected.load(Ordering::Relaxed)
    }

    /// What the guest may do with the page at `gpa`.
    pub fn protection(&self, gpa: u64) -> Protection {
        let protections = self.protections.read().unwrap_or_else(PoisonError::into_inner);
        protections.get(&(gpa & !(PAGE_SIZE - 1))).copied().unwrap_or(Protection::all())
    }

    fn protect(&self, gpa: u64, size: u64, protection: Protection) -> Result<(), BackendError> {
        let end = gpa.checked_add(size);
        let in_ram = self.regions.iter().any(|r| gpa >= r.gpa && end.is_some_and(|end| end <= r.gpa + r.size));
        if !gpa.is_multiple_of(PAGE_SIZE) || !size.is_multiple_of(PAGE_SIZE) || size == 0 || !in_ram {
            return Err(BackendError::Invalid(format!("protection of {size:#x} bytes at {gpa:#x}: whole pages of RAM are wanted")));
        }
        let mut protections = self.protections.write().unwrap_or_else(PoisonError::into_inner);
        for page in (gpa..gpa + size).step_by(PAGE_SIZE as usize) {
            if protection == Protection::all() {
                protections.remove(&page);
            } else {
                protections.insert(page, protection);
            }
        }
        self.protected.store(!protections.is_empty(), Ordering::SeqCst);
        drop(protections);
        for attention in &self.attentions {
            attention.set(attention::FLUSH);
        }
        Ok(())
    }
}
