//! The line editor of the prompt: bytes of a terminal in, what to echo and finished lines out.
//!
//! Backspace and Ctrl-W take back, Ctrl-U clears, Ctrl-C gives up, Ctrl-D on an empty line says goodbye, the arrows up and down walk
//! through earlier lines. Other keys that a terminal sends as escape sequences (ECMA-48 section 5.4) are swallowed whole.

use alloc::collections::VecDeque;
use alloc::string::String;
use alloc::vec::Vec;

/// Longest line; what is typed beyond it is not taken.
pub const LINE_MAX: usize = 1024;
/// Earlier lines that are kept.
const HISTORY_MAX: usize = 32;

const CTRL_C: u8 = 0x03;
const CTRL_D: u8 = 0x04;
const BELL: u8 = 0x07;
const BACKSPACE: u8 = 0x08;
const CTRL_U: u8 = 0x15;
const CTRL_W: u8 = 0x17;
const ESCAPE: u8 = 0x1b;
const DELETE: u8 = 0x7f;
/// Moves back, writes over, moves back.
const ERASE: &[u8] = b"\x08 \x08";

/// What a byte led to.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// The line is being typed.
    Typing,
    /// It is finished.
    Line(String),
    /// It was given up with Ctrl-C.
    Interrupted,
    /// Ctrl-D on an empty line.
    End,
}

/// A line that is being typed.
#[derive(Debug, Default)]
pub struct Editor {
    text: Vec<u8>,
    sequence: Sequence,
    /// The last byte was a carriage return, whose line feed is no line of its own.
    returned: bool,
    history: VecDeque<Vec<u8>>,
    /// Which line of the history is shown, counted from the newest; 0 is none.
    shown: usize,
}

/// How much of an escape sequence was there.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Sequence {
    #[default]
    None,
    /// ESC.
    Escape,
    /// ESC `[`, or ESC `O` of the application mode.
    Parameters,
}

impl Editor {
    /// Takes a byte; `echo` gets what the terminal shows for it.
    pub fn on(&mut self, byte: u8, echo: &mut Vec<u8>) -> Event {
        let after_return = core::mem::replace(&mut self.returned, byte == b'\r');
        match (self.sequence, byte) {
            (Sequence::Escape, b'[' | b'O') => self.sequence = Sequence::Parameters,
            (Sequence::Parameters, 0x20..0x40) => {}
            (Sequence::Parameters, b'A') => self.show(self.shown + 1, echo),
            (Sequence::Parameters, b'B') => self.show(self.shown.wrapping_sub(1), echo),
            (Sequence::Escape | Sequence::Parameters, 0x20..) => self.sequence = Sequence::None,
            (_, b'\n') if after_return => {}
            (_, b'\r' | b'\n') => return self.finish(echo),
            (_, CTRL_C) => {
                echo.extend(b"^C\r\n");
                self.clear();
                return Event::Interrupted;
            }
            (_, CTRL_D) if self.text.is_empty() => {
                echo.extend(b"\r\n");
                return Event::End;
            }
            (_, BACKSPACE | DELETE) => self.erase(1, echo),
            (_, CTRL_U) => self.erase(usize::MAX, echo),
            (_, CTRL_W) => {
                let blanks = self.text.iter().rev().take_while(|byte| **byte == b' ').count();
                let word = self.text.iter().rev().skip(blanks).take_while(|byte| **byte != b' ').count();
                // In characters: bytes that continue one are not counted.
                let count = self.text[self.text.len() - blanks - word..].iter().filter(|byte| is_start(**byte)).count();
                self.erase(count, echo);
            }
            (_, ESCAPE) => self.sequence = Sequence::Escape,
            (_, ..0x20) => {}
            _ if self.text.len() == LINE_MAX => echo.push(BELL),
            _ => {
                self.text.push(byte);
                echo.push(byte);
            }
        }
        Event::Typing
    }

    /// What has been typed of the line, to be shown again after something was printed.
    pub fn text(&self) -> &[u8] {
        &self.text
    }

    fn finish(&mut self, echo: &mut Vec<u8>) -> Event {
        echo.extend(b"\r\n");
        let text = core::mem::take(&mut self.text);
        self.clear();
        let line = String::from_utf8_lossy(&text).into_owned();
        if !line.trim().is_empty() && self.history.front() != Some(&text) {
            self.history.push_front(text);
            self.history.truncate(HISTORY_MAX);
        }
        Event::Line(line)
    }

    /// Shows the line of the history with that number; 0 is an empty one.
    fn show(&mut self, number: usize, echo: &mut Vec<u8>) {
        self.sequence = Sequence::None;
        let text = match number {
            0 => Vec::new(),
            _ => match self.history.get(number - 1) {
                Some(text) => text.clone(),
                None => return echo.push(BELL),
            },
        };
        self.erase(usize::MAX, echo);
        echo.extend(&text);
        self.text = text;
        self.shown = number;
    }

    /// Takes back characters; a character of UTF-8 is several bytes and one place on the terminal.
    fn erase(&mut self, count: usize, echo: &mut Vec<u8>) {
        for _ in 0..count {
            loop {
                let Some(byte) = self.text.pop() else { return };
                if is_start(byte) {
                    break;
                }
            }
            echo.extend(ERASE);
        }
    }

    fn clear(&mut self) {
        self.text.clear();
        self.sequence = Sequence::None;
        self.shown = 0;
    }
}

/// Whether a byte of UTF-8 begins a character.
fn is_start(byte: u8) -> bool {
    byte & 0xc0 != 0x80
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Types, and returns what came of it and what the terminal got.
    fn typed(editor: &mut Editor, text: &str) -> (Vec<Event>, String) {
        let mut echo = Vec::new();
        let events = text.bytes().map(|byte| editor.on(byte, &mut echo)).filter(|event| *event != Event::Typing).collect();
        (events, String::from_utf8(echo).unwrap())
    }

    fn line(text: &str) -> Event {
        Event::Line(text.into())
    }

    #[test]
    fn every_kind_of_line_end_is_one() {
        let (events, echo) = typed(&mut Editor::default(), "a\rb\nc\r\nd\n\r");
        assert_eq!(events, [line("a"), line("b"), line("c"), line("d"), line("")]);
        assert_eq!(echo, "a\r\nb\r\nc\r\nd\r\n\r\n");
    }

    #[test]
    fn what_was_typed_is_taken_back() {
        let editor = &mut Editor::default();
        assert_eq!(typed(editor, "ab\x7f\x08\x08c\r").0, [line("c")]);
        assert_eq!(typed(editor, "one two\x15three\r").0, [line("three")]);
        assert_eq!(typed(editor, "one two  \x17three\r").0, [line("one three")]);
        assert_eq!(typed(editor, "größe\x7f\x7f\x7f\r").1, "größe\x08 \x08\x08 \x08\x08 \x08\r\n");
        assert_eq!(typed(editor, "rm\x03").0, [Event::Interrupted]);
        assert_eq!(typed(editor, "x\x04\r\x04").0, [line("x"), Event::End]);
    }

    #[test]
    fn arrows_walk_through_earlier_lines() {
        let editor = &mut Editor::default();
        typed(editor, "first\rsecond\rsecond\r\r");
        assert_eq!(typed(editor, "\x1b[A\x1b[A\r").0, [line("first")]);
        assert_eq!(typed(editor, "\x1b[A\x1bOA\x1b[B\r").0, [line("first")]);
        assert_eq!(typed(editor, "x\x1b[A\x1b[B\r").0, [line("")]);
        let (events, echo) = typed(editor, "\x1b[A\x1b[A\x1b[A\x1b[A\r");
        assert!(echo.contains('\x07'), "there are three lines");
        assert_eq!(events, [line("first")]);
    }

    #[test]
    fn other_keys_leave_no_trace() {
        assert_eq!(typed(&mut Editor::default(), "a\x1b[3~\x1b[1;5Cb\x1bx\x01\r").0, [line("ab")]);
    }

    #[test]
    fn long_lines_end_at_their_limit() {
        let (events, _) = typed(&mut Editor::default(), &("x".repeat(3 * LINE_MAX) + "\r"));
        assert_eq!(events, [line(&"x".repeat(LINE_MAX))]);
    }
}
