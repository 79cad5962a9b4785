//! The console's ring.

use abi::xen::io::console;

use super::*;

/// What was written to a terminal.
#[derive(Clone, Default)]
struct Terminal(Arc<Mutex<Vec<u8>>>);

impl Write for Terminal {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn console_carries_both_ways() {
    let guest = Guest::running();
    let terminal = Terminal::default();
    guest.xen.open_console(Box::new(terminal.clone()));
    let port = guest.xen.console_port().unwrap();
    let at = words::CONSOLE_PAGE;
    // Across the end of the ring.
    for index in [console::OUT_CONS, console::OUT_PROD] {
        guest.put_u32(at + index, u32::MAX - 1);
    }
    for (offset, byte) in [2046, 2047, 0, 1].into_iter().zip(*b"boot") {
        guest.memory.write_obj(byte, GuestAddress(at + console::OUT + offset)).unwrap();
    }
    guest.put_u32(at + console::OUT_PROD, 2);
    assert_eq!(guest.port_call(evtchn::op::SEND, port), 0);
    assert_eq!(*terminal.0.lock().unwrap(), b"boot");
    assert_eq!(guest.u32_at(at + console::OUT_CONS), 2);
    assert_eq!(guest.interrupts().len(), 1, "there is room again");
    assert_eq!(guest.xen.console_input(&[b'x'; 2000]), 1024, "as much as has room");
    assert_eq!(guest.u32_at(at + console::IN_PROD), 1024);
}

#[test]
fn console_index_that_lies_breaks_the_console_only() {
    let guest = Guest::running();
    let terminal = Terminal::default();
    guest.xen.open_console(Box::new(terminal.clone()));
    let port = guest.xen.console_port().unwrap();
    guest.put_u32(words::CONSOLE_PAGE + console::OUT_PROD, 2049);
    assert_eq!(guest.port_call(evtchn::op::SEND, port), 0);
    guest.put_u32(words::CONSOLE_PAGE + console::OUT_PROD, 1);
    assert_eq!(guest.port_call(evtchn::op::SEND, port), 0);
    assert!(terminal.0.lock().unwrap().is_empty());
    assert_eq!(guest.xen.console_input(b"x"), 0);
}
