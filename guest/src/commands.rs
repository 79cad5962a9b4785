//! The commands of the prompt.

use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt::{self, Write};

use abi::pci::{CAP_MSIX, CAP_VENDOR};
use logic::calendar::DateTime;
use logic::words::{self, Options, Unterminated};
use pvbus::block::{BlockDevice, DiskError};
use pvbus::hal::SECOND;
use pvbus::{Interface, Kind, StoreError};

use crate::bus::Bus;
use crate::net::commands as net;
use crate::pci::Bar;
use crate::{console, interrupts, memory, pci, print, println, time};

/// Where `hostctl` looks when it is not told.
const DEFAULT_DEVICE: &str = "/dev/pvbus0";
const DEVICE: &str = "/dev/pvbus";
/// Bytes of a sector.
const SECTOR: usize = 512;
/// Bytes that [`traffic`] moves at once, at random places and in order.
const BLOCK: usize = 4 << 10;
const PIECE: usize = 1 << 20;
/// The root of the device tree.
const ROOT: &str = "mainbus0";

/// A command.
struct Command {
    name: &'static str,
    usage: &'static str,
    about: &'static str,
    run: fn(&mut Bus, &[String]) -> Result<(), Failure>,
}

/// Why a command did not do it.
pub enum Failure {
    /// It was called wrongly.
    Usage,
    /// There is no such device.
    Device(String),
    /// The interface has no information store.
    NoStore(Kind),
    /// The store refused.
    Store(StoreError),
    /// The disk did not do it.
    Disk(DiskError),
    /// The network did not do it.
    Network(net::Failure),
}

impl From<net::Failure> for Failure {
    fn from(failure: net::Failure) -> Failure {
        Failure::Network(failure)
    }
}

const COMMANDS: &[Command] = &[
    Command { name: "clock", usage: "", about: "what the clocks say: ours, the hypervisors', the hosts'", run: clock },
    Command { name: "disk", usage: "[name sector]", about: "disks, or a sector of 512 bytes", run: disk },
    Command { name: "dmesg", usage: "", about: "what the kernel said", run: dmesg },
    Command { name: "help", usage: "", about: "this list", run: help },
    Command { name: "hostctl", usage: "[-qt] [-f device] key [value]", about: "read or write the host's information", run: hostctl },
    Command { name: "http", usage: "[-q] [http://]host[:port][/path]", about: "fetch a page; gateway is a host, too", run: net::http },
    Command { name: "interrupts", usage: "", about: "how often each interrupt came", run: list_interrupts },
    Command { name: "mem", usage: "", about: "memory in use and free", run: mem },
    Command { name: "net", usage: "[address/prefix [gateway]]", about: "network cards, or an address for the first", run: net::net },
    Command { name: "pci", usage: "", about: "PCI functions: class, interrupt, addresses, capabilities", run: list_pci },
    Command { name: "ping", usage: "address [count]", about: "ask a host whether it is there", run: net::ping },
    Command { name: "poweroff", usage: "", about: "switch the machine off", run: |bus, _| bus.go_down(false) },
    Command { name: "pvbus", usage: "", about: "the device tree and the hypervisors' interfaces", run: tree },
    Command { name: "reboot", usage: "", about: "start the machine again", run: |bus, _| bus.go_down(true) },
    Command {
        name: "traffic",
        usage: "random|sequential disk read|write count",
        about: "how long a disk takes for 4 KiB or 1 MiB; writing destroys what is there",
        run: traffic,
    },
];

/// Runs a line that was typed.
pub fn execute(bus: &mut Bus, line: &str) {
    let words = match words::split(line) {
        Ok(words) => words,
        Err(Unterminated(mark)) => return println!("a {mark} has no partner"),
    };
    let Some((name, arguments)) = words.split_first() else { return };
    let Some(command) = COMMANDS.iter().find(|command| command.name == name) else {
        return println!("{name}: no such command; type help for a list");
    };
    let done = if command.usage.is_empty() && !arguments.is_empty() { Err(Failure::Usage) } else { (command.run)(bus, arguments) };
    match done {
        Ok(()) => {}
        Err(Failure::Usage) => println!("usage: {name} {}", command.usage),
        Err(Failure::Device(device)) => println!("{name}: {device}: there is no such device"),
        Err(Failure::NoStore(kind)) => println!("{name}: {kind} has no information store"),
        Err(Failure::Store(error)) => println!("{name}: {error}"),
        Err(Failure::Disk(error)) => println!("{name}: {error}"),
        Err(Failure::Network(failure)) => println!("{name}: {failure}"),
    }
}

fn help(_: &mut Bus, _: &[String]) -> Result<(), Failure> {
    for Command { name, usage, about, .. } in COMMANDS {
        println!("{:38} {about}", alloc::format!("{name} {usage}"));
    }
    Ok(())
}

fn dmesg(_: &mut Bus, _: &[String]) -> Result<(), Failure> {
    print!("{}", console::messages());
    Ok(())
}

fn mem(_: &mut Bus, _: &[String]) -> Result<(), Failure> {
    let usage = memory::usage();
    println!("{} KiB of RAM, {} KiB free, {} bytes on the heap", usage.total / 1024, usage.free / 1024, usage.heap);
    Ok(())
}

fn list_interrupts(_: &mut Bus, _: &[String]) -> Result<(), Failure> {
    interrupts::counts().for_each(|(name, count)| println!("{name:9} {count}"));
    Ok(())
}

fn clock(bus: &mut Bus, _: &[String]) -> Result<(), Failure> {
    let mut text = String::new();
    // A string takes everything.
    let _ = tell_clocks(bus, &mut text);
    print!("{text}");
    Ok(())
}

/// Writes what all clocks say. The terminal takes its time, so it gets this when all have been read.
fn tell_clocks(bus: &mut Bus, text: &mut String) -> fmt::Result {
    let now = time::now();
    writeln!(text, "uptime    {}.{:09} s by the time-stamp counter", now / SECOND, now % SECOND)?;
    if let Some(clock) = bus.tree.clock() {
        match clock.now() {
            Ok(now) => write!(text, "pvclock0  {}.{:09} s by {}", now / SECOND, now % SECOND, clock.kind())?,
            Err(error) => write!(text, "pvclock0  {error}")?,
        }
        match clock.time_of_day() {
            Ok(time) => writeln!(text, ", {}.{:09} UTC", DateTime::from_unix(time.seconds), time.nanoseconds)?,
            Err(error) => writeln!(text, ", no time of day: {error}")?,
        }
    }
    if let Some(clock) = bus.tree.reference_clock() {
        // The register first: the page has the same scale, and so is never behind what the register has just said.
        match clock.by_counter() {
            Ok(now) => write!(text, "hyperv0   {}.{:09} s by the reference counter", now / SECOND, now % SECOND)?,
            Err(error) => write!(text, "hyperv0   {error}")?,
        }
        match clock.by_page() {
            Some(now) => writeln!(text, ", {}.{:09} s by the TSC page", now / SECOND, now % SECOND)?,
            None => writeln!(text, ", no TSC page")?,
        }
    }
    for (told, seconds, nanoseconds) in bus.host_times() {
        let age = time::now().saturating_sub(told.read_at) / SECOND;
        writeln!(text, "{:9} {}.{nanoseconds:09} UTC, told {age} s ago", told.source.name(), DateTime::from_unix(seconds))?;
    }
    if let Some(seconds) = bus.rtc_time() {
        writeln!(text, "rtc       {} UTC", DateTime::from_unix(seconds))?;
    }
    Ok(())
}

fn tree(bus: &mut Bus, _: &[String]) -> Result<(), Failure> {
    let devices: Vec<_> = bus.tree.devices().collect();
    show(&devices, ROOT, 0);
    // Parents that no driver of ours attached: plain PCI.
    let mut others: Vec<&str> = devices.iter().map(|(_, parent)| *parent).filter(|parent| *parent != ROOT).collect();
    others.retain(|parent| devices.iter().all(|(name, _)| name != parent));
    others.sort_unstable();
    others.dedup();
    others.into_iter().for_each(|parent| show(&devices, parent, 1));

    let on_bus: Vec<Kind> = bus.tree.stores().kinds().collect();
    let mut interfaces = bus.tree.detection().interfaces.clone();
    let minor_of = |interface: &Interface| on_bus.iter().position(|kind| *kind == interface.kind).filter(|_| interface.trusted);
    interfaces.sort_by_key(|interface| minor_of(interface).unwrap_or(usize::MAX));
    for interface in interfaces {
        let minor = minor_of(&interface);
        match minor {
            Some(minor) => print!("{DEVICE}{minor}: "),
            None => print!("no device: "),
        }
        print!("{}, leaves {:#x} to {:#x}", interface.kind, interface.base, interface.max_leaf);
        if let Some(version) = interface.version {
            print!(", version {version}");
        }
        let has_store = minor.is_some() && bus.tree.stores().store(interface.kind).is_some();
        println!("{}", if has_store { ", has a store" } else { "" });
        if !interface.feature_names.is_empty() {
            println!("    {}", interface.feature_names.join(" "));
        }
        interface.notes.iter().for_each(|note| println!("    {note}"));
    }
    Ok(())
}

/// A device with those below it.
fn show(devices: &[(&str, &str)], name: &str, depth: usize) {
    println!("{:indent$}{name}", "", indent = 2 * depth);
    devices.iter().filter(|(_, parent)| *parent == name).for_each(|(child, _)| show(devices, child, depth + 1));
}

/// As hostctl(8) of OpenBSD, as far as it goes without files.
fn hostctl(bus: &mut Bus, arguments: &[String]) -> Result<(), Failure> {
    let options = Options::parse(arguments, "qt", "f").map_err(|_| Failure::Usage)?;
    let device = options.value('f').unwrap_or(DEFAULT_DEVICE);
    let minor = device.strip_prefix(DEVICE).and_then(|number| number.parse().ok());
    let kind = minor.and_then(|minor: usize| bus.tree.stores().kinds().nth(minor)).ok_or_else(|| Failure::Device(device.into()))?;
    if options.has('t') {
        println!("{device}: {kind}");
        return Ok(());
    }
    let (key, value) = match options.operands {
        [key] => (key, None),
        [key, value] => (key, Some(value)),
        _ => return Err(Failure::Usage),
    };
    let store = bus.tree.stores().store(kind).ok_or(Failure::NoStore(kind))?;
    match value {
        Some(value) => store.write(key.as_bytes(), value.as_bytes()).map_err(Failure::Store)?,
        None => {
            let value = store.read_or_list(key.as_bytes()).map_err(Failure::Store)?;
            if !options.has('q') && !value.is_empty() {
                println!("{}", Safe(&value));
            }
        }
    }
    Ok(())
}

/// Bytes of a host's, without what plays tricks on terminals.
pub struct Safe<'a>(pub &'a [u8]);

impl fmt::Display for Safe<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for chunk in self.0.utf8_chunks() {
            for character in chunk.valid().chars() {
                match character {
                    '\n' | '\t' => write!(f, "{character}")?,
                    _ if character.is_control() => write!(f, "{}", character.escape_default())?,
                    _ => write!(f, "{character}")?,
                }
            }
            chunk.invalid().iter().try_for_each(|byte| write!(f, "\\x{byte:02x}"))?;
        }
        Ok(())
    }
}

fn disk_named(bus: &Bus, name: &str) -> Result<Arc<dyn BlockDevice>, Failure> {
    bus.tree.disks().into_iter().find(|disk| disk.name() == name).ok_or_else(|| Failure::Device(name.into()))
}

fn disk(bus: &mut Bus, arguments: &[String]) -> Result<(), Failure> {
    let (name, sector) = match arguments {
        [] => {
            for disk in bus.tree.disks() {
                let Some(geometry) = disk.geometry() else { continue };
                let access = if geometry.is_read_only { "read-only" } else { "read and write" };
                println!("{}: {} sectors of 512 bytes, {access}", disk.name(), geometry.sectors);
            }
            return Ok(());
        }
        [name, sector] => (name, sector.parse().map_err(|_| Failure::Usage)?),
        _ => return Err(Failure::Usage),
    };
    let disk = disk_named(bus, name)?;
    let mut bytes = [0; SECTOR];
    disk.read(sector, &mut bytes).map_err(Failure::Disk)?;
    for (at, line) in bytes.chunks(16).enumerate() {
        print!("{:04x} ", at * 16);
        line.iter().for_each(|byte| print!(" {byte:02x}"));
        let text = line.iter().map(|byte| if byte.is_ascii_graphic() { char::from(*byte) } else { '.' });
        println!("  |{}|", text.collect::<String>());
    }
    Ok(())
}

fn traffic(bus: &mut Bus, arguments: &[String]) -> Result<(), Failure> {
    let [order, name, way, count] = arguments else { return Err(Failure::Usage) };
    // Neighbours follow each other by this many places, modulo how many there are.
    let (length, step) = match order.as_str() {
        "random" => (BLOCK, 0x9e37_79b9),
        "sequential" => (PIECE, 1),
        _ => return Err(Failure::Usage),
    };
    let writes = match way.as_str() {
        "read" => false,
        "write" => true,
        _ => return Err(Failure::Usage),
    };
    let count: u64 = count.parse().ok().filter(|count| *count > 0).ok_or(Failure::Usage)?;
    let disk = disk_named(bus, name)?;
    let sectors = (length / SECTOR) as u64;
    let places = disk.geometry().map_or(0, |geometry| geometry.sectors / sectors).max(1);
    let mut bytes = alloc::vec![0; length];
    let start = time::now();
    for n in 0..count {
        let sector = n.wrapping_mul(step) % places * sectors;
        let done = if writes { disk.write(sector, &bytes) } else { disk.read(sector, &mut bytes) };
        done.map_err(Failure::Disk)?;
    }
    let each = (time::now() - start) / count;
    println!("{name}: {length} bytes in {}.{:02} us", each / 1000, each % 1000 / 10);
    Ok(())
}

fn list_pci(_: &mut Bus, _: &[String]) -> Result<(), Failure> {
    for function in pci::functions() {
        let Some((vendor, device)) = function.id() else { continue };
        print!("{function} {vendor:04x}:{device:04x} class {:06x}", function.class());
        if let Some(irq) = function.irq() {
            print!(" irq {irq}");
        }
        for (number, bar) in function.bars() {
            match bar {
                Bar::Io(port) => print!(" bar{number} port {port:#x}"),
                Bar::Memory(at) => print!(" bar{number} {at:#x}"),
            }
        }
        let capabilities = function.capabilities();
        for (id, name) in [(CAP_VENDOR, "vendor"), (CAP_MSIX, "MSI-X")] {
            match capabilities.iter().filter(|(found, _)| *found == id).count() {
                0 => {}
                1 => print!(" {name}"),
                count => print!(" {count} x {name}"),
            }
        }
        println!();
    }
    Ok(())
}
