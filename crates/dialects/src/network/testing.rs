//! A network for tests: what is sent is kept, what is to arrive is put there.

use std::collections::VecDeque;
use std::io;

use super::Network;

/// A wire in memory.
#[derive(Default)]
pub struct MemoryWire {
    /// Packets that a card sent.
    pub sent: Vec<Vec<u8>>,
    /// Packets for a card.
    pub arriving: VecDeque<Vec<u8>>,
    /// Whether nothing is taken now.
    pub is_full: bool,
}

impl Network for MemoryWire {
    fn send(&mut self, packet: &[u8]) -> io::Result<()> {
        if self.is_full {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.sent.push(packet.to_vec());
        Ok(())
    }

    fn receive(&mut self, packet: &mut [u8]) -> io::Result<Option<usize>> {
        Ok(self.arriving.pop_front().map(|bytes| {
            packet[..bytes.len()].copy_from_slice(&bytes);
            bytes.len()
        }))
    }
}
