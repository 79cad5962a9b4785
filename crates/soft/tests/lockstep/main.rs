//! The translator against the interpreter: random programs on both, everything compared.
//!
//! Each program runs in guests whose only difference is after how many executions a block is translated: never, at once, and at the
//! third. It runs several times without being loaded again, in turn at two linear addresses that lead to the same pages, so that
//! blocks are found again, linked, and left by every kind of fault. After each run all registers, what the exception pushed, x87
//! and SSE state, data, the code (programs change it) and the count of instructions must be equal. Flags that an instruction leaves
//! undefined are compared too, since on both sides they are what the host's processor makes of them; only those of multiplications and
//! divisions, and OF of rotates by a constant, are overwritten.
//!
//! `PVBUS_DIFF_CASES` sets the programs, `PVBUS_DIFF_SEED` the first one's seed. A failure prints the program and its seed, which with
//! `PVBUS_DIFF_CASES=1` repeats it alone.

// Helpers of tests are outside of what clippy takes for one.
#![allow(clippy::unwrap_used)]

#[path = "../differential/generate.rs"]
#[allow(dead_code)] // Each test takes its part of the generator, the state and the guest.
mod generate;
#[path = "../differential/guest.rs"]
#[allow(dead_code)]
mod guest;
mod program;
mod side;
#[path = "../differential/state.rs"]
#[allow(dead_code)]
mod state;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use iced_x86::{Decoder, DecoderOptions};
use program::Program;
use side::Side;
use state::State;

/// Distance from the first to the second linear address of code and data.
pub const SECOND: u64 = 0x10_0000;
/// Programs when nobody asks for another number: about ten seconds of them.
const DEFAULT_CASES: u64 = 10_000;
/// Runs of a program: enough for all of [`THRESHOLDS`].
const RUNS: u64 = 6;
/// Executions after which the guests that are compared with the interpreter translate.
const THRESHOLDS: [u32; 2] = [0, 3];
/// Vector of the INT3 at a program's end.
const BREAKPOINT: u8 = 3;

fn from_environment(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
}

/// The program for people.
fn listing(program: &Program) -> String {
    let start = State::CODE + program.offset;
    let mut text = format!("    gpr {:x?}\n    flags {:x}\n", program.state.gpr, program.state.rflags);
    for instruction in &mut Decoder::with_ip(64, &program.code, start, DecoderOptions::NONE) {
        let at = (instruction.ip() - start) as usize;
        text.push_str(&format!("    {:x} {instruction}    {:02x?}\n", instruction.ip(), &program.code[at..at + instruction.len()]));
    }
    text
}

/// Makes the sides leave a program that does not end: nothing promises that to a store that hits a return address.
fn watch(sides: &[Side], current: &Arc<AtomicU64>) {
    let (machines, current) = (sides.iter().map(Side::machine).collect::<Vec<_>>(), Arc::downgrade(current));
    std::thread::spawn(move || {
        let mut last = u64::MAX;
        while let Some(current) = current.upgrade() {
            let now = current.load(Ordering::Relaxed);
            if now == last {
                machines.iter().filter_map(|machine| machine.upgrade()).for_each(|machine| machine.kick(0));
            }
            last = now;
            std::thread::sleep(Duration::from_secs(2));
        }
    });
}

#[test]
fn translated_programs_equal_interpreted_ones() {
    let mut interpreter = Side::new(u32::MAX);
    let mut translators = THRESHOLDS.map(Side::new);
    let seed = from_environment("PVBUS_DIFF_SEED", 1);
    let cases = from_environment("PVBUS_DIFF_CASES", DEFAULT_CASES);
    let current = Arc::new(AtomicU64::new(0));
    watch(std::slice::from_ref(&interpreter), &current);
    watch(&translators, &current);
    let (mut ends, mut endless, mut instructions) = ([0u64; 32], 0, 0);
    for number in 0..cases {
        current.store(number, Ordering::Relaxed);
        let program = Program::new(seed + number);
        interpreter.load(&program);
        translators.iter_mut().for_each(|side| side.load(&program));
        for run in 0..RUNS {
            let base = State::CODE + program.offset + run % 2 * SECOND;
            let expected = interpreter.run(&program, base);
            let Some(vector) = expected.vector() else {
                endless += 1;
                break;
            };
            ends[usize::from(vector)] += 1;
            instructions += expected.instructions;
            for (side, threshold) in translators.iter_mut().zip(THRESHOLDS) {
                let differences = expected.differences(&side.run(&program, base));
                assert!(
                    differences.is_empty(),
                    "PVBUS_DIFF_SEED={}, run {run} at {base:x}, translated after {threshold} executions:\n{}{differences}",
                    seed + number,
                    listing(&program),
                );
            }
        }
    }
    println!(
        "{cases} programs from seed {seed}, {RUNS} runs each, {instructions} instructions, {endless} without end; ends by vector {ends:?}"
    );
    assert!(endless * 1000 <= cases, "too many programs do not end");
    let whole = ends[usize::from(BREAKPOINT)];
    assert!(whole * 2 > RUNS * cases && whole * 10 < RUNS * cases * 9 || cases < DEFAULT_CASES, "{whole} runs came to the program's end");
}
