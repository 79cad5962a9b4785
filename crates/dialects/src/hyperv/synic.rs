//! The synthetic interrupt controller of one processor (TLFS 11): messages in slots, event flags, 16 sources of interrupts, four timers.
//!
//! ```text
//!   post_message --> queue of the source --slot empty--> slot, interrupt        <-- EOM: look again
//!   timer expires ----------------------/   slot full--> flag "more wait"
//!   signal_event --> event flag, interrupt if it was clear
//! ```
//!
//! Both pages are the guest's memory and changed by both sides at the same time: a message's kind is written last, and a slot that is full is looked at
//! once more after its flag was set, so that either the guest sees the flag or we see the slot empty.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

use abi::apic::{MSI_ADDRESS_BASE, MSI_DESTINATION_SHIFT};
use abi::hyperv::hypercall::MESSAGE_PAYLOAD;
use abi::hyperv::msr;
use abi::hyperv::synic::{EVENT_FLAGS, MESSAGE_FLAGS, MessageHeader, SLOT_SIZE, TimerExpired, message};
use vm_memory::{Bytes, GuestAddress};
use vmm::{GuestMemory, MsrFault, VcpuId};
use zerocopy::IntoBytes;

use super::page::PageMsr;
use super::timer::{Notice, Stimer};
use crate::{Processors, atomic};

/// Messages that wait for a slot at most.
pub(super) const MAX_WAITING: usize = 256;
/// First vector that is no exception and that a local APIC takes.
const FIRST_VECTOR: u64 = 16;
const SINTS: usize = msr::SINTS as usize;
const STIMERS: usize = msr::STIMERS as usize;

/// What a controller does things to.
pub(super) struct Outside<'a> {
    pub memory: &'a GuestMemory,
    pub processors: Option<&'a Arc<dyn Processors>>,
    /// Reference time.
    pub now: u64,
}

/// The controller.
#[derive(Default)]
pub(super) struct Controller {
    vp: VcpuId,
    control: u64,
    messages: PageMsr,
    flags: PageMsr,
    sources: [Source; SINTS],
    timers: [Stimer; STIMERS],
}

/// An interrupt source.
struct Source {
    config: u64,
    waiting: VecDeque<Message>,
}

impl Default for Source {
    fn default() -> Source {
        Source { config: msr::sint::RESET, waiting: VecDeque::new() }
    }
}

struct Message {
    kind: u32,
    payload: Vec<u8>,
}

impl Controller {
    pub fn new(vp: VcpuId) -> Controller {
        Controller { vp, ..Controller::default() }
    }

    /// RDMSR. `None` when the index is not the controller's.
    pub fn read_msr(&self, index: u32) -> Option<Result<u64, MsrFault>> {
        Some(Ok(match index {
            msr::SCONTROL => self.control,
            msr::SVERSION => msr::SVERSION_1,
            msr::SIEFP => self.flags.0,
            msr::SIMP => self.messages.0,
            msr::EOM => 0,
            _ => match Register::at(index)? {
                Register::Sint(sint) => self.sources.get(sint)?.config,
                Register::TimerConfig(timer) => self.timers.get(timer)?.config(),
                Register::TimerCount(timer) => self.timers.get(timer)?.count(),
            },
        }))
    }

    /// WRMSR. `None` when the index is not the controller's.
    pub fn write_msr(&mut self, index: u32, value: u64, outside: &Outside<'_>) -> Option<Result<(), MsrFault>> {
        match index {
            msr::SCONTROL => self.set_control(value),
            msr::SVERSION => return Some(Err(MsrFault)),
            msr::SIEFP => return Some(place(&mut self.flags, value, outside.memory)),
            msr::SIMP => return Some(place(&mut self.messages, value, outside.memory)),
            msr::EOM => {}
            _ => match Register::at(index)? {
                Register::Sint(sint) => return Some(self.set_sint(sint, value, outside)),
                Register::TimerConfig(timer) => self.timers.get_mut(timer)?.set_config(value, outside.now),
                Register::TimerCount(timer) => self.timers.get_mut(timer)?.set_count(value, outside.now),
            },
        }
        self.deliver(outside);
        Some(Ok(()))
    }

    /// Queues a message. `false` when the controller is off or too much waits.
    pub fn post(&mut self, sint: u8, kind: u32, payload: &[u8], outside: &Outside<'_>) -> bool {
        let can = self.is_on() && self.messages.address().is_some() && payload.len() <= MESSAGE_PAYLOAD;
        let Some(source) = self.sources.get_mut(usize::from(sint)).filter(|source| can && source.waiting.len() < MAX_WAITING) else {
            return false;
        };
        source.waiting.push_back(Message { kind, payload: payload.to_vec() });
        self.deliver(outside);
        true
    }

    /// Sets an event flag. `false` when the controller is off or there is no such flag.
    pub fn signal(&mut self, sint: u8, flag: u16, outside: &Outside<'_>) -> bool {
        let page = self.flags.address().filter(|_| self.is_on() && flag < EVENT_FLAGS && usize::from(sint) < SINTS);
        let Some(page) = page else { return false };
        let (word, bit) = (u64::from(flag / 64) * 8, (1u64 << (flag % 64)).to_le());
        let gpa = page + u64::from(sint) * SLOT_SIZE + word;
        let old = atomic::with(outside.memory, gpa, |bits: &AtomicU64| bits.fetch_or(bit, Ordering::SeqCst));
        if old.is_some_and(|old| old & bit == 0) {
            self.interrupt(usize::from(sint), outside);
        }
        old.is_some()
    }

    /// Interrupts by a source as if there was something at it.
    pub fn raise(&self, sint: u8, outside: &Outside<'_>) {
        if self.is_on() {
            self.interrupt(sint.into(), outside);
        }
    }

    /// Tells the guest of timers that have expired and of what waits, as far as there is room.
    pub fn deliver(&mut self, outside: &Outside<'_>) {
        for sint in 0..SINTS {
            self.deliver_messages(sint, outside);
        }
        for index in 0..STIMERS {
            self.deliver_timer(index, outside);
        }
    }

    /// Reference time at which each timer expires.
    pub fn due(&self) -> impl Iterator<Item = Option<u64>> + '_ {
        self.timers.iter().map(Stimer::due)
    }

    /// As the processor comes up.
    pub fn reset(&mut self, outside: &Outside<'_>) {
        for sint in 0..SINTS {
            // Masked: it takes every value.
            let _ = self.set_sint(sint, msr::sint::RESET, outside);
        }
        *self = Controller::new(self.vp);
    }

    fn is_on(&self) -> bool {
        self.control & msr::SCONTROL_ENABLE != 0
    }

    /// What waits for a controller that is turned off is forgotten: another kernel may turn it on.
    fn set_control(&mut self, value: u64) {
        self.control = value;
        if !self.is_on() {
            self.sources.iter_mut().for_each(|source| source.waiting.clear());
        }
    }

    fn set_sint(&mut self, sint: usize, config: u64, outside: &Outside<'_>) -> Result<(), MsrFault> {
        if config & msr::sint::MASKED == 0 && config & 0xff < FIRST_VECTOR {
            return Err(MsrFault);
        }
        let source = self.sources.get_mut(sint).ok_or(MsrFault)?;
        let old = std::mem::replace(&mut source.config, config);
        for vector in [old as u8, config as u8] {
            self.set_auto_eoi(vector, outside);
        }
        Ok(())
    }

    /// Whether interrupts with a vector end by themselves: if one of the sources that have it says so.
    fn set_auto_eoi(&self, vector: u8, outside: &Outside<'_>) {
        let says_so = |source: &Source| {
            source.config as u8 == vector && source.config & (msr::sint::AUTO_EOI | msr::sint::MASKED) == msr::sint::AUTO_EOI
        };
        let ends_by_itself = self.sources.iter().any(says_so);
        if let Some(processors) = outside.processors
            && !processors.set_auto_eoi(self.vp, vector, ends_by_itself)
            && ends_by_itself
        {
            tracing::warn!(vp = self.vp, vector, "hyperv: interrupts cannot end by themselves on this backend");
        }
    }

    fn deliver_messages(&mut self, sint: usize, outside: &Outside<'_>) {
        while let Some(source) = self.sources.get(sint)
            && let Some(message) = source.waiting.front()
        {
            if !self.place(sint, message.kind, &message.payload, source.waiting.len() > 1, outside) {
                return;
            }
            if let Some(source) = self.sources.get_mut(sint) {
                source.waiting.pop_front();
            }
            self.interrupt(sint, outside);
        }
    }

    fn deliver_timer(&mut self, index: usize, outside: &Outside<'_>) {
        let Some((expiration, notice)) = self.timers.get_mut(index).and_then(|timer| timer.expired(outside.now)) else { return };
        match notice {
            Notice::Vector(vector) => self.send(vector, outside),
            Notice::Message(sint) => {
                let (expiration, delivery) = (expiration.into(), outside.now.into());
                let payload = TimerExpired { index: (index as u32).into(), reserved: 0.into(), expiration, delivery };
                if !self.place(sint.into(), message::TIMER_EXPIRED, payload.as_bytes(), false, outside) {
                    return;
                }
                self.interrupt(sint.into(), outside);
            }
        }
        if let Some(timer) = self.timers.get_mut(index) {
            timer.delivered(outside.now);
        }
    }

    /// Puts a message into its slot if that is empty; else the guest will find there that more wait.
    fn place(&self, sint: usize, kind: u32, payload: &[u8], more: bool, outside: &Outside<'_>) -> bool {
        let memory = outside.memory;
        let Some(page) = self.messages.address().filter(|_| self.is_on()) else { return false };
        let slot = page + sint as u64 * SLOT_SIZE;
        let is_full = || atomic::with(memory, slot, |kind: &AtomicU32| kind.load(Ordering::SeqCst) != message::NONE).unwrap_or(true);
        if is_full() {
            atomic::with(memory, slot + MESSAGE_FLAGS, |flags: &AtomicU8| flags.fetch_or(message::PENDING, Ordering::SeqCst));
            if is_full() {
                return false;
            }
        }
        let flags = if more { message::PENDING } else { 0 };
        let header = MessageHeader { size: payload.len() as u8, flags, ..MessageHeader::default() };
        let at = |offset: usize| GuestAddress(slot + offset as u64);
        let written =
            memory.write_slice(header.as_bytes(), at(0)).is_ok() && memory.write_slice(payload, at(size_of::<MessageHeader>())).is_ok();
        written && atomic::with(memory, slot, |word: &AtomicU32| word.store(kind.to_le(), Ordering::SeqCst)).is_some()
    }

    fn interrupt(&self, sint: usize, outside: &Outside<'_>) {
        let Some(source) = self.sources.get(sint) else { return };
        if source.config & (msr::sint::MASKED | msr::sint::POLLING) == 0 {
            self.send(source.config as u8, outside);
        }
    }

    fn send(&self, vector: u8, outside: &Outside<'_>) {
        if let Some(processors) = outside.processors {
            interrupt(processors, self.vp, vector);
        }
    }
}

/// Interrupts a processor: an edge, fixed delivery. Processor numbers are APIC ids.
pub(super) fn interrupt(processors: &Arc<dyn Processors>, vp: VcpuId, vector: u8) {
    processors.signal_msi(MSI_ADDRESS_BASE | u64::from(vp) << MSI_DESTINATION_SHIFT, vector.into());
}

/// The guest says where a page is. It finds it empty.
fn place(page: &mut PageMsr, value: u64, memory: &GuestMemory) -> Result<(), MsrFault> {
    let new = PageMsr::checked(memory, value)?;
    new.clear_if_new(*page, memory)?;
    *page = new;
    Ok(())
}

/// The numbered registers.
enum Register {
    Sint(usize),
    TimerConfig(usize),
    TimerCount(usize),
}

impl Register {
    fn at(index: u32) -> Option<Register> {
        let timers = msr::STIMER0_CONFIG..msr::STIMER0_CONFIG + 2 * msr::STIMERS;
        let offset = index.checked_sub(timers.start).filter(|_| timers.contains(&index)).map(|offset| offset as usize);
        match (index.checked_sub(msr::SINT0), offset) {
            (Some(sint), _) if sint < msr::SINTS => Some(Register::Sint(sint as usize)),
            (_, Some(offset)) if offset % 2 == 0 => Some(Register::TimerConfig(offset / 2)),
            (_, Some(offset)) => Some(Register::TimerCount(offset / 2)),
            _ => None,
        }
    }
}
