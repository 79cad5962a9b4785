//! The prompt: reads commands from the terminal and runs them, and in between does what the bus has to do, for ever.

use alloc::string::String;
use alloc::vec::Vec;

use logic::line::{Editor, Event};

use crate::bus::Bus;
use crate::{commands, console, interrupts, print, println, serial};

/// What is shown where a command is expected.
const PROMPT: &str = "pvbus# ";

/// Never returns: commands and hosts end the machine.
pub fn run(bus: &mut Bus) -> ! {
    interrupts::isa(serial::IRQ);
    let mut editor = Editor::default();
    println!("Type help for a list of commands.");
    print!("{PROMPT}");
    loop {
        listen();
        while let Some(byte) = console::read() {
            on_key(bus, &mut editor, byte);
        }
        let deadline = bus.poll();
        interrupts::wait(deadline);
    }
}

/// Takes in what was typed.
pub fn listen() {
    // First the note, then the port: what comes between the two is noted again.
    interrupts::take(interrupts::isa_vector(serial::IRQ));
    console::poll();
}

/// Runs a command as if it had been typed.
pub fn demonstrate(bus: &mut Bus, line: &str) {
    println!("{PROMPT}{line}");
    commands::execute(bus, line);
}

fn on_key(bus: &mut Bus, editor: &mut Editor, byte: u8) {
    let mut echo = Vec::new();
    let event = editor.on(byte, &mut echo);
    console::echo(&echo);
    match event {
        Event::Typing => return,
        Event::Line(line) => commands::execute(bus, &line),
        Event::Interrupted => {}
        Event::End => println!("There is nobody to log out. Type poweroff to switch off."),
    }
    print!("{PROMPT}{}", String::from_utf8_lossy(editor.text()));
}
