//! What the guest shares with the hypervisor: the shared info, and each processor's vcpu info with its clock (`xen.h`).
//!
//! A guest says where these pages are; the words of events are changed atomically by both sides. To announce an event is to set its pending bit; if
//! that is new and the port is not masked, the word's bit in the selector; and if that is new, the flag "upcall pending" and the processor's
//! interrupt (`xen/common/event_2l.c`).

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use abi::apic::{MSI_ADDRESS_BASE, MSI_DESTINATION_SHIFT};
use abi::xen::shared_info::{self as words, vcpu_info};
use vm_memory::{Bytes, GuestAddress};
use vmm::memory::PAGE_SIZE;
use vmm::{GuestMemory, VcpuId};
use zerocopy::IntoBytes;

use super::SetLine;
use crate::Processors;
use crate::atomic;
use crate::kvm::clock::PvClock;
use crate::kvm::page::{holds, publish};

pub(super) struct Shared {
    memory: GuestMemory,
    /// Address of the shared info.
    page: Option<u64>,
    vcpus: Vec<Vcpu>,
    callback: Callback,
}

/// How processors without a vector of their own are told of events (`HVM_PARAM_CALLBACK_IRQ`).
#[derive(Default)]
pub(super) enum Callback {
    /// Not at all.
    #[default]
    Nothing,
    /// By a vector that ends by itself.
    Vector(u8),
    /// By a line, which is up while the first processor has something to look at; the others are not told.
    Line(SetLine),
}

#[derive(Debug, Default, Clone, Copy)]
struct Vcpu {
    /// Address of its vcpu info, once it left the shared info.
    info: Option<u64>,
    /// The vector of its upcalls.
    vector: Option<u8>,
}

impl Shared {
    pub fn new(memory: GuestMemory, vcpus: u32) -> Shared {
        Shared { memory, page: None, vcpus: vec![Vcpu::default(); vcpus as usize], callback: Callback::default() }
    }

    /// Whether there is such a processor.
    pub fn has_vcpu(&self, vcpu: VcpuId) -> bool {
        (vcpu as usize) < self.vcpus.len()
    }

    /// The page is at `gpa` from now on, with what is in it; when it is new, with the time. `false` when there is no memory.
    pub fn place(&mut self, gpa: u64, clock: &PvClock) -> bool {
        let mut content = [0; PAGE_SIZE as usize];
        if let Some(old) = self.page
            && self.memory.read_slice(&mut content, GuestAddress(old)).is_err()
        {
            return false;
        }
        if self.memory.write_slice(&content, GuestAddress(gpa)).is_err() {
            return false;
        }
        self.page = Some(gpa);
        for vcpu in 0..self.vcpus.len() as VcpuId {
            self.write_time(vcpu, clock);
        }
        publish(&self.memory, gpa + words::WALL_CLOCK, clock.started().as_bytes(), 0, 0).is_ok()
    }

    /// VCPUOP_register_vcpu_info: it moves to `gpa`. `false` when there is no memory, or it would cross a page.
    pub fn move_info(&mut self, vcpu: VcpuId, gpa: u64, clock: &PvClock) -> bool {
        if !gpa.is_multiple_of(8) || !holds(&self.memory, gpa, vcpu_info::SIZE as usize) {
            return false;
        }
        let mut content = [0; vcpu_info::SIZE as usize];
        let moved = match self.info(vcpu) {
            Some(old) => self.memory.read_slice(&mut content, GuestAddress(old)),
            None => Ok(()),
        };
        if moved.is_err() || self.memory.write_slice(&content, GuestAddress(gpa)).is_err() {
            return false;
        }
        let Some(known) = self.vcpus.get_mut(vcpu as usize) else { return false };
        known.info = Some(gpa);
        self.write_time(vcpu, clock);
        true
    }

    /// HVMOP_set_evtchn_upcall_vector. An upcall that waits already comes by it at once.
    pub fn set_vector(&mut self, vcpu: VcpuId, vector: u8, processors: Option<&Arc<dyn Processors>>) {
        if let Some(known) = self.vcpus.get_mut(vcpu as usize) {
            known.vector = Some(vector);
            if let Some(processors) = processors {
                // Such a vector is ended as any other, even if it was the callback's.
                processors.set_auto_eoi(vcpu, vector, false);
            }
            self.upcall(vcpu, processors);
        }
    }

    /// HVM_PARAM_CALLBACK_IRQ. `false` when this backend has no interrupts that end by themselves.
    pub fn set_callback(&mut self, callback: Callback, processors: Option<&Arc<dyn Processors>>) -> bool {
        let Some(known) = processors else { return matches!(callback, Callback::Nothing) };
        let set = |vector: u8, on: bool| (0..self.vcpus.len() as VcpuId).all(|vcpu| known.set_auto_eoi(vcpu, vector, on));
        if let Callback::Vector(old) = std::mem::take(&mut self.callback) {
            set(old, false);
        }
        if let Callback::Vector(new) = callback
            && !set(new, true)
        {
            return false;
        }
        self.callback = callback;
        (0..self.vcpus.len() as VcpuId).for_each(|vcpu| self.upcall(vcpu, processors));
        true
    }

    /// Sets a port pending; `true` when its processor has to be interrupted.
    pub fn set_pending(&self, port: u32, vcpu: VcpuId) -> bool {
        let (word, bit) = (u64::from(port / 64) * 8, 1u64 << (port % 64));
        let Some(page) = self.page else { return false };
        let set = |gpa: u64| atomic::with(&self.memory, gpa, |bits: &AtomicU64| bits.fetch_or(bit.to_le(), Ordering::SeqCst));
        let newly_pending = set(page + words::EVTCHN_PENDING + word).is_some_and(|old| old & bit.to_le() == 0);
        newly_pending && !self.is_set(page + words::EVTCHN_MASK + word, bit) && self.select(port, vcpu)
    }

    /// EVTCHNOP_unmask; `true` when the port's processor has to be interrupted.
    pub fn unmask(&self, port: u32, vcpu: VcpuId) -> bool {
        let (word, bit) = (u64::from(port / 64) * 8, 1u64 << (port % 64));
        let Some(page) = self.page else { return false };
        let mask = page + words::EVTCHN_MASK + word;
        let was_masked = atomic::with(&self.memory, mask, |bits: &AtomicU64| bits.fetch_and(!bit.to_le(), Ordering::SeqCst));
        let was_masked = was_masked.is_some_and(|old| old & bit.to_le() != 0);
        was_masked && self.is_set(page + words::EVTCHN_PENDING + word, bit) && self.select(port, vcpu)
    }

    /// Forgets what waits at a port that is closed.
    pub fn clear_pending(&self, port: u32) {
        let (word, bit) = (u64::from(port / 64) * 8, 1u64 << (port % 64));
        if let Some(page) = self.page {
            let pending = page + words::EVTCHN_PENDING + word;
            atomic::with(&self.memory, pending, |bits: &AtomicU64| bits.fetch_and(!bit.to_le(), Ordering::SeqCst));
        }
    }

    /// Interrupts a processor that has something to look at.
    pub fn upcall(&self, vcpu: VcpuId, processors: Option<&Arc<dyn Processors>>) {
        let (true, Some(processors)) = (self.is_waiting(vcpu), processors) else { return };
        match (self.vcpus.get(vcpu as usize).and_then(|vcpu| vcpu.vector), &self.callback) {
            // Processor numbers are APIC ids; an edge, fixed delivery.
            (Some(vector), _) | (None, &Callback::Vector(vector)) => {
                processors.signal_msi(MSI_ADDRESS_BASE | u64::from(vcpu) << MSI_DESTINATION_SHIFT, vector.into());
            }
            (None, Callback::Line(set)) if vcpu == 0 => set(true),
            (None, Callback::Line(_) | Callback::Nothing) => {}
        }
    }

    /// Lets the callback's line go if the first processor has nothing to look at any more (Xen: `hvm_maybe_deassert_evtchn_irq`).
    pub fn settle_line(&self) {
        if let Callback::Line(set) = &self.callback
            && !self.is_waiting(0)
        {
            set(false);
        }
    }

    /// Forgets where everything is.
    pub fn reset(&mut self, processors: Option<&Arc<dyn Processors>>) {
        self.set_callback(Callback::Nothing, processors);
        self.page = None;
        self.vcpus.fill(Vcpu::default());
    }

    /// Sets the selector's bit of a port; `true` when it is new.
    fn select(&self, port: u32, vcpu: VcpuId) -> bool {
        let Some(info) = self.info(vcpu) else { return false };
        let bit = 1u64 << (port / 64);
        let select = |bits: &AtomicU64| bits.fetch_or(bit.to_le(), Ordering::SeqCst) & bit.to_le() == 0;
        let is_new = atomic::with(&self.memory, info + vcpu_info::PENDING_SEL, select).unwrap_or(false);
        if is_new {
            atomic::with(&self.memory, info + vcpu_info::UPCALL_PENDING, |flag: &AtomicU8| flag.store(1, Ordering::SeqCst));
        }
        is_new
    }

    /// Whether a processor's flag "upcall pending" is set.
    fn is_waiting(&self, vcpu: VcpuId) -> bool {
        let flag =
            |info: u64| atomic::with(&self.memory, info + vcpu_info::UPCALL_PENDING, |flag: &AtomicU8| flag.load(Ordering::SeqCst) != 0);
        self.info(vcpu).and_then(flag).unwrap_or(false)
    }

    fn is_set(&self, gpa: u64, bit: u64) -> bool {
        atomic::with(&self.memory, gpa, |bits: &AtomicU64| bits.load(Ordering::SeqCst) & bit.to_le() != 0).unwrap_or(false)
    }

    /// Where a processor's vcpu info is.
    fn info(&self, vcpu: VcpuId) -> Option<u64> {
        let known = self.vcpus.get(vcpu as usize)?;
        known.info.or_else(|| self.page.filter(|_| vcpu < words::VCPUS).map(|page| page + u64::from(vcpu) * vcpu_info::SIZE))
    }

    /// The clock in a vcpu info. The TSC is stable and the same on all processors, so that it holds until the machine is reset.
    fn write_time(&self, vcpu: VcpuId, clock: &PvClock) {
        let Some(time) = self.info(vcpu).map(|info| info + vcpu_info::TIME) else { return };
        let version = self.memory.read_obj::<u32>(GuestAddress(time)).map(u32::from_le).unwrap_or(0);
        // Placed in memory, or it would not be here.
        let _ = publish(&self.memory, time, clock.reading().as_bytes(), 0, version);
    }
}
