//! Directed tests of the KVM backend, for a machine with a real KVM.
//!
//! `tests/rig.rs` runs this program inside QEMU, whose emulation of AMD's SVM gives Linux a complete KVM. It prints one line for each test,
//! `PASS name` or `FAIL name: why`, and ends with status 0 when all passed. Arguments name the tests to run; without any, all.
//! Guests are a few instructions of 64-bit ring 0, assembled here (`guest.rs`).

mod guest;
mod interrupts;
#[path = "../../../../tests/vmm_ioctl/cases.rs"]
mod ioctl;
#[path = "../../../../tests/vmm_ioctl/layout.rs"]
mod layout;
mod processor;

use std::process::ExitCode;
use std::sync::Arc;

/// A test says why it failed.
type Test = fn() -> Result<(), String>;

const TESTS: &[(&str, Test)] = &[
    ("registers_survive_a_way_through_kvm", processor::registers),
    ("x87_and_sse_state_survives", processor::fxsave),
    ("cpuid_shows_the_apic_id_and_the_table", processor::cpuid),
    ("declined_port_accesses_exit_and_are_answered", processor::declined_ports),
    ("string_port_accesses_come_element_by_element", processor::string_ports),
    ("port_that_takes_registers_exchanges_them", processor::register_port),
    ("string_to_a_port_that_takes_registers_brings_them_back", processor::register_port_strings),
    ("mmio_reaches_the_bus", processor::mmio),
    ("declined_mmio_read_leaves_rip_at_the_instruction", processor::declined_mmio),
    ("write_to_protected_page_exits_with_its_address", processor::write_protection),
    ("page_without_access_exits_on_read_and_fetch", processor::no_access),
    ("unknown_and_dialect_msrs_reach_the_bus", processor::msrs),
    ("hlt_without_apic_exits", processor::halt),
    ("triple_fault_is_a_shutdown", processor::shutdown),
    ("single_step_executes_one_instruction", processor::single_step),
    ("internal_error_shows_registers_bytes_and_advice", processor::internal_error),
    ("pvclock_ticks", processor::pvclock),
    ("kernel_names_the_features_of_its_dialect", processor::dialect),
    ("kick_ends_a_spinning_guest", interrupts::kick_spinning),
    ("kick_ends_a_halted_guest", interrupts::kick_halted),
    ("kick_before_run_is_not_lost", interrupts::kick_before),
    ("injected_interrupt_is_taken_when_the_window_opens", interrupts::window),
    ("injected_exception_reaches_its_handler", interrupts::exception),
    ("msi_wakes_a_halted_processor", interrupts::msi),
    ("extint_is_acknowledged_when_lint0_lets_it", interrupts::extint),
    ("eoi_of_a_level_interrupt_reaches_the_bus", interrupts::end_of_interrupt),
    ("second_processor_starts_by_sipi", interrupts::sipi),
    ("vmm_ioctls_run_a_guest", || ioctl::run_a_guest(monitor()?)),
    ("vmm_ioctl_protects_pages", || ioctl::protect(monitor()?)),
    ("vmm_ioctl_carries_pvclock", || ioctl::pvclock(monitor()?)),
];

fn monitor() -> Result<vmm::Vmm, String> {
    Ok(vmm::Vmm::new(Arc::new(kvm::KvmBackend::new().map_err(layout::text)?)))
}

fn main() -> ExitCode {
    println!("{}", kvm::probe());
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    let mut failed = 0;
    for (name, test) in TESTS.iter().filter(|(name, _)| wanted.is_empty() || wanted.iter().any(|w| name.contains(w.as_str()))) {
        match test() {
            Ok(()) => println!("PASS {name}"),
            Err(why) => {
                failed += 1;
                println!("FAIL {name}: {}", why.replace('\n', " | "));
            }
        }
    }
    println!("rig: {failed} failed");
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
