//! The device. There is no thread: the host's generator answers at once, so a notification is worked off where it arrives.

use std::sync::Arc;

use abi::virtio::device_type;
use vmm::memory::GuestMemory;

use super::super::interrupt::Interrupt;
use super::super::queue::{Chain, Ring, RingError};
use super::super::{Activation, VirtioDevice};

/// Descriptors in the queue.
const QUEUE_SIZE: u16 = 64;
/// Most bytes that one request gets; the used length tells the driver, which asks again.
const MAX_BYTES: usize = 4096;
/// Most times that one notification fills all of the ring.
const MAX_ROUNDS: usize = 16;

/// Where random bytes come from.
pub trait Entropy: Send {
    /// Fills `data`.
    ///
    /// # Errors
    /// What the host says.
    fn fill(&mut self, data: &mut [u8]) -> std::io::Result<()>;
}

/// The host's own generator, getrandom(2).
pub struct HostEntropy;

impl Entropy for HostEntropy {
    fn fill(&mut self, data: &mut [u8]) -> std::io::Result<()> {
        let mut done = 0;
        while done < data.len() {
            match rustix::rand::getrandom(&mut data[done..], rustix::rand::GetRandomFlags::empty()) {
                Ok(len) => done += len,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

/// A virtio entropy device.
pub struct Rng {
    entropy: Box<dyn Entropy>,
    active: Option<Active>,
}

struct Active {
    memory: GuestMemory,
    interrupt: Arc<dyn Interrupt>,
    ring: Option<Ring>,
    chain: Chain,
}

impl Rng {
    /// A device that gives out `entropy`.
    pub fn new(entropy: Box<dyn Entropy>) -> Rng {
        Rng { entropy, active: None }
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u16 {
        device_type::ENTROPY
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, _offset: usize, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, activation: Activation) -> std::io::Result<()> {
        let Activation { memory, mut rings, interrupt, .. } = activation;
        self.active = Some(Active { memory, interrupt, ring: rings.pop().flatten(), chain: Chain::default() });
        self.notify(0);
        Ok(())
    }

    fn notify(&mut self, _queue: u16) {
        let Some(active) = &mut self.active else { return };
        let Some(ring) = &mut active.ring else { return };
        if let Err(error) = drain(ring, &mut active.chain, &active.memory, self.entropy.as_mut()) {
            active.ring = None;
            active.interrupt.needs_reset(&error);
        }
    }

    fn deactivate(&mut self) -> Vec<Option<Ring>> {
        vec![self.active.take().and_then(|active| active.ring)]
    }
}

fn drain(ring: &mut Ring, chain: &mut Chain, memory: &GuestMemory, entropy: &mut dyn Entropy) -> Result<(), RingError> {
    // The processor that notified works here; others that fill the ring meanwhile must not keep it for ever.
    for _ in 0..MAX_ROUNDS {
        for _ in 0..QUEUE_SIZE {
            if !ring.next(chain)? {
                break;
            }
            let mut bytes = [0; MAX_BYTES];
            let len = usize::try_from(chain.writable.len()).unwrap_or(MAX_BYTES).min(MAX_BYTES);
            let bytes = &mut bytes[..len];
            let filled = entropy.fill(bytes).is_ok() && chain.writable.write(memory, bytes).is_ok();
            ring.complete(chain.head, if filled { len as u32 } else { 0 })?;
        }
        ring.signal()?;
        if !ring.enable_notification()? {
            break;
        }
    }
    Ok(())
}
