use std::io::Write;
use std::sync::{Arc, Mutex};

use super::super::driver::Driver;
use super::*;

#[derive(Clone, Default)]
struct Sink(Arc<Mutex<Vec<u8>>>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn output_of_the_guest_reaches_the_sink() {
    let sink = Sink::default();
    let (console, _input) = Console::new(Box::new(sink.clone()));
    let mut driver = Driver::start(Box::new(console), 0);
    let (hello, world) = (driver.buffer(b"hello "), driver.buffer(b"world"));
    let head = driver.add(1, &[(hello, 6), (world, 5)], &[]);
    driver.tell(1);
    assert_eq!(driver.wait(1), (head, 0));
    assert_eq!(*sink.0.lock().unwrap(), b"hello world");
}

#[test]
fn input_waits_for_buffers() {
    let (console, input) = Console::new(Box::new(Sink::default()));
    let mut driver = Driver::start(Box::new(console), 0);
    assert_eq!(input.push(b"early"), 5);
    let room = driver.room(3);
    driver.add(0, &[], &[(room, 3)]);
    driver.tell(0);
    assert_eq!(driver.wait(0).1, 3);
    assert_eq!(driver.bytes(room, 3), b"ear");
    let more = driver.room(16);
    driver.add(0, &[], &[(more, 16)]);
    driver.tell(0);
    assert_eq!(driver.wait(0).1, 2);
    assert_eq!(driver.bytes(more, 2), b"ly");
}

#[test]
fn input_without_a_listener_is_bounded() {
    let (_console, input) = Console::new(Box::new(Sink::default()));
    assert_eq!(input.push(&[b'x'; 100_000]), 65536);
    assert_eq!(input.push(b"x"), 0);
}

#[test]
fn a_console_moves_with_what_was_typed() {
    let (console, input) = Console::new(Box::new(Sink::default()));
    let mut driver = Driver::start(Box::new(console), 0);
    input.push(b"ls\n");
    let state = driver.registers.state();
    let (console, _input) = Console::new(Box::new(Sink::default()));
    let mut other = Driver::cold_in(Box::new(console), driver.memory.clone());
    other.registers.restore(&serde_json::from_str(&serde_json::to_string(&state).unwrap()).unwrap()).unwrap();
    let room = driver.room(8);
    driver.add(0, &[], &[(room, 8)]);
    other.kick(0);
    assert_eq!(driver.wait(0).1, 3);
    assert_eq!(driver.bytes(room, 3), b"ls\n");
}
