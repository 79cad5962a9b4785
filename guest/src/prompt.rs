//! The prompt: reads commands from the terminal and runs them, for ever.

use alloc::vec::Vec;

use logic::line::{Editor, Event};
use logic::words;

use crate::{commands, console, interrupts, print, println, serial};

const PROMPT: &str = "pvbus# ";

/// Never returns: commands end the machine.
pub fn run() -> ! {
    let serial = interrupts::isa(serial::IRQ);
    let mut editor = Editor::default();
    println!("Type help for a list of commands.");
    print!("{PROMPT}");
    loop {
        // First the note, then the port: what comes between the two is noted again.
        interrupts::take(serial);
        console::poll();
        while let Some(byte) = console::read() {
            let mut echo = Vec::new();
            let event = editor.on(byte, &mut echo);
            console::echo(&echo);
            match event {
                Event::Typing => continue,
                Event::Line(line) => execute(&line),
                Event::Interrupted => {}
                Event::End => println!("There is nobody to log out. Type poweroff to switch off."),
            }
            print!("{PROMPT}");
        }
        interrupts::wait(None);
    }
}

fn execute(line: &str) {
    match words::split(line) {
        Err(words::Unterminated(mark)) => println!("a {mark} has no partner"),
        Ok(words) => {
            if let Some((name, arguments)) = words.split_first() {
                commands::run(name, arguments);
            }
        }
    }
}
