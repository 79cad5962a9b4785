//! The device: features, configuration, and the thread that works off the ring.

use std::sync::Arc;

use abi::virtio::block::{F_BLK_SIZE, F_DISCARD, F_FLUSH, F_RO, F_SEG_MAX, F_TOPOLOGY, F_WRITE_ZEROES, ID_BYTES};
use abi::virtio::device_type;
use vmm::memory::GuestMemory;

use super::super::interrupt::Interrupt;
use super::super::queue::{Chain, Ring, RingError};
use super::super::worker::{Bell, Worker};
use super::super::{Activation, VirtioDevice, read_config_bytes};
use super::request::{self, Target};
use crate::block::Disk;

/// Descriptors in the queue.
const QUEUE_SIZE: u16 = 256;
/// Most data segments in a request: the queue without header and status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Requests answered before the driver hears of them, so that it can refill the ring meanwhile.
const SIGNAL_EVERY: u32 = 16;

/// A virtio disk.
pub struct Block {
    disk: Arc<dyn Disk>,
    id: [u8; ID_BYTES],
    config: Vec<u8>,
    worker: Option<Worker<Option<Ring>>>,
}

impl Block {
    /// `disk` as a device whose id string is `id`, as far as 20 bytes go.
    pub fn new(disk: Arc<dyn Disk>, id: &str) -> Block {
        let mut bytes = [0; ID_BYTES];
        let len = id.len().min(ID_BYTES);
        bytes[..len].copy_from_slice(&id.as_bytes()[..len]);
        let config = request::config(disk.as_ref(), SEG_MAX);
        Block { disk, id: bytes, config, worker: None }
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u16 {
        device_type::BLOCK
    }

    fn features(&self) -> u64 {
        let always = F_SEG_MAX | F_BLK_SIZE | F_TOPOLOGY | F_FLUSH;
        if self.disk.read_only() { always | F_RO } else { always | F_DISCARD | F_WRITE_ZEROES }
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> std::io::Result<()> {
        let Activation { memory, features, mut rings, interrupt } = activation;
        let Some(Some(ring)) = rings.pop() else { return Ok(()) };
        let disk = Arc::clone(&self.disk);
        let (id, write_through) = (self.id, features & F_FLUSH == 0);
        let worker = Worker::spawn("virtio-blk", move |bell| {
            let target = Target { disk: disk.as_ref(), id: &id, write_through };
            work(&bell, ring, &target, &memory, interrupt.as_ref())
        })?;
        // What is on the ring already.
        worker.ring();
        self.worker = Some(worker);
        Ok(())
    }

    fn notify(&mut self, _queue: u16) {
        if let Some(worker) = &self.worker {
            worker.ring();
        }
    }

    fn deactivate(&mut self) -> Vec<Option<Ring>> {
        let Some(worker) = self.worker.take() else { return vec![None] };
        let ring = worker.stop().flatten();
        // The driver is gone, or a snapshot is made: nothing is to be lost from here on.
        if let Err(error) = self.disk.flush() {
            tracing::error!(%error, "virtio-blk: flush failed");
        }
        vec![ring]
    }
}

/// Works off `ring` until it is time to end, and gives it back; a ring that the driver broke is not touched again.
fn work(bell: &Bell, mut ring: Ring, target: &Target<'_>, memory: &GuestMemory, interrupt: &dyn Interrupt) -> Option<Ring> {
    let mut chain = Chain::default();
    while bell.wait() {
        if let Err(error) = drain(bell, &mut ring, &mut chain, target, memory) {
            interrupt.needs_reset(&error);
            return None;
        }
    }
    Some(ring)
}

fn drain(bell: &Bell, ring: &mut Ring, chain: &mut Chain, target: &Target<'_>, memory: &GuestMemory) -> Result<(), RingError> {
    loop {
        ring.disable_notification()?;
        let mut unheard = 0;
        while !bell.is_stopped() && ring.next(chain)? {
            let written = target.execute(memory, chain);
            ring.complete(chain.head, written)?;
            unheard += 1;
            if unheard == SIGNAL_EVERY {
                ring.signal()?;
                unheard = 0;
            }
        }
        ring.signal()?;
        if !ring.enable_notification()? || bell.is_stopped() {
            return Ok(());
        }
    }
}
