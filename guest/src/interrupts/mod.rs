//! Interrupts and exceptions.
//!
//! ```text
//!   8259 pair, IRQ n   -> vector 0x20 + n -+
//!   local APIC timer   -> vector 0x30 -----+--> stub (stubs.rs) --> handle: notes the vector --> wait() returns
//!   hypervisors' calls -> vector 0x31 -----+
//!   exceptions ----------------------------+--> goes on at a fix-up, or prints the registers and gives up
//! ```
//!
//! Handlers do nothing but note that a vector came. What is to be done about it, the main loop does after [`wait`]: nothing is
//! shared with handlers but the notes, and so nothing needs a lock. Who waits for a device in the middle of that does not take
//! notes that are the main loop's, and sleeps by [`doze`]. The 8259 pair is used, not the I/O APIC: it is wired
//! the same way on every PC, and no table tells the wiring of the other without an AML interpreter.
//! (Intel SDM vol. 3 chapter 6.)
#![allow(unsafe_code)] // Descriptor tables.

pub mod apic;
mod exceptions;
pub mod pic;
mod stubs;

use alloc::borrow::Cow;
use alloc::format;
use core::arch::asm;
use core::mem::offset_of;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use stubs::{Frame, STUB_SIZE, interrupt_stubs};

use crate::boot::{CODE, TASK, boot_gdt};
use crate::cpu;
use crate::global::Global;
use crate::time;

/// Number of vectors, of which the first 32 are exceptions.
const VECTORS: usize = 256;
const EXCEPTIONS: u8 = 32;
/// Vector of the 8259 pair's first interrupt.
const PIC_FIRST: u8 = 0x20;
/// Vector of the local APIC's timer.
const TIMER: u8 = 0x30;
/// Vector by which hypervisors call.
pub const UPCALL: u8 = 0x31;
/// Vector of the local APIC's spurious interrupts, which are not acknowledged.
const SPURIOUS: u8 = 0xff;

/// Vectors that came and were not yet taken, a bit each.
static CAME: [AtomicU64; VECTORS / 64] = [const { AtomicU64::new(0) }; VECTORS / 64];
/// How often each vector came.
static COUNTS: [AtomicU64; VECTORS] = [const { AtomicU64::new(0) }; VECTORS];
/// Whether one came since [`doze`] returned last.
static IS_NEW: AtomicBool = AtomicBool::new(false);
static TABLES: Global<Tables> = Global::new(Tables::new());

/// A descriptor of the interrupt descriptor table, SDM figure 6-8: two quadwords.
type Gate = [u64; 2];

/// 64-bit task state segment, SDM figure 8-11. Only the interrupt stacks are used.
#[repr(C, packed(4))]
struct Task {
    reserved: u32,
    privileged_stacks: [u64; 3],
    reserved1: u64,
    interrupt_stacks: [u64; 7],
    reserved2: u64,
    reserved3: u16,
    io_map: u16,
}

const _: () = assert!(size_of::<Task>() == 104);

#[repr(C, align(16))]
#[derive(Clone, Copy)]
struct Stack([u8; 16 << 10]);

struct Tables {
    gates: [Gate; VECTORS],
    task: Task,
    /// Compiled code keeps data below the stack pointer (the red zone), so that handlers have stacks of their own: interrupts,
    /// exceptions, and what may come in the middle of an exception.
    stacks: [Stack; 3],
}

impl Tables {
    const fn new() -> Tables {
        let task =
            Task { reserved: 0, privileged_stacks: [0; 3], reserved1: 0, interrupt_stacks: [0; 7], reserved2: 0, reserved3: 0, io_map: 0 };
        Tables { gates: [[0; 2]; VECTORS], task, stacks: [Stack([0; 16 << 10]); 3] }
    }
}

/// Sets up the tables. Exceptions are caught from here on; interrupts come after [`enable`].
pub fn init() {
    // Type of a gate that keeps interrupts out, present; of an available task state segment, present.
    const INTERRUPT_GATE: u64 = 0x8e;
    const TASK_SEGMENT: u64 = 0x89;
    TABLES.with(|tables| {
        let task = (&raw const tables.task).addr() as u64;
        // No ports for less privileged code: there is none.
        tables.task.io_map = size_of::<Task>() as u16;
        for (at, stack) in tables.stacks.iter().enumerate() {
            tables.task.interrupt_stacks[at] = core::ptr::from_ref(stack).addr() as u64 + size_of::<Stack>() as u64;
        }
        for (vector, gate) in (0..).zip(&mut tables.gates) {
            let handler = (&raw const interrupt_stubs).addr() as u64 + vector * STUB_SIZE;
            let stack = match vector as u8 {
                2 | 8 | 18 => 3, // NMI, double fault, machine check
                ..EXCEPTIONS => 2,
                _ => 1,
            };
            let low = handler & 0xffff | u64::from(CODE) << 16 | stack << 32 | INTERRUPT_GATE << 40 | (handler >> 16 & 0xffff) << 48;
            *gate = [low, handler >> 32];
        }
        let limit = size_of::<Task>() as u64 - 1;
        let low = limit & 0xffff | (task & 0xff_ffff) << 16 | TASK_SEGMENT << 40 | (task >> 24 & 0xff) << 56;
        let pointer = Pointer { limit: (size_of_val(&tables.gates) - 1) as u16, base: tables.gates.as_ptr().addr() as u64 };
        // SAFETY: the descriptor table has room for both halves. The tables are static, and name handlers and stacks.
        unsafe {
            let descriptor = (&raw mut boot_gdt).cast::<u64>().add(usize::from(TASK) / 8);
            descriptor.write_volatile(low);
            descriptor.add(1).write_volatile(task >> 32);
            asm!("ltr {0:x}", "lidt [{1}]", in(reg) TASK, in(reg) &pointer, options(nostack));
        }
    });
}

/// What LIDT reads.
#[repr(C, packed)]
struct Pointer {
    limit: u16,
    base: u64,
}

/// Lets interrupts in.
pub fn enable() {
    pic::init(PIC_FIRST);
    apic::init(TIMER, SPURIOUS);
    cpu::enable_interrupts();
}

/// The vector that an interrupt of the 8259 pair comes by, from now on.
pub fn isa(irq: u8) -> u8 {
    pic::unmask(irq);
    isa_vector(irq)
}

/// The vector of an interrupt of the 8259 pair.
pub const fn isa_vector(irq: u8) -> u8 {
    PIC_FIRST + irq
}

/// Whether the vector came since the last time.
pub fn take(vector: u8) -> bool {
    let bit = 1 << (vector % 64);
    let came = CAME[usize::from(vector / 64)].fetch_and(!bit, Ordering::Acquire) & bit != 0;
    if came && let Some(irq) = irq(vector) {
        pic::rearm(irq);
    }
    came
}

/// Sleeps until an interrupt comes that is not yet taken, or until `deadline` in [`time::now`]'s nanoseconds.
pub fn wait(deadline: Option<u64>) {
    take(TIMER);
    halt(deadline, || CAME.iter().all(|bits| bits.load(Ordering::Relaxed) == 0));
}

/// Sleeps until an interrupt comes, if none has since the last time, or until `deadline`. It stays to be taken by the main loop.
pub fn doze(deadline: u64) {
    halt(Some(deadline), || !IS_NEW.load(Ordering::Relaxed));
    // What came up to here the caller sees when it looks again.
    IS_NEW.store(false, Ordering::Relaxed);
}

/// How often each interrupt came that did, by name.
pub fn counts() -> impl Iterator<Item = (Cow<'static, str>, u64)> {
    let came = (0..=u8::MAX).zip(&COUNTS).map(|(vector, count)| (vector, count.load(Ordering::Relaxed)));
    came.filter(|(_, count)| *count > 0).map(|(vector, count)| (name(vector), count))
}

fn name(vector: u8) -> Cow<'static, str> {
    match (irq(vector), vector) {
        (Some(irq), _) => format!("irq{irq}").into(),
        (_, TIMER) => "timer".into(),
        (_, UPCALL) => "upcall".into(),
        _ => format!("vector {vector:#x}").into(),
    }
}

/// Halts until an interrupt comes, or until `deadline`, if there is nothing to do: no interrupt comes between asking and halting.
fn halt(deadline: Option<u64>, is_idle: impl FnOnce() -> bool) {
    cpu::disable_interrupts();
    if is_idle() && deadline.is_none_or(|deadline| deadline > time::now()) {
        apic::set_timer(deadline);
        cpu::enable_and_halt();
        apic::set_timer(None);
    } else {
        cpu::enable_interrupts();
    }
}

/// Interrupt of the 8259 pair that a vector is for.
fn irq(vector: u8) -> Option<u8> {
    vector.checked_sub(PIC_FIRST).filter(|irq| *irq < pic::IRQS)
}

/// Every interrupt and exception comes here, by its stub.
extern "C" fn handle(frame: &mut Frame) {
    let vector = frame.vector as u8;
    if vector < EXCEPTIONS {
        return exceptions::handle(frame);
    }
    match irq(vector) {
        Some(irq) => {
            if !pic::acknowledge(irq) {
                return;
            }
        }
        None if vector == SPURIOUS => return,
        None => apic::acknowledge(),
    }
    COUNTS[usize::from(vector)].fetch_add(1, Ordering::Relaxed);
    CAME[usize::from(vector / 64)].fetch_or(1 << (vector % 64), Ordering::Release);
    IS_NEW.store(true, Ordering::Relaxed);
}

const _: () = assert!(offset_of!(Frame, vector) == 15 * 8, "the stubs push 15 registers");
