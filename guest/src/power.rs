//! Ends of the machine: the power button, off, reset, and giving up.
//!
//! ACPI switches off (sleep type 5 into the PM1 control blocks, ACPI 6.5 section 4.8.3.2) and tells of the button (section 4.8.3.1). For
//! a reset there are several ways, tried one after the other.
#![allow(unsafe_code)] // Port I/O.

use logic::acpi::{Button, Power};

use crate::cpu::{inw, outb, outw};
use crate::global::Global;
use crate::memory::Firmware;
use crate::{cpu, interrupts, println, time};

/// PM1 status and enable: the power button.
const POWER_BUTTON: u16 = 1 << 8;
/// PM1 control: ACPI is on; the sleep type's place; sleep now.
const SCI_ENABLE: u16 = 1 << 0;
const SLEEP_TYPE_SHIFT: u16 = 10;
const SLEEP_TYPE: u16 = 7 << SLEEP_TYPE_SHIFT;
const SLEEP_ENABLE: u16 = 1 << 13;
/// Reads of the control block that firmware gets to turn ACPI on.
const PATIENCE: u32 = 1000;
/// How long the machine may take to go off, in nanoseconds.
const GRACE: u64 = 2_000_000_000;
/// Reset control register of Intel's chip sets (82371SB data sheet section 2.7), and a hard reset.
const RESET_CONTROL: (u16, u8) = (0xcf9, 6);
/// Command port of the keyboard controller, and the pulse on its line to the processor's reset (IBM PC/AT Technical Reference).
const KEYBOARD_RESET: (u16, u8) = (0x64, 0xfe);
/// Port of QEMU's isa-debug-exit, and the value for a failure: QEMU, and vmctl with `--debug-exit`, then end with status 255.
const DEBUG_EXIT: (u16, u8) = (0xf4, 0x7f);

static POWER: Global<Power> = Global::new(Power { off: [None; 2], reset: None, enable: None, button: None });

/// Reads what ACPI says, and turns it on. `rsdp` is the root pointer's address, if the loader told it.
pub fn init(rsdp: Option<u64>) {
    let power = Power::find(&Firmware, rsdp).unwrap_or_default();
    if let (Some((control, _)), Some((port, value))) = (power.off[0], power.enable)
        && inw(control) & SCI_ENABLE == 0
    {
        // SAFETY: firmware turns ACPI on, as every system has it do.
        unsafe { outb(port, value) };
        let _ = (0..PATIENCE).find(|_| inw(control) & SCI_ENABLE != 0);
    }
    POWER.with(|kept| *kept = power);
}

/// Has the power button interrupt; the vector that it comes by.
pub fn enable_button() -> Option<u8> {
    let Button { status, enable, irq } = POWER.with(|power| power.button)?;
    // SAFETY: forgets what was pressed before, and lets the interrupt through.
    unsafe {
        outw(status, POWER_BUTTON);
        outw(enable, POWER_BUTTON);
    }
    Some(interrupts::isa(irq))
}

/// Whether somebody has pressed the power button since the last time.
pub fn was_button_pressed() -> bool {
    let Some(Button { status, .. }) = POWER.with(|power| power.button) else { return false };
    let pressed = inw(status) & POWER_BUTTON != 0;
    if pressed {
        // SAFETY: forgets it.
        unsafe { outw(status, POWER_BUTTON) };
    }
    pressed
}

/// Switches the machine off.
pub fn off() -> ! {
    let power = POWER.with(|power| *power);
    for (control, sleep_type) in power.off.into_iter().flatten() {
        let kept = inw(control) & !(SLEEP_TYPE | SLEEP_ENABLE);
        // SAFETY: the end of the machine.
        unsafe { outw(control, kept | u16::from(sleep_type) << SLEEP_TYPE_SHIFT | SLEEP_ENABLE) };
    }
    // Some monitors take the order while the processor goes on.
    time::sleep(GRACE);
    println!("This machine cannot be switched off. It has halted.");
    cpu::stop();
}

/// Starts the machine again.
pub fn reset() -> ! {
    let power = POWER.with(|power| *power);
    cpu::disable_interrupts();
    for (port, value) in power.reset.into_iter().chain([RESET_CONTROL, KEYBOARD_RESET]) {
        // SAFETY: the end of the machine.
        unsafe { outb(port, value) };
    }
    cpu::triple_fault();
}

/// Gives up, in a way that whoever runs the machine notices.
pub fn fail() -> ! {
    let (port, value) = DEBUG_EXIT;
    // SAFETY: the end of the machine.
    unsafe { outb(port, value) };
    cpu::triple_fault();
}
