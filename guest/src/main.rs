//! A small freestanding kernel that carries pvbus: the guest that `vmctl run` boots when it is given none.
//!
//! ```text
//!   boot.rs        PVH entry, long mode
//!   main.rs        what happens in which order
//!   cpu, memory, interrupts/, time, rtc, pci, power   the machine
//!   hal, bus                                          pvbus
//!   net/                                              TCP/IP on pvbus' network cards
//!   serial, console, prompt, commands, demo           the person
//!   logic/         what touches no hardware, tested on the host
//! ```
//!
//! One processor, one address space, one thread. Interrupts only wake it: everything is done by the main loop in [`prompt`].
//! `docs/guest.md` says how to use it.
#![no_std]
#![no_main]

extern crate alloc;

mod boot;
mod bus;
mod commands;
mod console;
mod cpu;
mod demo;
mod global;
mod hal;
mod interrupts;
mod memory;
mod net;
mod pci;
mod power;
mod prompt;
mod rtc;
mod runtime;
mod serial;
mod time;

use alloc::string::String;

use bus::Bus;

/// Who we are.
const NAME: &str = concat!("pvbus guest ", env!("CARGO_PKG_VERSION"));

/// The trampoline's way into Rust. `start_info` is the address that the loader passed.
extern "C" fn kernel_main(start_info: u64) -> ! {
    time::start();
    interrupts::init();
    let start = match memory::init(start_info) {
        Ok(start) => start,
        Err(wrong) => panic!("{wrong}"),
    };
    console::init();
    interrupts::enable();
    time::init();
    power::init(start.rsdp);
    greet();

    let mut bus = Bus::attach();

    let asked = |name| start.cmdline.split_ascii_whitespace().any(|word| word == name);
    if asked("demo") {
        demo::run(&mut bus);
    }
    if asked("prompt") {
        prompt::run(&mut bus);
    }
    bus.go_down(false);
}

fn greet() {
    let total = memory::usage().total;
    dmesg!("{NAME}");
    dmesg!("real mem = {total} ({}MB)", total >> 20);
    dmesg!("mainbus0 at root");
    let hz = time::tsc_hz() / 10_000;
    let apic = if interrupts::apic::is_x2apic() { "x2APIC" } else { "APIC" };
    dmesg!("cpu0 at mainbus0: {}, TSC {}.{:02} MHz, {apic} {}", brand(), hz / 100, hz % 100, interrupts::apic::id());
}

/// The processor's name: CPUID leaves 0x8000_0002 to 0x8000_0004.
fn brand() -> String {
    let leaves = (0x8000_0002..0x8000_0005).map(|leaf| cpu::cpuid(leaf, 0));
    let bytes = leaves.flat_map(|leaf| [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]).flat_map(u32::to_le_bytes);
    let text: String = bytes.take_while(|byte| *byte != 0).filter(u8::is_ascii).map(char::from).collect();
    text.trim().into()
}
