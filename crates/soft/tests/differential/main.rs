//! The software CPU against the host's own processor: random instructions with random state on both, everything compared.
//!
//! For each case a random instruction is put at the same linear address in this process and in a guest in 64-bit mode at
//! privilege level 3, with the same registers, flags, x87/SSE state and data pages. Both execute it once, the guest single-stepped and
//! then again as a block that is translated before it runs. Then general registers, RIP, flags (without those that iced says the
//! instruction leaves undefined), x87 and SSE state, data memory, and on a fault the vector, error code and address must be equal.
//! On a host that is not Intel's, what makers do differently is left out (`vendor.rs`). That all cases are at the same address also
//! shows that no translation outlives its code.
//!
//! `PVBUS_DIFF_CASES` sets the cases per class (default a few thousand), `PVBUS_DIFF_SEED` the seed; a failure prints both.

// Helpers of tests are outside of what clippy takes for one.
#![allow(clippy::unwrap_used)]

mod generate;
mod guest;
mod host;
mod state;
mod vendor;

use generate::{Class, Generator};
use guest::Guest;
use host::Host;
use soft::Soft;
use state::{Outcome, State};

/// Cases per class when nobody asks for more.
const DEFAULT_CASES: u64 = 4000;
/// Failures shown before a class gives up.
const SHOWN: usize = 12;

fn from_environment(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
}

/// Runs all cases of a class and panics with what differed.
fn check(class: Class) {
    let mut host = Host::lock();
    let mut stepped = Guest::new(Soft::new());
    let mut translated = Guest::new(Soft::translating_after(0));
    let seed = from_environment("PVBUS_DIFF_SEED", 1);
    let cases = from_environment("PVBUS_DIFF_CASES", DEFAULT_CASES);
    let mut generator = Generator::new(class, seed);
    let mut failures = Vec::new();
    let mut faults = 0;
    let intel = vendor::host_is_intel();
    let mut executed = std::collections::BTreeMap::new();
    for number in 0..cases {
        let case = generator.next_case();
        let on_guest = stepped.execute(&case.bytes, &case.state);
        // A branch into its own bytes, or to itself for ever: neither the host nor a block can be stopped there.
        if on_guest.fault.is_none() && (State::CODE..State::CODE + case.bytes.len() as u64).contains(&on_guest.state.rip) {
            continue;
        }
        let on_host = host.execute(&case.bytes, &case.state);
        if !intel && vendor::is_makers_choice(&case, &on_host, &on_guest) {
            continue;
        }
        faults += u64::from(on_host.fault.is_some());
        *executed.entry(format!("{:?}", case.instruction.mnemonic())).or_insert(0u64) += 1;
        for (way, on_guest) in [("stepped", on_guest), ("in a block", translated.execute_in_block(&case.bytes, &case.state))] {
            let differences = Outcome::differences(&on_host, &on_guest, &case);
            if !differences.is_empty() {
                failures.push(format!("case {number} {way}: {}\n{differences}", case.describe()));
            }
        }
        if failures.len() >= SHOWN {
            break;
        }
    }
    let compared: u64 = executed.values().sum();
    println!("{class:?}: {compared} of {cases} cases, {} mnemonics, {faults} faults, seed {seed}", executed.len());
    assert!(executed.len() >= class.mnemonics_expected() || cases < DEFAULT_CASES, "too few mnemonics were reached: {executed:?}");
    assert!(failures.is_empty(), "{class:?} with PVBUS_DIFF_SEED={seed}: host and guest differ\n{}", failures.join("\n"));
}

#[test]
fn integer_instructions_equal_the_host() {
    check(Class::Integer);
}

#[test]
fn common_instructions_equal_the_host() {
    check(Class::Common);
}

#[test]
fn bmi_and_adx_instructions_equal_the_host() {
    let host_has_them = is_x86_feature_detected!("bmi1") && is_x86_feature_detected!("bmi2") && is_x86_feature_detected!("adx");
    if host_has_them {
        check(Class::Bits);
    }
}

#[test]
fn string_instructions_equal_the_host() {
    check(Class::String);
}

#[test]
fn x87_instructions_equal_the_host() {
    check(Class::X87);
}

#[test]
fn mmx_instructions_equal_the_host() {
    check(Class::Mmx);
}

#[test]
fn sse_instructions_equal_the_host() {
    check(Class::Sse);
}

#[test]
fn sse2_instructions_equal_the_host() {
    check(Class::Sse2);
}

#[test]
fn sse3_to_sse42_and_crypto_instructions_equal_the_host() {
    check(Class::SseLater);
}

#[test]
fn both_sides_start_from_the_same_state() {
    let mut host = Host::lock();
    let mut guest = Guest::new(Soft::new());
    let mut generator = Generator::new(Class::Integer, 7);
    let mut case = generator.next_case();
    case.bytes = vec![0x90];
    let on_host = host.execute(&case.bytes, &case.state);
    let on_guest = guest.execute(&case.bytes, &case.state);
    assert_eq!(on_host.state.gpr, case.state.gpr);
    assert_eq!(on_guest.state.gpr, case.state.gpr);
    assert_eq!(on_host.state.rip, State::CODE + 1);
    assert_eq!(on_guest.state.rip, State::CODE + 1);
}
