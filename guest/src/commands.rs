//! The commands of the prompt.

use alloc::string::String;

use abi::pci::{CAP_MSIX, CAP_VENDOR};

use crate::pci::Bar;
use crate::{console, memory, pci, power, print, println, time};

/// A command.
struct Command {
    name: &'static str,
    usage: &'static str,
    about: &'static str,
    run: fn(&[String]),
}

const COMMANDS: &[Command] = &[
    Command { name: "dmesg", usage: "", about: "what the kernel said", run: |_| print!("{}", console::messages()) },
    Command { name: "help", usage: "", about: "this list", run: |_| help() },
    Command { name: "mem", usage: "", about: "memory in use and free", run: |_| mem() },
    Command { name: "pci", usage: "", about: "PCI functions: class, interrupt, addresses, capabilities", run: |_| list_pci() },
    Command { name: "poweroff", usage: "", about: "switch the machine off", run: |_| power::off() },
    Command { name: "reboot", usage: "", about: "start the machine again", run: |_| power::reset() },
    Command { name: "uptime", usage: "", about: "seconds since power-on", run: |_| uptime() },
];

/// Runs the command of that name.
pub fn run(name: &str, arguments: &[String]) {
    match COMMANDS.iter().find(|command| command.name == name) {
        Some(command) if command.usage.is_empty() && !arguments.is_empty() => println!("{name} takes no arguments"),
        Some(command) => (command.run)(arguments),
        None => println!("{name}: no such command; type help for a list"),
    }
}

fn help() {
    for Command { name, usage, about, .. } in COMMANDS {
        println!("{:40} {about}", alloc::format!("{name} {usage}"));
    }
}

fn mem() {
    let usage = memory::usage();
    println!("{} KiB of RAM, {} KiB free, {} bytes on the heap", usage.total / 1024, usage.free / 1024, usage.heap);
}

fn uptime() {
    let micros = time::now() / 1000;
    println!("{}.{:06} s", micros / 1_000_000, micros % 1_000_000);
}

fn list_pci() {
    for address in pci::functions() {
        let Some((vendor, device)) = address.id() else { continue };
        print!("{address} {vendor:04x}:{device:04x} class {:06x}", address.class());
        if let Some(irq) = address.irq() {
            print!(" irq {irq}");
        }
        for (number, bar) in address.bars() {
            match bar {
                Bar::Io(port) => print!(" bar{number} port {port:#x}"),
                Bar::Memory(at) => print!(" bar{number} {at:#x}"),
            }
        }
        let capabilities = address.capabilities();
        for (id, name) in [(CAP_VENDOR, "vendor"), (CAP_MSIX, "MSI-X")] {
            match capabilities.iter().filter(|(found, _)| *found == id).count() {
                0 => {}
                1 => print!(" {name}"),
                count => print!(" {count} x {name}"),
            }
        }
        println!();
    }
}
