//! Local APIC against the SDM's statements.

use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use proptest::prelude::*;
use vmm::time::{Clock, StepClock};

use super::*;
use crate::MsiSink;

#[derive(Default)]
struct Processor(AtomicUsize);

impl ApicClient for Processor {
    fn attention(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

struct Machine {
    clock: Arc<StepClock>,
    timers: Arc<Timers>,
    processors: Vec<Arc<Processor>>,
    bus: Arc<ApicBus>,
}

const GHZ: ApicClock = ApicClock { tsc_hz: 1_000_000_000, timer_hz: 1_000_000_000 };

fn machine(processors: usize) -> Machine {
    let clock = Arc::new(StepClock::new(Duration::ZERO));
    let timers = Timers::new(clock.clone());
    let processors: Vec<_> = (0..processors).map(|_| Arc::new(Processor::default())).collect();
    let clients = processors.iter().map(|p| Arc::clone(p) as Arc<dyn ApicClient>).collect();
    let bus = ApicBus::new(clients, &timers, GHZ);
    for apic in bus.apics() {
        write(apic, offset::SVR, 0x1ff);
    }
    Machine { clock, timers, processors, bus }
}

impl Machine {
    fn apic(&self, id: u32) -> &LocalApic {
        self.bus.apic(id).unwrap()
    }

    fn advance_to(&self, ns: u64) {
        self.clock.advance_to(ns);
        self.timers.run_due();
    }
}

fn write(apic: &LocalApic, offset: u64, value: u32) -> Option<u8> {
    apic.mmio_write(offset, &value.to_le_bytes())
}

fn read(apic: &LocalApic, offset: u64) -> u32 {
    let mut data = [0; 4];
    apic.mmio_read(offset, &mut data);
    u32::from_le_bytes(data)
}

fn x2apic(apic: &LocalApic) {
    apic.set_apic_base(apic.apic_base() | APIC_BASE_EXTD).unwrap();
}

#[test]
fn vector_that_ends_by_itself_is_never_in_service() {
    let m = machine(1);
    let apic = m.apic(0);
    let arrives = || {
        m.bus.signal_msi(0xfee0_0000, 0x55);
        apic.has_work() && apic.acknowledge() == 0x55
    };
    apic.set_auto_eoi(0x55, true);
    assert!(arrives() && arrives() && arrives());
    apic.set_auto_eoi(0x55, false);
    assert!(arrives());
    assert!(!arrives(), "in service, as any other");
}

#[test]
fn higher_class_is_delivered_first_and_eoi_unblocks_the_lower() {
    let m = machine(1);
    let apic = m.apic(0);
    m.bus.signal_msi(0xfee0_0000, 0x41);
    m.bus.signal_msi(0xfee0_0000, 0x52);
    assert_eq!(apic.pending_interrupt(), Some(PendingInterrupt::Vector(0x52)));
    assert_eq!(apic.acknowledge(), 0x52);
    assert!(!apic.has_work(), "the lower class waits for the EOI");
    assert_eq!(read(apic, offset::PPR), 0x50);
    assert_eq!(write(apic, offset::EOI, 0), None, "edge triggered: nobody is told");
    assert_eq!(apic.acknowledge(), 0x41);
}

#[test]
fn task_priority_holds_back_its_class() {
    let m = machine(1);
    let apic = m.apic(0);
    apic.set_cr8(4);
    m.bus.signal_msi(0xfee0_0000, 0x4f);
    assert!(!apic.has_work());
    let before = m.processors[0].0.load(Ordering::Relaxed);
    apic.set_cr8(3);
    assert!(apic.work().has_interrupt());
    assert_eq!(m.processors[0].0.load(Ordering::Relaxed), before + 1);
    assert_eq!(read(apic, offset::TPR), 0x30);
}

#[test]
fn end_of_level_triggered_interrupt_is_reported() {
    let m = machine(1);
    m.bus.signal_msi(0xfee0_0000, 0x61 | MSI_DATA_LEVEL);
    assert_eq!(m.apic(0).acknowledge(), 0x61);
    assert_eq!(write(m.apic(0), offset::EOI, 0), Some(0x61));
}

#[test]
fn hypervisors_registers_work_in_both_modes() {
    for x2 in [false, true] {
        let m = machine(2);
        if x2 {
            (0..2).for_each(|id| x2apic(m.apic(id)));
        }
        let destination = if x2 { 1 << 32 } else { 1 << 56 };
        m.apic(0).write(offset::ICR_LOW, destination | 0x4061).unwrap();
        assert_eq!((m.apic(0).has_work(), m.apic(1).acknowledge()), (false, 0x61));
        assert_eq!(m.apic(0).read(offset::ICR_LOW).unwrap() & 0xff, 0x61);
        m.apic(1).write(offset::TPR, 0x20).unwrap();
        assert_eq!(m.apic(1).read(offset::TPR), Ok(0x20));
        assert_eq!(m.apic(1).write(offset::EOI, 0), Ok(None));
        assert_eq!(m.apic(1).read(offset::ISR + 0x30), Ok(0), "it is no longer in service");
        assert_eq!(m.apic(1).read(offset::EOI), Err(MsrFault));
    }
}

#[test]
fn software_disabled_apic_takes_no_vectors_but_nmi_and_masks_its_lvt() {
    let m = machine(1);
    let apic = m.apic(0);
    write(apic, offset::LVT_TIMER, 0x40);
    write(apic, offset::SVR, 0xff);
    m.bus.signal_msi(0xfee0_0000, 0x50);
    assert!(!apic.has_work());
    assert_eq!(read(apic, offset::LVT_TIMER), 0x40 | LVT_MASKED);
    write(apic, offset::LVT_TIMER, 0x40);
    assert_eq!(read(apic, offset::LVT_TIMER), 0x40 | LVT_MASKED, "cannot be unmasked");
    m.bus.signal_msi(0xfee0_0000, u32::from(delivery::NMI) << 8);
    assert!(apic.take_nmi());
    assert!(!apic.take_nmi());
}

#[test]
fn init_and_sipi_are_taken_in_order() {
    let m = machine(2);
    write(m.apic(0), offset::ICR_HIGH, 1 << 24);
    write(m.apic(0), offset::ICR_LOW, 0xc500);
    write(m.apic(0), offset::ICR_LOW, 0x8500);
    write(m.apic(0), offset::ICR_LOW, 0x0699);
    let work = m.apic(1).work();
    assert!(work.has_init() && work.has_sipi());
    assert!(m.apic(1).take_init());
    assert_eq!(read(m.apic(1), offset::SVR), 0xff);
    assert_eq!(m.apic(1).take_sipi(), Some(0x99));
    assert!(!m.apic(1).has_work());
    assert!(!m.apic(0).has_work());
}

#[test]
fn shorthands_reach_whom_they_name() {
    let m = machine(3);
    let hit = |vector| m.bus.apics().iter().map(|a| registers::is_set(&a.lock().irr, vector)).collect::<Vec<_>>();
    write(m.apic(1), offset::ICR_LOW, 0x40 | 1 << 18);
    assert_eq!(hit(0x40), [false, true, false]);
    write(m.apic(1), offset::ICR_LOW, 0x41 | 2 << 18);
    assert_eq!(hit(0x41), [true, true, true]);
    write(m.apic(1), offset::ICR_LOW, 0x42 | 3 << 18);
    assert_eq!(hit(0x42), [true, false, true]);
}

#[test]
fn logical_destinations_match_in_flat_cluster_and_x2apic_mode() {
    let m = machine(3);
    let hit = |vector: u8, destination: u64| {
        m.bus.signal_msi(0xfee0_0000 | destination << 12 | MSI_ADDRESS_LOGICAL, u32::from(vector));
        m.bus.apics().iter().map(|a| registers::is_set(&a.lock().irr, vector)).collect::<Vec<_>>()
    };
    for (id, apic) in m.bus.apics().iter().enumerate() {
        write(apic, offset::LDR, 1 << (24 + id));
    }
    assert_eq!(hit(0x40, 5), [true, false, true]);
    for (id, apic) in m.bus.apics().iter().enumerate() {
        write(apic, offset::DFR, 0x0fff_ffff);
        write(apic, offset::LDR, if id == 2 { 0x21 } else { 0x11 << id } << 24);
    }
    assert_eq!(hit(0x41, 0x11), [true, false, false]);
    assert_eq!(hit(0x42, 0x21), [false, false, true]);
    for apic in m.bus.apics() {
        x2apic(apic);
    }
    assert_eq!(hit(0x43, 6), [false, true, true]);
    assert_eq!(m.apic(2).read_msr(0x80d), Ok(4));
}

#[test]
fn broadcast_reaches_all_in_both_modes() {
    let m = machine(2);
    x2apic(m.apic(1));
    m.bus.signal_msi(0xfeef_f000, 0x40);
    assert!(m.apic(0).has_work() && m.apic(1).has_work());
    m.apic(1).write_msr(0x830, 0xffff_ffff_0000_0041).unwrap();
    assert_eq!(m.apic(0).pending_interrupt(), Some(PendingInterrupt::Vector(0x41)));
}

#[test]
fn lowest_priority_goes_to_one_processor_with_the_lowest_priority() {
    let m = machine(2);
    m.apic(0).set_cr8(8);
    for _ in 0..4 {
        m.bus.signal_msi(0xfeef_f000, 0x140);
    }
    assert!(!registers::is_set(&m.apic(0).lock().irr, 0x40));
    assert!(registers::is_set(&m.apic(1).lock().irr, 0x40));
    m.apic(0).set_cr8(0);
    m.bus.signal_msi(0xfeef_f000, 0x150);
    m.bus.signal_msi(0xfeef_f000, 0x150);
    assert_eq!(m.apic(0).pending_interrupt(), Some(PendingInterrupt::Vector(0x50)), "equals take turns");
}

#[test]
fn illegal_vectors_end_in_the_error_status() {
    let m = machine(1);
    let apic = m.apic(0);
    write(apic, offset::LVT_ERROR, 0x70);
    write(apic, offset::ICR_LOW, 0x05 | 1 << 18);
    m.bus.signal_msi(0xfee0_0000, 0x0f);
    assert_eq!(apic.acknowledge(), 0x70);
    assert_eq!(read(apic, offset::ESR), 0, "latched by a write only");
    write(apic, offset::ESR, 0);
    assert_eq!(read(apic, offset::ESR), ESR_SEND_ILLEGAL | ESR_RECEIVE_ILLEGAL);
    write(apic, offset::ESR, 0);
    assert_eq!(read(apic, offset::ESR), 0);
    write(apic, offset::LVT_ERROR, 0x03);
    read(apic, 0x40);
    write(apic, offset::ESR, 0);
    assert_eq!(read(apic, offset::ESR), ESR_ILLEGAL_REGISTER | ESR_RECEIVE_ILLEGAL);
}

#[test]
fn one_shot_timer_counts_down_and_fires_once() {
    let m = machine(1);
    let apic = m.apic(0);
    write(apic, offset::DIVIDE, 0x3);
    write(apic, offset::LVT_TIMER, 0x30);
    write(apic, offset::INITIAL_COUNT, 1000);
    m.advance_to(8000);
    assert_eq!(read(apic, offset::CURRENT_COUNT), 500);
    assert!(!apic.has_work());
    m.advance_to(16_000);
    assert_eq!(apic.acknowledge(), 0x30);
    assert_eq!(read(apic, offset::CURRENT_COUNT), 0);
    assert_eq!(m.timers.next_deadline(), None);
}

#[test]
fn divide_codes_are_those_of_the_manual() {
    let m = machine(1);
    let apic = m.apic(0);
    write(apic, offset::LVT_TIMER, 0x30);
    for (code, divisor) in [(0x0, 2), (0x1, 4), (0x2, 8), (0x3, 16), (0x8, 32), (0x9, 64), (0xa, 128), (0xb, 1)] {
        write(apic, offset::DIVIDE, code);
        write(apic, offset::INITIAL_COUNT, 1000);
        assert_eq!(m.timers.next_deadline(), Some(m.clock.now() + 1000 * divisor));
    }
}

#[test]
fn periodic_timer_keeps_its_phase_and_does_not_make_up_for_lost_ticks() {
    let m = machine(1);
    let apic = m.apic(0);
    write(apic, offset::DIVIDE, 0xb);
    write(apic, offset::LVT_TIMER, 0x30 | LVT_TIMER_PERIODIC);
    write(apic, offset::INITIAL_COUNT, 100_000);
    m.advance_to(350_000);
    assert_eq!(m.timers.next_deadline(), Some(400_000));
    assert_eq!(apic.acknowledge(), 0x30);
    write(apic, offset::INITIAL_COUNT, 0);
    assert_eq!(m.timers.next_deadline(), None);
}

#[test]
fn tsc_deadline_fires_at_the_counter_value_and_clears() {
    let m = machine(1);
    let apic = m.apic(0);
    apic.set_tsc_offset(5_000);
    apic.write_msr(MSR_TSC_DEADLINE, 9_000).unwrap();
    assert_eq!(apic.read_msr(MSR_TSC_DEADLINE), Ok(0), "ignored in other modes");
    write(apic, offset::LVT_TIMER, 0x31 | LVT_TIMER_DEADLINE);
    apic.write_msr(MSR_TSC_DEADLINE, 9_000).unwrap();
    assert_eq!(m.timers.next_deadline(), Some(4_000));
    apic.set_tsc_offset(6_000);
    assert_eq!(m.timers.next_deadline(), Some(3_000));
    m.advance_to(3_000);
    assert_eq!(apic.acknowledge(), 0x31);
    assert_eq!(apic.read_msr(MSR_TSC_DEADLINE), Ok(0));
    write(apic, offset::EOI, 0);
    apic.write_msr(MSR_TSC_DEADLINE, 1).unwrap();
    assert_eq!(apic.pending_interrupt(), Some(PendingInterrupt::Vector(0x31)), "the past is due at once");
    apic.write_msr(MSR_TSC_DEADLINE, u64::MAX).unwrap();
    apic.write_msr(MSR_TSC_DEADLINE, 0).unwrap();
    assert_eq!(m.timers.next_deadline(), None);
}

#[test]
fn base_transitions_follow_the_manual() {
    let m = machine(1);
    let apic = m.apic(0);
    let base = APIC_DEFAULT_BASE | APIC_BASE_BSP;
    assert_eq!(apic.apic_base(), base | APIC_BASE_ENABLE);
    assert_eq!(apic.read_msr(0x802), Err(MsrFault), "not in xAPIC mode");
    assert_eq!(apic.set_apic_base(base | APIC_BASE_EXTD), Err(MsrFault));
    x2apic(apic);
    assert_eq!(apic.mmio_page(), None);
    assert_eq!(apic.read_msr(0x802), Ok(0));
    assert_eq!(apic.set_apic_base(base | APIC_BASE_ENABLE), Err(MsrFault));
    apic.set_apic_base(base).unwrap();
    assert_eq!(apic.set_apic_base(base | APIC_BASE_ENABLE | APIC_BASE_EXTD), Err(MsrFault));
    apic.set_apic_base(base | APIC_BASE_ENABLE).unwrap();
    assert_eq!(apic.mmio_page(), Some(APIC_DEFAULT_BASE));
    assert_eq!(apic.set_apic_base(base | 1), Err(MsrFault));
}

#[test]
fn x2apic_faults_on_reserved_bits_and_wrong_directions() {
    let m = machine(1);
    let apic = m.apic(0);
    x2apic(apic);
    for (index, value) in [(0x80b, 1), (0x828, 1), (0x808, 0x100), (0x830, 1 << 12), (0x802, 0), (0x839, 0), (0x832, 1 << 20), (0x831, 0)] {
        assert_eq!(apic.write_msr(index, value), Err(MsrFault), "{index:#x}");
    }
    for index in [0x80b, 0x83f, 0x80e, 0x831, 0x82f, 0x840] {
        assert_eq!(apic.read_msr(index), Err(MsrFault), "{index:#x}");
    }
    apic.write_msr(0x83f, 0x44).unwrap();
    assert_eq!(apic.acknowledge(), 0x44);
}

#[test]
fn extint_passes_lint0_of_the_boot_processor_until_masked() {
    let m = machine(2);
    m.apic(0).take_init();
    write(m.apic(0), offset::LVT_LINT0, 0x700);
    m.bus.set_extint(true);
    assert_eq!(m.apic(0).pending_interrupt(), Some(PendingInterrupt::ExtInt));
    assert!(!m.apic(1).has_work());
    write(m.apic(0), offset::LVT_LINT0, 0x700 | LVT_MASKED);
    assert!(!m.apic(0).has_work());
    write(m.apic(0), offset::LVT_LINT0, 0x700);
    m.bus.set_extint(false);
    assert!(!m.apic(0).has_work());
}

#[test]
fn extint_reaches_the_boot_processor_that_nobody_programmed() {
    let m = machine(1);
    m.apic(0).reset();
    m.bus.set_extint(true);
    assert_eq!(m.apic(0).pending_interrupt(), Some(PendingInterrupt::ExtInt));
}

#[test]
fn nmi_wire_follows_lint1() {
    let m = machine(2);
    write(m.apic(1), offset::LVT_LINT1, u32::from(delivery::NMI) << 8);
    m.bus.set_nmi(true);
    m.bus.set_nmi(true);
    assert!(!m.apic(0).take_nmi());
    assert!(m.apic(1).take_nmi());
    assert!(!m.apic(1).take_nmi(), "an edge, not a level");
}

#[test]
fn acknowledge_without_request_gives_the_spurious_vector() {
    let m = machine(1);
    assert_eq!(m.apic(0).acknowledge(), 0xff);
}

#[test]
fn state_survives_a_restore_and_arms_the_timer() {
    let m = machine(1);
    write(m.apic(0), offset::DIVIDE, 0xb);
    write(m.apic(0), offset::LVT_TIMER, 0x30);
    write(m.apic(0), offset::INITIAL_COUNT, 500);
    m.bus.signal_msi(0xfee0_0000, 0x52);
    let saved = m.apic(0).state();
    let other = machine(1);
    other.apic(0).restore(&saved).unwrap();
    assert_eq!(other.apic(0).state(), saved);
    assert_eq!(other.timers.next_deadline(), Some(500));
    assert_eq!(other.apic(0).acknowledge(), 0x52);
    assert!(machine(2).apic(1).restore(&saved).is_err());
}

/// Bit 0 of the guest's word.
#[derive(Default)]
struct Word(std::sync::atomic::AtomicBool);

impl EoiFlag for Word {
    fn offer(&self) -> bool {
        self.0.store(true, Ordering::Relaxed);
        true
    }
    fn take_back(&self) -> bool {
        self.0.swap(false, Ordering::Relaxed)
    }
}

impl Word {
    /// What Linux' `kvm_guest_apic_eoi_write` does: ends the interrupt by the flag, or else by the register.
    fn end(&self, apic: &LocalApic) -> bool {
        let silent = self.0.swap(false, Ordering::Relaxed);
        if !silent {
            write(apic, offset::EOI, 0);
        }
        silent
    }
}

fn with_flag() -> (Machine, Arc<Word>) {
    let machine = machine(1);
    let word = Arc::new(Word::default());
    machine.apic(0).set_eoi_flag(Some(word.clone()));
    (machine, word)
}

fn edge(machine: &Machine, vector: u8) {
    machine.bus.signal_msi(0xfee0_0000, vector.into());
}

#[test]
fn lone_edge_interrupt_is_ended_by_the_flag() {
    let (machine, word) = with_flag();
    let apic = machine.apic(0);
    for vector in [0x80, 0x40, 0x40] {
        edge(&machine, vector);
        assert_eq!(apic.pending_interrupt(), Some(PendingInterrupt::Vector(vector)));
        assert_eq!(apic.acknowledge(), vector);
        assert!(!apic.has_work());
        assert!(word.end(apic));
    }
    assert_eq!(read(apic, offset::ISR + 0x20), 0);
}

#[test]
fn level_nested_and_accompanied_interrupts_are_ended_by_the_register() {
    let (machine, word) = with_flag();
    let apic = machine.apic(0);
    machine.bus.signal_msi(0xfee0_0000, 0x50 | MSI_DATA_LEVEL);
    apic.acknowledge();
    assert!(!word.end(apic), "the I/O APIC waits for its end");
    edge(&machine, 0x50);
    edge(&machine, 0x40);
    apic.acknowledge();
    assert!(!word.end(apic), "another waits");
    apic.acknowledge();
    edge(&machine, 0x60);
    assert_eq!(apic.pending_interrupt(), Some(PendingInterrupt::Vector(0x60)));
    apic.acknowledge();
    assert!(!word.end(apic), "it interrupts another");
    assert!(!word.end(apic), "whose offer was taken back");
    assert_eq!(apic.pending_interrupt(), None);
}

#[test]
fn interrupt_that_comes_after_a_silent_end_is_delivered() {
    let (machine, word) = with_flag();
    let apic = machine.apic(0);
    edge(&machine, 0x80);
    apic.acknowledge();
    assert!(word.end(apic));
    let calls = machine.processors[0].0.load(Ordering::Relaxed);
    edge(&machine, 0x30);
    assert!(apic.work().has_interrupt() && machine.processors[0].0.load(Ordering::Relaxed) > calls);
    assert_eq!(apic.pending_interrupt(), Some(PendingInterrupt::Vector(0x30)));
}

#[test]
fn interrupt_that_comes_before_the_end_takes_the_offer_back() {
    let (machine, word) = with_flag();
    let apic = machine.apic(0);
    edge(&machine, 0x80);
    apic.acknowledge();
    edge(&machine, 0x30);
    assert_eq!(apic.pending_interrupt(), None);
    assert!(!apic.has_work(), "nothing to do before the end");
    assert!(!word.end(apic));
    assert_eq!(apic.pending_interrupt(), Some(PendingInterrupt::Vector(0x30)));
}

#[test]
fn guest_that_ends_an_offered_interrupt_by_the_register_ends_it_once() {
    let (machine, _word) = with_flag();
    let apic = machine.apic(0);
    edge(&machine, 0x40);
    apic.acknowledge();
    edge(&machine, 0x80);
    apic.pending_interrupt();
    apic.acknowledge();
    write(apic, offset::EOI, 0);
    assert_eq!(read(apic, offset::ISR + 0x20), 1, "the outer one is still in service");
}

#[test]
fn taking_the_flag_away_settles_what_is_open() {
    let (machine, word) = with_flag();
    let apic = machine.apic(0);
    edge(&machine, 0x80);
    apic.acknowledge();
    assert!(word.end(apic));
    apic.set_eoi_flag(None);
    assert_eq!(read(apic, offset::ISR + 0x40), 0);
    edge(&machine, 0x80);
    apic.acknowledge();
    assert!(!word.0.load(Ordering::Relaxed));
}

#[test]
fn open_offer_survives_a_restore() {
    let (machine, word) = with_flag();
    edge(&machine, 0x80);
    machine.apic(0).acknowledge();
    let (other, _) = with_flag();
    other.apic(0).set_eoi_flag(None);
    other.apic(0).restore(&machine.apic(0).state()).unwrap();
    other.apic(0).set_eoi_flag(Some(word.clone()));
    assert!(word.end(other.apic(0)));
    assert_eq!(read(other.apic(0), offset::ISR + 0x40), 0);
}

proptest! {
    #[test]
    fn no_guest_input_panics(accesses in prop::collection::vec((0u8..6, any::<u32>(), any::<u64>(), 0usize..9), 1..200)) {
        let m = machine(2);
        for (kind, a, b, size) in accesses {
            let apic = m.apic(a & 1);
            match kind {
                0 => { apic.mmio_write(b & 0xfff, &a.to_le_bytes()); }
                1 => { apic.mmio_write(b & 0xff0, &b.to_be_bytes()[..size]); }
                2 => apic.mmio_read(b & 0xfff, &mut [0; 8][..size]),
                3 => { let _ = apic.write_msr(0x800 + (a >> 1) % 0x41, b >> (b & 63)); }
                4 => { let _ = apic.write_msr(if a & 2 == 0 { MSR_APIC_BASE } else { MSR_TSC_DEADLINE }, b); }
                _ => {
                    x2apic_if_possible(apic);
                    m.bus.signal_msi(0xfee0_0000 | u64::from(a) & 0xff00c, b as u32);
                    m.advance_to(m.clock.now().saturating_add(u64::from(a)));
                    apic.acknowledge();
                    let _ = (apic.take_init(), apic.take_nmi(), apic.take_sipi());
                }
            }
            let _ = apic.read_msr(0x839);
            let saved = apic.state();
            apic.restore(&saved).unwrap();
        }
    }
}

fn x2apic_if_possible(apic: &LocalApic) {
    let _ = apic.set_apic_base(apic.apic_base() | APIC_BASE_EXTD);
}
