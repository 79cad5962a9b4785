//! The terminal of the foreground machine: raw while the guest runs, as it was on every way out.
//!
//! [`restore`] may be called from anywhere and any number of times: the end of `main`, the panic hook and the signal thread
//! all do. Keys are bytes for the guest, except after Ctrl-A ([`Keys`]).

use std::io::{Read, Write};
use std::sync::{Mutex, PoisonError};

use rustix::termios::{self, OptionalActions, Termios};

/// The terminal's settings from before, while it is raw.
static SAVED: Mutex<Option<Termios>> = Mutex::new(None);

/// Ctrl-A, the escape key.
const ESCAPE: u8 = 1;

const HELP: &str = "\r\nCtrl-A x       quit the machine\r\nCtrl-A h       this help\r\nCtrl-A Ctrl-A  send Ctrl-A to the guest\r\n";

/// Makes standard input raw when it is a terminal. Says whether it is.
///
/// # Errors
/// What the terminal answers.
pub fn make_raw() -> std::io::Result<bool> {
    let stdin = rustix::stdio::stdin();
    if !termios::isatty(stdin) {
        return Ok(false);
    }
    let before = termios::tcgetattr(stdin)?;
    let mut raw = before.clone();
    raw.make_raw();
    let previous = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        restore();
        previous(panic);
    }));
    *SAVED.lock().unwrap_or_else(PoisonError::into_inner) = Some(before);
    termios::tcsetattr(stdin, OptionalActions::Now, &raw)?;
    Ok(true)
}

/// Gives the terminal back its settings, once.
pub fn restore() {
    if let Some(before) = SAVED.lock().unwrap_or_else(PoisonError::into_inner).take() {
        // Nothing more can be done for a terminal that is gone.
        let _ = termios::tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &before);
    }
}

/// Says a line to people, also while the terminal is raw.
pub fn say(text: &str) {
    let end = if SAVED.lock().unwrap_or_else(PoisonError::into_inner).is_some() { "\r\n" } else { "\n" };
    // Nobody can be told that nobody can be told.
    let _ = std::io::stderr().write_all(format!("vmctl: {text}{end}").as_bytes());
}

/// Reads standard input until its end: bytes go to `guest`; `quit` is called for Ctrl-A x.
pub fn pump(raw: bool, mut guest: impl FnMut(&[u8]), quit: impl FnOnce()) {
    let mut keys = Keys::default();
    let mut buffer = [0; 1024];
    loop {
        let bytes = match std::io::stdin().read(&mut buffer) {
            Ok(0) => return,
            Ok(n) => &buffer[..n],
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        if !raw {
            guest(bytes);
            continue;
        }
        let (plain, commands) = keys.filter(bytes);
        guest(&plain);
        for command in commands {
            match command {
                Key::Quit => return quit(),
                Key::Help => drop(std::io::stderr().write_all(HELP.as_bytes())),
            }
        }
    }
}

/// What a key after Ctrl-A asks for.
#[derive(Debug, PartialEq, Eq)]
enum Key {
    Quit,
    Help,
}

/// Tells the guest's bytes from commands to us.
#[derive(Default)]
struct Keys {
    escaped: bool,
}

impl Keys {
    fn filter(&mut self, bytes: &[u8]) -> (Vec<u8>, Vec<Key>) {
        let (mut plain, mut commands) = (Vec::with_capacity(bytes.len()), Vec::new());
        for &byte in bytes {
            match (std::mem::take(&mut self.escaped), byte) {
                (false, ESCAPE) => self.escaped = true,
                (true, b'x' | b'X') => commands.push(Key::Quit),
                (true, b'h' | b'H' | b'?') => commands.push(Key::Help),
                // Ctrl-A Ctrl-A sends one; an unknown key is swallowed with its Ctrl-A.
                (true, ESCAPE) | (false, _) => plain.push(byte),
                (true, _) => {}
            }
        }
        (plain, commands)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escape_is_remembered_between_reads() {
        let mut keys = Keys::default();
        assert_eq!(keys.filter(b"ls\r\x01"), (b"ls\r".to_vec(), vec![]));
        assert_eq!(keys.filter(b"x"), (vec![], vec![Key::Quit]));
    }

    #[test]
    fn doubled_escape_reaches_the_guest() {
        assert_eq!(Keys::default().filter(b"a\x01\x01b\x01hc\x01zd"), (b"a\x01bcd".to_vec(), vec![Key::Help]));
    }
}
