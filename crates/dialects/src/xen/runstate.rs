//! What became of each processor's time: it ran, or was ready to run while the host ran something else (`vcpu.h`).
//!
//! A guest registers an area of its memory for each processor and reads it as it likes; Linux shows the second number in `/proc/stat` as stolen. The numbers come
//! from a [`StealSource`] and are written at intervals, as the KVM dialect writes its record (`kvm/steal.rs`). A processor that halts is counted as running:
//! what waits for an interrupt is not the host's fault.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use abi::xen::shared_info::{RUNNABLE, RUNNING, RUNSTATE_UPDATE, Runstate};
use vmm::{GuestMemory, VcpuId};
use zerocopy::little_endian::U64;

use crate::atomic;
use crate::kvm::StealSource;
use crate::kvm::clock::PvClock;
use crate::kvm::steal::Pace;

/// Words of a [`Runstate`].
const WORDS: usize = size_of::<Runstate>() / size_of::<u64>();
/// The word that tells when, which a reader compares before and after.
const ENTRY_TIME: usize = std::mem::offset_of!(Runstate, state_entry_time) / size_of::<u64>();

/// Guest physical addresses of the words of an area, which may lie across the end of a page.
pub(super) type Area = [u64; WORDS];

/// The areas of all processors.
pub(super) struct Runstates {
    memory: GuestMemory,
    clock: Arc<PvClock>,
    /// `None` where the host does not count.
    source: Option<Arc<dyn StealSource>>,
    areas: Vec<Option<Registered>>,
    /// Whether readers look at [`RUNSTATE_UPDATE`].
    marks: bool,
    pace: Pace,
}

#[derive(Clone, Copy)]
struct Registered {
    area: Area,
    /// Stolen time in it.
    stolen: u64,
}

impl Runstates {
    pub fn new(memory: GuestMemory, clock: Arc<PvClock>, source: Option<Arc<dyn StealSource>>, vcpus: u32) -> Runstates {
        Runstates { memory, clock, source, areas: vec![None; vcpus as usize], marks: false, pace: Pace::default() }
    }

    /// What became of a processor's time since the machine began.
    pub fn of(&self, vcpu: VcpuId) -> Runstate {
        let (now, stolen) = (self.clock.now(), self.stolen(vcpu));
        let mut state = Runstate { state_entry_time: now.into(), ..Runstate::default() };
        state.time[RUNNING] = now.saturating_sub(stolen).into();
        state.time[RUNNABLE] = stolen.into();
        state
    }

    /// VMASST_TYPE_runstate_update_flag: areas are marked while they change.
    pub fn mark(&mut self) {
        self.marks = true;
    }

    /// VCPUOP_register_runstate_memory_area: a processor has the area, or none any more. `false` when it is not in memory.
    pub fn register(&mut self, vcpu: VcpuId, area: Option<Area>) -> bool {
        let registered = area.map(|area| (area, self.of(vcpu)));
        if registered.as_ref().is_some_and(|(area, state)| self.write(area, state).is_none()) {
            return false;
        }
        if let Some(known) = self.areas.get_mut(vcpu as usize) {
            *known = registered.map(|(area, state)| Registered { area, stolen: state.time[RUNNABLE].get() });
        }
        self.pace = Pace::default();
        true
    }

    /// Brings all areas up to date. Nanoseconds until the next time, or `None` when there is nothing to tell, or nobody to be told.
    pub fn update(&mut self) -> Option<u64> {
        self.source.as_ref()?;
        let mut changed = false;
        for vcpu in 0..self.areas.len() {
            let Some(Registered { area, stolen }) = self.areas[vcpu] else { continue };
            let state = self.of(vcpu as VcpuId);
            let now_stolen = state.time[RUNNABLE].get();
            // In memory, or it would not be here.
            if now_stolen != stolen && self.write(&area, &state).is_some() {
                self.areas[vcpu] = Some(Registered { area, stolen: now_stolen });
                changed = true;
            }
        }
        let next = self.pace.next(changed);
        self.areas.iter().any(Option::is_some).then_some(next)
    }

    pub fn reset(&mut self) {
        self.areas.fill(None);
        self.marks = false;
    }

    fn stolen(&self, vcpu: VcpuId) -> u64 {
        self.source.as_ref().map_or(0, |source| source.stolen(vcpu))
    }

    /// `None` when a word is not in memory, or not aligned.
    fn write(&self, area: &Area, state: &Runstate) -> Option<()> {
        let words: [U64; WORDS] = zerocopy::transmute!(*state);
        let store = |at: u64, word: u64| atomic::with(&self.memory, at, |place: &AtomicU64| place.store(word.to_le(), Ordering::SeqCst));
        let entered = words[ENTRY_TIME].get();
        if self.marks {
            store(area[ENTRY_TIME], entered | RUNSTATE_UPDATE)?;
        }
        for (at, word) in area.iter().zip(words) {
            if *at != area[ENTRY_TIME] {
                store(*at, word.get())?;
            }
        }
        store(area[ENTRY_TIME], entered)
    }
}
