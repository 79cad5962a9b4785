//! A machine on KVM: memory slots, interrupt messages, protection.
//!
//! With a local APIC the irqchip is split (KVM_CAP_SPLIT_IRQCHIP): local APICs in the kernel, I/O APIC, 8259 pair and 8254 ours.
//! The kernel learns of the I/O APIC only what it needs to tell us an EOI: the messages its pins send, as GSI routes. Without
//! a local APIC there is no irqchip at all and interrupts come by KVM_INTERRUPT, as in vmm(4).

// KVM is given host addresses of guest memory.
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_CAP_EXIT_ON_EMULATION_FAILURE, KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X86_USER_SPACE_MSR, KVM_IRQ_ROUTING_MSI, KVM_MEM_READONLY,
    KVM_MSR_EXIT_REASON_FILTER, KVM_MSR_EXIT_REASON_UNKNOWN, KvmIrqRouting, kvm_enable_cap, kvm_irq_routing_entry,
    kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_msi, kvm_msi, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VmFd};
use vm_memory::{GuestMemoryBackend as _, GuestMemoryRegion as _};
use vmm::backend::IoapicRoute;
use vmm::{BackendError, BackendVm, Protection, Vcpu, VcpuId, VmConfig};

use crate::host_error;
use crate::kick::{Doorbell, Gate};
use crate::slots::{self, Kind, Piece};
use crate::vcpu::KvmVcpu;

/// Pins of our I/O APIC that KVM reserves routes for.
const IOAPIC_PINS: u32 = 24;
/// Three pages under the BIOS that Intel's KVM needs for real mode without unrestricted guest: the identity page table, then the
/// task state segment (api.rst, KVM_SET_IDENTITY_MAP_ADDR, KVM_SET_TSS_ADDR). Below the largest BIOS, above all RAM under 4 GiB.
const IDENTITY_MAP: u64 = 0xfeff_c000;
const TASK_STATE: usize = 0xfeff_d000;
/// MSRs of the other hypervisors' dialects, which KVM would answer itself when it sees their CPUID leaves (TLFS appendix F:
/// 0x40000000 to 0x400001ff; ours reach a little further). They belong to the dialects.
const DIALECT_MSRS: u32 = 0x4000_0000;
const DIALECT_MSR_COUNT: u32 = 0x1100;

/// A machine.
pub(crate) struct KvmVm {
    shared: Arc<Shared>,
}

/// What a machine's processors share.
pub(crate) struct Shared {
    pub(crate) fd: VmFd,
    pub(crate) config: VmConfig,
    pub(crate) doorbells: Vec<Doorbell>,
    pub(crate) gate: Gate,
    pub(crate) extint: AtomicBool,
    read_only_slots: bool,
    slots: Mutex<Slots>,
}

#[derive(Default)]
struct Slots {
    /// All memory, sorted, holes included.
    pieces: Vec<Piece>,
    /// The kernel's slots by number; `None` is free.
    kernel: Vec<Option<Piece>>,
    created: Vec<bool>,
}

impl KvmVm {
    pub(crate) fn new(kvm: &Kvm, config: VmConfig) -> Result<KvmVm, BackendError> {
        if config.deterministic {
            return Err(BackendError::Unsupported("deterministic runs need the software CPU: --backend soft".into()));
        }
        if config.vcpus == 0 || config.vcpus as usize > kvm.get_max_vcpus() {
            return Err(BackendError::Invalid(format!("{} processors, but this KVM takes 1 to {}", config.vcpus, kvm.get_max_vcpus())));
        }
        let fd = loop {
            match kvm.create_vm() {
                // A signal came in the middle of it; nothing was made.
                Err(error) if error.errno() == libc::EINTR => {}
                result => break result.map_err(|e| host_error("KVM_CREATE_VM", e))?,
            }
        };
        // Both are for Intel only; others refuse them and need neither.
        if let Err(error) = fd.set_identity_map_address(IDENTITY_MAP).and_then(|()| fd.set_tss_address(TASK_STATE)) {
            tracing::debug!(%error, "no real-mode pages");
        }
        if config.local_apic {
            if !fd.check_extension(Cap::SplitIrqchip) {
                return Err(BackendError::Unsupported("this KVM has no split irqchip (KVM_CAP_SPLIT_IRQCHIP, Linux 4.4)".into()));
            }
            enable(&fd, KVM_CAP_SPLIT_IRQCHIP, u64::from(IOAPIC_PINS))?;
        }
        route_unknown_msrs(&fd);
        let mut pieces = Vec::new();
        for region in config.memory.iter() {
            let hva = region.get_host_address(vm_memory::MemoryRegionAddress(0)).map_err(|e| BackendError::Invalid(e.to_string()))?;
            pieces.push(Piece { gpa: region.start_addr().0, size: region.len(), hva: hva as u64, kind: Kind::Open });
        }
        pieces.sort_by_key(|p| p.gpa);
        let mut slots = Slots { pieces, kernel: Vec::new(), created: vec![false; config.vcpus as usize] };
        slots.apply(&fd)?;
        let doorbells = (0..config.vcpus).map(|_| Doorbell::default()).collect();
        let read_only_slots = fd.check_extension(Cap::ReadonlyMem);
        Ok(KvmVm {
            shared: Arc::new(Shared {
                fd,
                config,
                doorbells,
                gate: Gate::default(),
                extint: AtomicBool::new(false),
                read_only_slots,
                slots: Mutex::new(slots),
            }),
        })
    }
}

impl BackendVm for KvmVm {
    fn create_vcpu(&self, id: VcpuId) -> Result<Box<dyn Vcpu>, BackendError> {
        {
            let mut slots = lock(&self.shared.slots);
            match slots.created.get_mut(id as usize) {
                None => return Err(BackendError::Invalid(format!("processor {id} of a machine with {}", self.shared.config.vcpus))),
                Some(true) => return Err(BackendError::Invalid(format!("processor {id} exists already"))),
                Some(created) => *created = true,
            }
        }
        Ok(Box::new(KvmVcpu::new(Arc::clone(&self.shared), id)?))
    }

    fn signal_msi(&self, address: u64, data: u32) {
        let msi = kvm_msi { address_lo: address as u32, address_hi: (address >> 32) as u32, data, ..Default::default() };
        if let Err(error) = self.shared.fd.signal_msi(msi) {
            tracing::debug!(address, data, %error, "KVM_SIGNAL_MSI");
        }
    }

    fn set_extint(&self, asserted: bool) {
        if self.shared.extint.swap(asserted, Ordering::SeqCst) != asserted && asserted {
            // LINT0 of the boot processor is the one that firmware and operating systems leave open for the 8259 pair.
            self.shared.doorbells[0].ring();
        }
    }

    fn set_ioapic_routes(&self, routes: &[Option<IoapicRoute>]) {
        if !self.shared.config.local_apic {
            return;
        }
        let entries: Vec<kvm_irq_routing_entry> = (0u32..)
            .zip(routes)
            .take(IOAPIC_PINS as usize)
            .filter_map(|(gsi, route)| {
                route.map(|route| kvm_irq_routing_entry {
                    gsi,
                    type_: KVM_IRQ_ROUTING_MSI,
                    u: kvm_irq_routing_entry__bindgen_ty_1 {
                        msi: kvm_irq_routing_msi {
                            address_lo: route.address as u32,
                            address_hi: (route.address >> 32) as u32,
                            data: route.data,
                            ..Default::default()
                        },
                    },
                    ..Default::default()
                })
            })
            .collect();
        let routing = KvmIrqRouting::from_entries(&entries).expect("24 entries are within KVM_MAX_IRQ_ROUTES");
        if let Err(error) = self.shared.fd.set_gsi_routing(&routing) {
            tracing::warn!(%error, "KVM_SET_GSI_ROUTING: level-triggered interrupts of the I/O APIC may hang");
        }
    }

    fn kick(&self, id: VcpuId) {
        if let Some(doorbell) = self.shared.doorbells.get(id as usize) {
            doorbell.kick();
        }
    }

    fn protect(&self, gpa: u64, size: u64, protection: Protection) -> Result<(), BackendError> {
        let Some(kind) = Kind::from_protection(protection) else {
            return Err(BackendError::Unsupported(format!(
                "KVM cannot allow only {protection:?} on guest memory: it knows everything, read and execute, or nothing; --backend soft knows all"
            )));
        };
        if kind == Kind::ReadOnly && !self.shared.read_only_slots {
            return Err(BackendError::Unsupported("this KVM has no read-only memory (KVM_CAP_READONLY_MEM)".into()));
        }
        self.shared.protect(gpa, size, kind)
    }
}

impl Shared {
    fn protect(&self, gpa: u64, size: u64, kind: Kind) -> Result<(), BackendError> {
        let mut slots = lock(&self.slots);
        let whole_pages = (gpa | size).is_multiple_of(vmm::memory::PAGE_SIZE);
        if !whole_pages || !slots::is_memory(&slots.pieces, gpa, size) {
            return Err(BackendError::Invalid(format!("{size:#x} bytes at {gpa:#x} are not whole pages of guest memory")));
        }
        if kind == Kind::Hole {
            // A fetch from a hole is an emulation failure, which KVM turns into #UD in user mode unless told otherwise.
            if let Err(error) = enable(&self.fd, KVM_CAP_EXIT_ON_EMULATION_FAILURE, 1) {
                tracing::debug!(%error, "fetches from protected pages in user mode raise #UD");
            }
        }
        let pieces = slots::protect(&slots.pieces, gpa, size, kind);
        // While a slot is taken away and put back in parts, no processor may see the gap.
        let _closed = self.gate.close(|| self.doorbells.iter().for_each(Doorbell::ring));
        slots.pieces = pieces;
        slots.apply(&self.fd)
    }

    /// What the guest may do at `gpa` now; `None` where there is no memory.
    pub(crate) fn kind_at(&self, gpa: u64) -> Option<Kind> {
        slots::find(&lock(&self.slots).pieces, gpa).map(|p| p.kind)
    }
}

impl Slots {
    /// Makes the kernel's slots equal to `pieces`.
    fn apply(&mut self, fd: &VmFd) -> Result<(), BackendError> {
        let wanted: Vec<Piece> = self.pieces.iter().filter(|p| p.kind != Kind::Hole).copied().collect();
        for (number, slot) in self.kernel.iter_mut().enumerate() {
            if let Some(piece) = slot.filter(|piece| !wanted.contains(piece)) {
                set_slot(fd, number, Piece { size: 0, ..piece })?;
                *slot = None;
            }
        }
        for piece in wanted {
            if self.kernel.contains(&Some(piece)) {
                continue;
            }
            let number = self.kernel.iter().position(Option::is_none).unwrap_or(self.kernel.len());
            set_slot(fd, number, piece)?;
            match self.kernel.get_mut(number) {
                Some(slot) => *slot = Some(piece),
                None => self.kernel.push(Some(piece)),
            }
        }
        Ok(())
    }
}

/// Makes, or with size 0 deletes, slot `number`.
fn set_slot(fd: &VmFd, number: usize, piece: Piece) -> Result<(), BackendError> {
    let region = kvm_userspace_memory_region {
        slot: number as u32,
        flags: if piece.kind == Kind::ReadOnly { KVM_MEM_READONLY } else { 0 },
        guest_phys_addr: piece.gpa,
        memory_size: piece.size,
        userspace_addr: piece.hva,
    };
    // SAFETY: the host range is part of a region of `VmConfig::memory`, which the machine keeps mapped as long as its fd.
    unsafe { fd.set_user_memory_region(region) }
        .map_err(|e| host_error(&format!("KVM_SET_USER_MEMORY_REGION of {:#x} bytes at {:#x}", piece.size, piece.gpa), e))
}

/// Sends MSRs that KVM does not know, and those of the dialects, to us. Older kernels (before 5.10) cannot; their guests get #GP.
fn route_unknown_msrs(fd: &VmFd) {
    let reasons = u64::from(KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_FILTER);
    if let Err(error) = enable(fd, KVM_CAP_X86_USER_SPACE_MSR, reasons) {
        tracing::warn!(%error, "dialects that need MSRs will not work on this KVM (KVM_CAP_X86_USER_SPACE_MSR, Linux 5.10)");
        return;
    }
    // A zero bit denies.
    let denied = [0u8; (DIALECT_MSR_COUNT / 8) as usize];
    let range = MsrFilterRange {
        flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
        base: DIALECT_MSRS,
        msr_count: DIALECT_MSR_COUNT,
        bitmap: &denied,
    };
    if let Err(error) = fd.set_msr_filter(MsrFilterDefaultAction::ALLOW, &[range]) {
        tracing::warn!(%error, "KVM_X86_SET_MSR_FILTER: KVM may answer Hyper-V's MSRs itself");
    }
}

fn enable(fd: &VmFd, cap: u32, argument: u64) -> Result<(), BackendError> {
    let cap = kvm_enable_cap { cap, args: [argument, 0, 0, 0], ..Default::default() };
    fd.enable_cap(&cap).map_err(|e| host_error(&format!("KVM_ENABLE_CAP {}", cap.cap), e))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
