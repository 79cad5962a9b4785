//! The local APIC of each processor, for backends that have none of their own (KVM keeps it in the kernel).
//!
//! Intel SDM vol. 3 chapter 11. Both register interfaces: xAPIC by memory ([`LocalApic::mmio_read`]) and x2APIC by MSR
//! ([`LocalApic::read_msr`]); all delivery modes, logical destinations, and the timer with TSC deadline.
//!
//! ```text
//!   devices, I/O APIC --message--> ApicBus --> LocalApic --attention--> ApicClient (wakes a halted processor)
//!   8259 pair --INTR-- LINT0 ------^  ^           |  ^
//!                                     +---ICR-----+  +-- the processor asks work(), pending_interrupt(), acknowledge()
//! ```
//!
//! The processor looks at one atomic word ([`LocalApic::work`]) between blocks; everything else takes a lock that is
//! hardly ever contended. An EOI of a level-triggered vector is handed back to the caller, who tells the I/O APIC.
//!
//! A guest with an [`EoiFlag`] ends most interrupts by clearing it. What is in service is then out of date until its processor asks: what the
//! processor calls settles that first, what other threads call leaves it open and gives the processor work when it may matter.

mod bus;
mod registers;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use abi::apic::*;
use vmm::time::{Timer, TimerClient, Timers};
use vmm::{EoiFlag, MsrFault};

pub use self::bus::{ApicBus, Message};
use self::bus::{Shorthand, widen};
pub use self::registers::ApicClock;
use self::registers::{Lvt, Registers, VERSION};
use crate::snapshot::{RestoreError, Saved, Snapshot};

/// Name and version in a [`Saved`] state.
const STATE: (&str, u32) = ("lapic", 2);
/// Bits of IA32_APIC_BASE that a guest may set, besides the address.
const BASE_FLAGS: u64 = APIC_BASE_BSP | APIC_BASE_EXTD | APIC_BASE_ENABLE;
/// The address field of IA32_APIC_BASE, for 46 physical address bits.
const BASE_ADDRESS: u64 = ((1 << 46) - 1) & !0xfff;
/// ICR bits that x2APIC mode does not reserve, SDM figure 11-28.
const X2APIC_ICR_LOW: u64 = 0x000c_cfff;
/// Size of the xAPIC's register page.
const PAGE: u64 = 0x1000;

/// Who runs on this local APIC's interrupts: a processor.
pub trait ApicClient: Send + Sync {
    /// There is something new in [`LocalApic::work`]. Called on any thread; must not block.
    fn attention(&self);
}

/// What waits for a processor, as one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Work(u32);

impl Work {
    const INTERRUPT: u32 = 1;
    const NMI: u32 = 2;
    const INIT: u32 = 4;
    const SIPI: u32 = 8;
    /// Not work: the guest may have ended its interrupt by the flag.
    const EOI_OFFERED: u32 = 16;

    /// Nothing at all.
    pub fn is_empty(self) -> bool {
        self.0 & !Work::EOI_OFFERED == 0
    }
    /// An interrupt that the processor takes when RFLAGS.IF allows.
    pub fn has_interrupt(self) -> bool {
        self.0 & Work::INTERRUPT != 0
    }
    /// A non-maskable interrupt.
    pub fn has_nmi(self) -> bool {
        self.0 & Work::NMI != 0
    }
    /// An INIT.
    pub fn has_init(self) -> bool {
        self.0 & Work::INIT != 0
    }
    /// A start-up message. A processor that does not wait for one takes and drops it.
    pub fn has_sipi(self) -> bool {
        self.0 & Work::SIPI != 0
    }
}

/// The maskable interrupt to take next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PendingInterrupt {
    /// From the 8259 pair; the vector comes from [`vmm::Bus::acknowledge_extint`].
    ExtInt,
    /// From the local APIC; [`LocalApic::acknowledge`] takes it.
    Vector(u8),
}

/// One processor's local APIC.
pub struct LocalApic {
    id: u32,
    /// [`Work`], kept current under the lock of `registers`.
    work: AtomicU32,
    /// IA32_APIC_BASE, a copy for reading without the lock.
    base: AtomicU64,
    registers: Mutex<Registers>,
    /// Locked before `registers` by those who need both.
    eoi_flag: Mutex<Option<Arc<dyn EoiFlag>>>,
    /// Vectors that are never in service. Not the guest's, and so no part of the registers.
    auto_eoi: [AtomicU32; 8],
    client: Arc<dyn ApicClient>,
    bus: Weak<ApicBus>,
    timers: Arc<Timers>,
    timer: OnceLock<Timer>,
    clock: ApicClock,
}

impl LocalApic {
    fn new(id: u32, client: Arc<dyn ApicClient>, bus: Weak<ApicBus>, timers: Arc<Timers>, clock: ApicClock) -> Arc<LocalApic> {
        let registers = Registers::new(id);
        let apic = Arc::new(LocalApic {
            id,
            work: AtomicU32::new(0),
            base: AtomicU64::new(registers.base),
            registers: Mutex::new(registers),
            eoi_flag: Mutex::default(),
            auto_eoi: Default::default(),
            client,
            bus,
            timers: Arc::clone(&timers),
            timer: OnceLock::new(),
            clock,
        });
        let weak: Weak<dyn TimerClient> = Arc::<LocalApic>::downgrade(&apic);
        let _ = apic.timer.set(timers.timer(weak, 0));
        apic
    }

    /// APIC id.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// What waits for the processor; one atomic load.
    pub fn work(&self) -> Work {
        Work(self.work.load(Ordering::Acquire))
    }

    /// Whether anything waits for the processor; one atomic load.
    pub fn has_work(&self) -> bool {
        !self.work().is_empty()
    }

    /// The maskable interrupt to take when RFLAGS.IF allows.
    pub fn pending_interrupt(&self) -> Option<PendingInterrupt> {
        self.settle();
        let registers = self.lock();
        if registers.extint() { Some(PendingInterrupt::ExtInt) } else { registers.deliverable().map(PendingInterrupt::Vector) }
    }

    /// Takes the highest requested vector into service. The spurious vector when there is none.
    pub fn acknowledge(&self) -> u8 {
        self.settle();
        let flag = self.lock_flag();
        self.change(|registers| {
            let Some(vector) = registers.deliverable() else { return registers.svr as u8 };
            registers::clear(&mut registers.irr, vector);
            if self.ends_by_itself(vector) {
                return vector;
            }
            registers::set(&mut registers.isr, vector);
            registers.eoi_offered = registers.ends_silently() && flag.as_ref().is_some_and(|flag| flag.offer());
            vector
        })
    }

    /// Whether interrupts with this vector are never in service, see [`vmm::BackendVm::set_auto_eoi`].
    pub fn set_auto_eoi(&self, vector: u8, ends_by_itself: bool) {
        let (word, bit) = (&self.auto_eoi[usize::from(vector >> 5)], 1 << (vector & 31));
        match ends_by_itself {
            true => word.fetch_or(bit, Ordering::AcqRel),
            false => word.fetch_and(!bit, Ordering::AcqRel),
        };
    }

    fn ends_by_itself(&self, vector: u8) -> bool {
        self.auto_eoi[usize::from(vector >> 5)].load(Ordering::Acquire) & 1 << (vector & 31) != 0
    }

    /// Sets, changes or removes the flag for silent ends of interrupts, see [`vmm::BackendVm::set_eoi_flag`].
    pub fn set_eoi_flag(&self, flag: Option<Arc<dyn EoiFlag>>) {
        let mut own = self.lock_flag();
        // After a restore an offer may be open whose flag comes only now.
        if own.is_some() {
            self.settle_with(own.as_ref());
        }
        *own = flag;
    }

    /// Takes the NMI, if one waits.
    pub fn take_nmi(&self) -> bool {
        self.change(|registers| std::mem::take(&mut registers.nmi))
    }

    /// Takes the INIT, if one waits; the local APIC is then as after INIT.
    pub fn take_init(&self) -> bool {
        if self.lock().init {
            // As KVM does (`kvm_lapic_reset`).
            self.set_eoi_flag(None);
        }
        self.change(|registers| {
            let init = std::mem::take(&mut registers.init);
            if init {
                // A start-up message that came after the INIT is still to be taken.
                let sipi = registers.sipi;
                registers.clear();
                registers.sipi = sipi;
            }
            init
        })
    }

    /// Takes the start-up message, if one waits: the page number to start at.
    pub fn take_sipi(&self) -> Option<u8> {
        self.change(|registers| registers.sipi.take())
    }

    /// Power-on state, except for the level of the pins.
    pub fn reset(&self) {
        self.set_eoi_flag(None);
        self.change(|registers| {
            let (lint0, lint1) = (registers.lint0, registers.lint1);
            *registers = Registers { lint0, lint1, ..Registers::new(self.id) };
        });
    }

    /// Address of the register page when the registers are reached by memory (enabled and not in x2APIC mode).
    pub fn mmio_page(&self) -> Option<u64> {
        let base = self.base.load(Ordering::Relaxed);
        (base & (APIC_BASE_ENABLE | APIC_BASE_EXTD) == APIC_BASE_ENABLE).then_some(base & BASE_ADDRESS)
    }

    /// IA32_APIC_BASE.
    pub fn apic_base(&self) -> u64 {
        self.base.load(Ordering::Relaxed)
    }

    /// WRMSR to IA32_APIC_BASE, SDM 11.12.5: reserved bits and forbidden transitions fault.
    ///
    /// # Errors
    /// [`MsrFault`] for those.
    pub fn set_apic_base(&self, value: u64) -> Result<(), MsrFault> {
        self.settle();
        if value & !(BASE_FLAGS | BASE_ADDRESS) != 0 {
            return Err(MsrFault);
        }
        self.change(|registers| {
            const BOTH: u64 = APIC_BASE_ENABLE | APIC_BASE_EXTD;
            match (registers.base & BOTH, value & BOTH) {
                (_, APIC_BASE_EXTD) | (0, BOTH) | (BOTH, APIC_BASE_ENABLE) => return Err(MsrFault),
                (old, 0) if old != 0 => registers.clear(),
                _ => {}
            }
            registers.base = value;
            self.base.store(value, Ordering::Relaxed);
            Ok(())
        })
    }

    /// CR8: the task priority's upper half.
    pub fn cr8(&self) -> u8 {
        self.lock().tpr >> 4
    }

    /// Sets CR8 (0 to 15).
    pub fn set_cr8(&self, value: u8) {
        self.change(|registers| registers.tpr = value << 4);
    }

    /// What this processor's time-stamp counter is ahead of the clock.
    pub fn tsc_offset(&self) -> u64 {
        self.lock().tsc_offset
    }

    /// Moves the time-stamp counter; an armed deadline moves with it.
    pub fn set_tsc_offset(&self, offset: u64) {
        self.change_timer(|registers, now, clock| {
            registers.tsc_offset = offset;
            let deadline = registers.tsc_deadline;
            registers.set_tsc_deadline(deadline, now, clock);
        });
    }

    /// Read of the register page at `offset`.
    pub fn mmio_read(&self, offset: u64, data: &mut [u8]) {
        self.settle();
        // Registers are 32 bits wide at multiples of 16; the rest of each 16 bytes reads as zero.
        let value = u128::from(self.read_register(offset & !0xf).unwrap_or(0)).to_le_bytes();
        for (byte, from) in data.iter_mut().zip(offset as usize & 0xf..) {
            *byte = value.get(from).copied().unwrap_or(0);
        }
    }

    /// Write to the register page. A vector comes back when its level-triggered interrupt ended by this write.
    pub fn mmio_write(&self, offset: u64, data: &[u8]) -> Option<u8> {
        self.settle();
        let (Some(&value), 0, true) = (data.first_chunk::<4>(), offset & 0xf, offset < PAGE) else { return None };
        let value = u32::from_le_bytes(value);
        match offset {
            offset::ICR_LOW => {
                let icr = self.change(|registers| {
                    registers.icr = registers.icr & !0xffff_ffff | u64::from(value) & X2APIC_ICR_LOW;
                    registers.icr
                });
                self.send(icr, widen((icr >> 56) as u8));
            }
            offset::ICR_HIGH => self.change(|registers| {
                registers.icr = registers.icr & 0xffff_ffff | u64::from(value & 0xff00_0000) << 32;
            }),
            offset::LDR => self.change(|registers| registers.logical_id = (value >> 24) as u8),
            offset::DFR => self.change(|registers| registers.dfr = value | 0x0fff_ffff),
            offset::EOI => return self.end_of_interrupt(),
            // Real ones take a new id; ours is fixed, as in the MADT.
            offset::ID => {}
            _ => self.write_common(offset, value),
        }
        None
    }

    /// RDMSR of IA32_APIC_BASE, IA32_TSC_DEADLINE or an x2APIC register.
    ///
    /// # Errors
    /// [`MsrFault`] outside x2APIC mode, and for what is not there or cannot be read.
    pub fn read_msr(&self, index: u32) -> Result<u64, MsrFault> {
        self.settle();
        match index {
            MSR_APIC_BASE => return Ok(self.apic_base()),
            MSR_TSC_DEADLINE => return Ok(self.lock().tsc_deadline),
            _ => {}
        }
        let offset = self.x2apic_offset(index)?;
        match offset {
            offset::ICR_LOW => Ok(self.lock().icr),
            offset::APR | offset::EOI | offset::RRD | offset::DFR | offset::ICR_HIGH | offset::SELF_IPI => Err(MsrFault),
            _ => self.read_register(offset).map(u64::from).ok_or(MsrFault),
        }
    }

    /// WRMSR of IA32_APIC_BASE, IA32_TSC_DEADLINE or an x2APIC register. A vector comes back when its level-triggered
    /// interrupt ended by this write.
    ///
    /// # Errors
    /// [`MsrFault`] outside x2APIC mode, for reserved bits, and for what is not there or cannot be written.
    pub fn write_msr(&self, index: u32, value: u64) -> Result<Option<u8>, MsrFault> {
        self.settle();
        match index {
            MSR_APIC_BASE => return self.set_apic_base(value).map(|()| None),
            MSR_TSC_DEADLINE => {
                self.change_timer(|registers, now, clock| registers.set_tsc_deadline(value, now, clock));
                return Ok(None);
            }
            _ => {}
        }
        let offset = self.x2apic_offset(index)?;
        let writable = match offset {
            offset::ICR_LOW => 0xffff_ffff_0000_0000 | X2APIC_ICR_LOW,
            offset::EOI | offset::ESR => 0,
            offset::TPR | offset::SELF_IPI => 0xff,
            offset::SVR => u64::from(0xff | SVR_ENABLE | SVR_NO_FOCUS),
            offset::INITIAL_COUNT => 0xffff_ffff,
            offset::DIVIDE => 0xb,
            _ => match Lvt::at(offset) {
                Some(entry) => u64::from(entry.writable() | entry.read_only()),
                None => return Err(MsrFault),
            },
        };
        if value & !writable != 0 {
            return Err(MsrFault);
        }
        match offset {
            offset::EOI => return Ok(self.end_of_interrupt()),
            offset::ICR_LOW => {
                self.change(|registers| registers.icr = value);
                self.send(value, (value >> 32) as u32);
            }
            offset::SELF_IPI => self.change(|registers| registers.request(value as u8, false)),
            _ => self.write_common(offset, value as u32),
        }
        Ok(None)
    }

    /// A register by its offset, as a hypervisor's own registers reach it in either mode. The ICR is one of 64 bits.
    ///
    /// # Errors
    /// [`MsrFault`] for what is not there or cannot be read.
    pub fn read(&self, offset: u64) -> Result<u64, MsrFault> {
        self.settle();
        match offset {
            offset::ICR_LOW => Ok(self.lock().icr),
            offset::EOI => Err(MsrFault),
            _ => self.read_register(offset).map(u64::from).ok_or(MsrFault),
        }
    }

    /// Writes a register by its offset, as [`LocalApic::read`] reads it. A vector comes back when its level-triggered interrupt ended by this write.
    ///
    /// # Errors
    /// [`MsrFault`] in x2APIC mode for what a write of its MSR would fault for.
    pub fn write(&self, offset: u64, value: u64) -> Result<Option<u8>, MsrFault> {
        if self.apic_base() & APIC_BASE_EXTD != 0 {
            return self.write_msr(MSR_X2APIC_FIRST + (offset >> 4) as u32, value);
        }
        if offset == offset::ICR_LOW {
            self.mmio_write(offset::ICR_HIGH, &((value >> 32) as u32).to_le_bytes());
        }
        Ok(self.mmio_write(offset, &(value as u32).to_le_bytes()))
    }

    /// Level of LINT0.
    fn set_lint0(&self, asserted: bool) {
        self.change(|registers| registers.set_pin(Lvt::Lint0, asserted));
    }

    /// Level of LINT1.
    fn set_lint1(&self, asserted: bool) {
        self.change(|registers| registers.set_pin(Lvt::Lint1, asserted));
    }

    fn is_addressed(&self, destination: u32, logical: bool) -> bool {
        self.lock().is_addressed(destination, logical)
    }

    fn takes_fixed(&self) -> bool {
        let registers = self.lock();
        registers.enabled() && registers.software_enabled()
    }

    fn ppr(&self) -> u8 {
        self.lock().ppr()
    }

    fn accept(&self, message: &Message) {
        self.change(|registers| {
            if registers.enabled() {
                registers.accept(message);
            }
        });
    }

    /// Executes what was written to the ICR. INIT level de-assert is of another age and has no effect.
    fn send(&self, icr: u64, destination: u32) {
        let low = icr as u32;
        let mode = (low >> 8 & 7) as u8;
        if mode == delivery::INIT && low & (ICR_LEVEL | ICR_ASSERT) == ICR_LEVEL {
            return;
        }
        if matches!(mode, delivery::FIXED | delivery::LOWEST_PRIORITY) && low as u8 & 0xf0 == 0 {
            self.change(|registers| registers.error(ESR_SEND_ILLEGAL));
            return;
        }
        // Interrupts between processors are always edges, SDM table 11-3.
        let message = Message { destination, logical: low & ICR_LOGICAL != 0, mode, vector: low as u8, level_triggered: false };
        if let Some(bus) = self.bus.upgrade() {
            bus.deliver_from(Some(self.id), Shorthand::of_icr(icr), &message);
        }
    }

    fn end_of_interrupt(&self) -> Option<u8> {
        self.change(Registers::end_of_interrupt)
    }

    fn x2apic_offset(&self, index: u32) -> Result<u64, MsrFault> {
        if !(MSR_X2APIC_FIRST..=MSR_X2APIC_LAST).contains(&index) || !self.lock().x2apic() {
            return Err(MsrFault);
        }
        Ok(u64::from(index - MSR_X2APIC_FIRST) << 4)
    }

    /// The register at `offset`; `None` when there is none.
    fn read_register(&self, offset: u64) -> Option<u32> {
        let now = self.timers.clock().now();
        let mut registers = self.lock();
        let vectors = |registers: &registers::Vectors| registers[offset as usize >> 4 & 7];
        Some(match offset {
            offset::ID if registers.x2apic() => registers.id,
            offset::ID => registers.id << 24,
            offset::VERSION => VERSION,
            offset::TPR => u32::from(registers.tpr),
            offset::APR | offset::PPR => u32::from(registers.ppr()),
            offset::EOI | offset::RRD => 0,
            offset::LDR if registers.x2apic() => registers.x2apic_ldr(),
            offset::LDR => u32::from(registers.logical_id) << 24,
            offset::DFR => registers.dfr,
            offset::SVR => registers.svr,
            offset::ISR..0x180 => vectors(&registers.isr),
            offset::TMR..0x200 => vectors(&registers.tmr),
            offset::IRR..0x280 => vectors(&registers.irr),
            offset::ESR => registers.esr,
            offset::ICR_LOW => registers.icr as u32,
            offset::ICR_HIGH => (registers.icr >> 32) as u32,
            offset::INITIAL_COUNT => registers.initial_count,
            offset::CURRENT_COUNT => registers.current_count(now, self.clock),
            offset::DIVIDE => registers.divide,
            _ => match Lvt::at(offset) {
                Some(entry) => registers.lvt(entry),
                None => {
                    registers.error(ESR_ILLEGAL_REGISTER);
                    return None;
                }
            },
        })
    }

    /// Writes that both interfaces have in common.
    fn write_common(&self, offset: u64, value: u32) {
        match offset {
            offset::TPR => self.change(|registers| registers.tpr = value as u8),
            offset::SVR => self.change_timer(|registers, _, _| registers.set_svr(value)),
            offset::ESR => self.change(|registers| registers.esr = std::mem::take(&mut registers.errors)),
            offset::INITIAL_COUNT => self.change_timer(|registers, now, clock| registers.start_timer(value, now, clock)),
            offset::DIVIDE => self.change_timer(|registers, now, clock| registers.set_divide(value, now, clock)),
            _ => match Lvt::at(offset) {
                Some(entry) => self.change_timer(|registers, _, _| registers.set_lvt(entry, value)),
                None => self.change(|registers| registers.error(ESR_ILLEGAL_REGISTER)),
            },
        }
    }

    /// Changes the registers, and the timer with them.
    fn change_timer<R>(&self, with: impl FnOnce(&mut Registers, u64, ApicClock) -> R) -> R {
        self.change(|registers| {
            let now = self.timers.clock().now();
            with(registers, now, self.clock)
        })
    }

    /// Changes the registers, then makes `work`, the timer and the client agree with them.
    fn change<R>(&self, with: impl FnOnce(&mut Registers) -> R) -> R {
        let mut registers = self.lock();
        let deadline = registers.deadline;
        let result = with(&mut registers);
        if registers.deadline != deadline
            && let Some(&timer) = self.timer.get()
        {
            self.timers.arm(timer, registers.deadline);
        }
        let mut work = 0;
        if registers.extint() || registers.deliverable().is_some() || registers.waits_for_offer() {
            work |= Work::INTERRUPT;
        }
        if registers.eoi_offered {
            work |= Work::EOI_OFFERED;
        }
        if registers.nmi {
            work |= Work::NMI;
        }
        if registers.init {
            work |= Work::INIT;
        }
        if registers.sipi.is_some() {
            work |= Work::SIPI;
        }
        let old = self.work.swap(work, Ordering::AcqRel);
        drop(registers);
        if work & !old & !Work::EOI_OFFERED != 0 {
            self.client.attention();
        }
        result
    }

    /// Finds out whether the guest has ended its interrupt by the flag. On the processor's thread only.
    fn settle(&self) {
        if self.work.load(Ordering::Relaxed) & Work::EOI_OFFERED != 0 {
            self.settle_with(self.lock_flag().as_ref());
        }
    }

    fn settle_with(&self, flag: Option<&Arc<dyn EoiFlag>>) {
        self.change(|registers| {
            if std::mem::take(&mut registers.eoi_offered) && flag.is_some_and(|flag| !flag.take_back()) {
                // Only edge-triggered ones are offered: nobody is to be told.
                registers.end_of_interrupt();
            }
        });
    }

    fn lock_flag(&self) -> MutexGuard<'_, Option<Arc<dyn EoiFlag>>> {
        self.eoi_flag.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl TimerClient for LocalApic {
    fn timer_due(&self, _token: u64) {
        self.change_timer(|registers, now, clock| {
            // The guest may have stopped or moved the timer between the deadline and this call.
            if registers.deadline.is_some_and(|deadline| deadline <= now) {
                registers.timer_expired(now, clock);
            }
        });
    }
}

impl Snapshot for LocalApic {
    fn state(&self) -> Saved {
        Saved::new(STATE.0, STATE.1, &*self.lock())
    }

    fn restore(&self, state: &Saved) -> Result<(), RestoreError> {
        let new: Registers = state.open(STATE.0, STATE.1)?;
        if new.id != self.id {
            return Err(RestoreError::Impossible { device: STATE.0, what: "the APIC id is another processor's" });
        }
        self.change(|registers| {
            self.base.store(new.base, Ordering::Relaxed);
            *registers = new;
        });
        Ok(())
    }
}
