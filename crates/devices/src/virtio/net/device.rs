//! The device and its worker.
//!
//! The worker sleeps on its doorbell and on the network. It does not look at the network while the guest has no room for a
//! packet, nor for room there while the guest has nothing to send, so that nobody can keep it busy for nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use abi::virtio::device_type;
use abi::virtio::net::{
    Config, F_CSUM, F_CTRL_MAC_ADDR, F_CTRL_RX, F_CTRL_VQ, F_GUEST_CSUM, F_GUEST_TSO4, F_GUEST_TSO6, F_HOST_TSO4, F_HOST_TSO6, F_MAC,
    F_MRG_RXBUF, F_STATUS, S_LINK_UP,
};
use frames::Offloads;
use rustix::event::PollFlags;
use serde_json::Value;
use vmm::memory::GuestMemory;
use zerocopy::IntoBytes;

use super::super::interrupt::Interrupt;
use super::super::queue::{Chain, Ring};
use super::super::worker::{Bell, Worker};
use super::super::{Activation, VirtioDevice, read_config_bytes};
use super::control::{self, Address};
use super::packet::{PumpError, Pumped, Receiver, Sender};
use crate::net::{Mac, NetBackend};

/// Sizes of receive, transmit and control queue.
const QUEUE_SIZES: [u16; 3] = [256, 256, 64];
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const CONTROL: usize = 2;

/// A virtio network card.
pub struct Net {
    own_mac: Mac,
    address: Address,
    link_up: Arc<AtomicBool>,
    /// `None` while the worker has it.
    network: Option<Box<dyn NetBackend>>,
    worker: Option<Worker<Traffic>>,
}

impl Net {
    /// A card with address `mac` on `network`.
    pub fn new(network: Box<dyn NetBackend>, mac: Mac) -> Net {
        Net { own_mac: mac, address: Address::new(mac), link_up: Arc::new(AtomicBool::new(true)), network: Some(network), worker: None }
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u16 {
        device_type::NET
    }

    fn features(&self) -> u64 {
        let card = F_MAC | F_STATUS | F_MRG_RXBUF | F_CTRL_VQ | F_CTRL_RX | F_CTRL_MAC_ADDR;
        let offloads = F_CSUM | F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_HOST_TSO4 | F_HOST_TSO6;
        card | offloads
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let status = if self.link_up.load(Ordering::Acquire) { S_LINK_UP } else { 0 };
        let config = Config { mac: self.address.get().0, status: status.into() };
        read_config_bytes(config.as_bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> std::io::Result<()> {
        let Activation { memory, features, rings, interrupt } = activation;
        let mut rings = rings.into_iter();
        let Some(mut network) = self.network.take() else {
            return Err(std::io::Error::other("the network was lost when the card's thread failed"));
        };
        let has = |feature| features & feature != 0;
        let offloads = Offloads { checksum: has(F_GUEST_CSUM), tso4: has(F_GUEST_TSO4), tso6: has(F_GUEST_TSO6) };
        if let Err(error) = network.set_guest_offloads(offloads) {
            self.network = Some(network);
            return Err(error);
        }
        let mut traffic = Traffic {
            rings: std::array::from_fn(|_| rings.next().flatten()),
            network,
            memory,
            interrupt,
            address: self.address.clone(),
            link_up: Arc::clone(&self.link_up),
            sender: Sender::new(),
            receiver: Receiver::new(has(F_MRG_RXBUF)),
            chain: Chain::default(),
        };
        let worker = Worker::spawn("virtio-net", move |bell| {
            traffic.run(&bell);
            traffic
        })?;
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
        let Some(traffic) = self.worker.take().and_then(Worker::stop) else { return Vec::new() };
        self.network = Some(traffic.network);
        traffic.rings.into()
    }

    fn reset(&mut self) {
        self.address.set(self.own_mac);
    }

    fn state(&self) -> Value {
        Value::from(self.address.get().to_string())
    }

    fn restore(&mut self, state: &Value) -> Result<(), &'static str> {
        let mac = state.as_str().and_then(|text| text.parse().ok()).ok_or("a network card's state is its address")?;
        self.address.set(mac);
        Ok(())
    }
}

/// What the worker works with.
struct Traffic {
    rings: [Option<Ring>; 3],
    network: Box<dyn NetBackend>,
    memory: GuestMemory,
    interrupt: Arc<dyn Interrupt>,
    address: Address,
    link_up: Arc<AtomicBool>,
    sender: Sender,
    receiver: Receiver,
    chain: Chain,
}

impl Traffic {
    fn run(&mut self, bell: &Bell) {
        let mut wanted = PollFlags::IN;
        loop {
            let network = (!wanted.is_empty() && self.is_up()).then(|| (self.network.fd(), wanted));
            if bell.wait_or(network).is_none() {
                return;
            }
            wanted = self.work(bell);
        }
    }

    /// Moves what there is to move; says what to wait for on the network.
    fn work(&mut self, bell: &Bell) -> PollFlags {
        while !bell.is_stopped() {
            match self.turn() {
                Ok((_, true)) => {}
                Ok((wanted, false)) => return wanted,
                Err(PumpError::Ring(error)) => {
                    self.rings = [None, None, None];
                    self.interrupt.needs_reset(&error);
                    return PollFlags::empty();
                }
                // Once: without a link the network is left alone.
                Err(PumpError::Network(error)) => {
                    tracing::error!(%error, "virtio-net: network is gone, the link is down");
                    self.link_up.store(false, Ordering::Release);
                    self.interrupt.config_changed();
                }
            }
        }
        PollFlags::empty()
    }

    fn is_up(&self) -> bool {
        self.link_up.load(Ordering::Acquire)
    }

    /// One turn for each direction: what to wait for on the network, and whether there is more to do before.
    fn turn(&mut self) -> Result<(PollFlags, bool), PumpError> {
        let mut wanted = PollFlags::empty();
        let mut more = false;
        let up = self.is_up();
        if let Some(ring) = &mut self.rings[CONTROL] {
            control::drain(ring, &mut self.chain, &self.memory, &self.address)?;
        }
        if up && self.network.has_unsent() {
            match self.network.send_unsent() {
                Ok(()) => {}
                Err(error) if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::Interrupted) => {}
                Err(error) => return Err(PumpError::Network(error)),
            }
        }
        if let Some(ring) = &mut self.rings[TRANSMIT] {
            // Without a link, what is sent is lost.
            let network = if up { Some(self.network.as_mut()) } else { None };
            match self.sender.pump(ring, &self.memory, network)? {
                Pumped::Idle => {}
                Pumped::Blocked => wanted |= PollFlags::OUT,
                Pumped::More => more = true,
            }
        }
        if self.network.has_unsent() {
            wanted |= PollFlags::OUT;
        }
        if up && let Some(ring) = &mut self.rings[RECEIVE] {
            match self.receiver.pump(ring, &self.memory, self.network.as_mut())? {
                Pumped::Idle => wanted |= PollFlags::IN,
                Pumped::Blocked => {}
                Pumped::More => more = true,
            }
        }
        Ok((wanted, more))
    }
}
