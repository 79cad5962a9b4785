//! Packets between the rings and the network.
//!
//! A packet passes through one buffer of [`MAX_PACKET`] bytes per direction, so that no length of the guest's makes us allocate.
//! Received packets take as many buffers as they need (MRG_RXBUF) or one; a packet that does not fit is dropped, as on a wire.

use std::io;

use abi::virtio::net::HEADER_BYTES;
use frames::{MAX_PACKET, MIN_FRAME};
use vmm::memory::GuestMemory;

use super::super::queue::{Chain, Ring, RingError};
use crate::net::NetBackend;

/// Where `num_buffers` is in the header.
const NUM_BUFFERS: std::ops::Range<usize> = 10..12;
/// Packets moved before the other direction has its turn.
const BUDGET: usize = 64;

/// Why a pump stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pumped {
    /// There is nothing more to move now.
    Idle,
    /// The other side has to make room: the guest for received packets, the network for sent ones.
    Blocked,
    /// There may be more; it is the other direction's turn.
    More,
}

/// What ends a pump.
#[derive(Debug, thiserror::Error)]
pub(super) enum PumpError {
    /// The driver's fault.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// The network is gone.
    #[error("{0}")]
    Network(io::Error),
}

/// From the guest to the network.
pub(super) struct Sender {
    packet: Box<[u8]>,
    chain: Chain,
}

impl Sender {
    pub(super) fn new() -> Sender {
        Sender { packet: vec![0; MAX_PACKET].into_boxed_slice(), chain: Chain::default() }
    }

    /// Sends what is on `ring`. `None` as network: frames go nowhere.
    pub(super) fn pump(
        &mut self,
        ring: &mut Ring,
        memory: &GuestMemory,
        mut network: Option<&mut (dyn NetBackend + '_)>,
    ) -> Result<Pumped, PumpError> {
        // Notifications are wanted again when there is nothing to do.
        ring.disable_notification()?;
        for _ in 0..BUDGET {
            if !ring.next(&mut self.chain)? {
                ring.signal()?;
                return Ok(if ring.enable_notification()? { Pumped::More } else { Pumped::Idle });
            }
            if let Some(network) = network.as_deref_mut()
                && let Some(packet) = self.take(memory)
            {
                match network.send(packet) {
                    Ok(()) => {}
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        ring.put_back();
                        ring.signal()?;
                        return Ok(Pumped::Blocked);
                    }
                    // A header that the kernel does not take: that packet is lost.
                    Err(error) if error.kind() == io::ErrorKind::InvalidInput => {}
                    Err(error) => {
                        ring.put_back();
                        return Err(PumpError::Network(error));
                    }
                }
            }
            ring.complete(self.chain.head, 0)?;
        }
        ring.signal()?;
        Ok(Pumped::More)
    }

    /// The packet in the chain, if it can be one.
    fn take(&mut self, memory: &GuestMemory) -> Option<&[u8]> {
        let len = usize::try_from(self.chain.readable.len()).ok()?;
        let packet = self.packet.get_mut(..len)?;
        if len < HEADER_BYTES + MIN_FRAME || self.chain.readable.read(memory, packet).is_err() {
            return None;
        }
        // Only meant for received packets; the kernel wants it zero.
        packet[NUM_BUFFERS].fill(0);
        Some(packet)
    }
}

/// From the network to the guest.
pub(super) struct Receiver {
    packet: Box<[u8]>,
    /// Length of a packet that waits for room; 0 for none.
    waiting: usize,
    /// Buffers being filled; kept for their lists.
    chains: Vec<Chain>,
    mergeable: bool,
}

impl Receiver {
    pub(super) fn new(mergeable: bool) -> Receiver {
        Receiver { packet: vec![0; MAX_PACKET].into_boxed_slice(), waiting: 0, chains: vec![Chain::default()], mergeable }
    }

    /// Receives into the buffers on `ring`.
    pub(super) fn pump(&mut self, ring: &mut Ring, memory: &GuestMemory, network: &mut dyn NetBackend) -> Result<Pumped, PumpError> {
        // New buffers are news only while a packet waits for them.
        ring.disable_notification()?;
        for _ in 0..BUDGET {
            if self.waiting == 0 {
                match network.receive(&mut self.packet) {
                    Ok(Some(len)) => self.waiting = len,
                    Ok(None) => {
                        ring.signal()?;
                        return Ok(Pumped::Idle);
                    }
                    Err(error) => {
                        ring.signal()?;
                        return Err(PumpError::Network(error));
                    }
                }
            }
            if !self.deliver(ring, memory)? {
                ring.signal()?;
                return Ok(Pumped::Blocked);
            }
        }
        ring.signal()?;
        Ok(Pumped::More)
    }

    /// Puts the waiting packet into the guest's buffers, or drops it if it can never fit. `false`: there are too few buffers, and the
    /// driver will tell when there is one more.
    fn deliver(&mut self, ring: &mut Ring, memory: &GuestMemory) -> Result<bool, RingError> {
        let mut count = 0;
        let mut room = 0;
        while room < self.waiting as u64 {
            let can_never_fit = if self.mergeable { count == usize::from(ring.size()) } else { count == 1 };
            if can_never_fit {
                tracing::debug!(len = self.waiting, "virtio-net: packet does not fit the driver's buffers");
                (0..count).for_each(|_| ring.put_back());
                self.waiting = 0;
                return Ok(true);
            }
            if self.chains.len() == count {
                self.chains.push(Chain::default());
            }
            if !ring.next(&mut self.chains[count])? {
                // Before the buffers so far are given back: the driver has to tell of the next one, not of these.
                if ring.enable_notification()? {
                    continue;
                }
                (0..count).for_each(|_| ring.put_back());
                return Ok(false);
            }
            // Each buffer has at least room for the header (5.1.6.3.2).
            if self.chains[count].writable.len() < HEADER_BYTES as u64 {
                return Err(RingError::Chain { queue: ring.index(), head: self.chains[count].head });
            }
            room += self.chains[count].writable.len();
            count += 1;
        }
        self.packet[NUM_BUFFERS].copy_from_slice(&(count as u16).to_le_bytes());
        let mut rest = &self.packet[..self.waiting];
        for chain in &mut self.chains[..count] {
            let len = usize::try_from(chain.writable.len()).unwrap_or(usize::MAX).min(rest.len());
            let (piece, more) = rest.split_at(len);
            rest = more;
            // What is not in memory is the guest's loss.
            let written = if chain.writable.write(memory, piece).is_ok() { len as u32 } else { 0 };
            ring.complete(chain.head, written)?;
        }
        self.waiting = 0;
        Ok(true)
    }
}
