//! The device. Output goes to its sink on the notifying processor's thread, as a serial port's does; input may come from any
//! thread and waits, up to a bound, for buffers of the driver.

use std::collections::VecDeque;
use std::io::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use abi::virtio::device_type;
use serde::Deserialize;
use serde_json::Value;
use vmm::memory::GuestMemory;

use super::super::interrupt::Interrupt;
use super::super::queue::{Chain, Ring, RingError};
use super::super::{Activation, VirtioDevice};

/// Sizes of receive and transmit queue.
const QUEUE_SIZES: [u16; 2] = [64, 64];
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// Most bytes of input that wait for the driver.
const MAX_WAITING: usize = 64 << 10;
/// Bytes moved at once.
const CHUNK: usize = 4096;
/// Most buffers written out for one notification; the driver fills the ring only while it is let.
const MAX_BUFFERS: usize = 1024;

/// A virtio console.
pub struct Console {
    shared: Arc<Mutex<Shared>>,
}

/// Where a console's input goes in.
#[derive(Clone)]
pub struct ConsoleInput {
    shared: Arc<Mutex<Shared>>,
}

struct Shared {
    output: Box<dyn Write + Send>,
    input: VecDeque<u8>,
    active: Option<Active>,
}

struct Active {
    memory: GuestMemory,
    interrupt: Arc<dyn Interrupt>,
    rings: [Option<Ring>; 2],
    chain: Chain,
}

impl Console {
    /// A console that writes to `output`, and where its input goes in.
    pub fn new(output: Box<dyn Write + Send>) -> (Console, ConsoleInput) {
        let shared = Arc::new(Mutex::new(Shared { output, input: VecDeque::new(), active: None }));
        (Console { shared: Arc::clone(&shared) }, ConsoleInput { shared })
    }
}

impl ConsoleInput {
    /// Types `bytes`; says how many there was room for.
    pub fn push(&self, bytes: &[u8]) -> usize {
        let mut shared = lock(&self.shared);
        let len = bytes.len().min(MAX_WAITING - shared.input.len());
        shared.input.extend(&bytes[..len]);
        shared.work();
        len
    }
}

impl VirtioDevice for Console {
    fn device_type(&self) -> u16 {
        device_type::CONSOLE
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, _offset: usize, data: &mut [u8]) {
        // Nothing in it is offered: no size, no ports, no emergency write.
        data.fill(0);
    }

    fn activate(&mut self, activation: Activation) -> std::io::Result<()> {
        let Activation { memory, rings, interrupt, .. } = activation;
        let mut rings = rings.into_iter();
        let mut shared = lock(&self.shared);
        let rings = std::array::from_fn(|_| rings.next().flatten());
        shared.active = Some(Active { memory, interrupt, rings, chain: Chain::default() });
        shared.work();
        Ok(())
    }

    fn notify(&mut self, _queue: u16) {
        lock(&self.shared).work();
    }

    fn deactivate(&mut self) -> Vec<Option<Ring>> {
        lock(&self.shared).active.take().map(|active| active.rings.into()).unwrap_or_default()
    }

    fn state(&self) -> Value {
        lock(&self.shared).input.iter().copied().collect::<Vec<u8>>().into()
    }

    fn restore(&mut self, state: &Value) -> Result<(), &'static str> {
        let bytes: Vec<u8> = Vec::deserialize(state).map_err(|_| "a console's state is its waiting input")?;
        if bytes.len() > MAX_WAITING {
            return Err("there is more waiting input than a console takes");
        }
        lock(&self.shared).input = bytes.into();
        Ok(())
    }
}

impl Shared {
    fn work(&mut self) {
        let Some(active) = &mut self.active else { return };
        let result = active.send(self.output.as_mut()).and_then(|()| active.receive(&mut self.input));
        if let Err(error) = result {
            active.rings = [None, None];
            active.interrupt.needs_reset(&error);
        }
    }
}

impl Active {
    /// From the guest.
    fn send(&mut self, output: &mut dyn Write) -> Result<(), RingError> {
        let Some(ring) = &mut self.rings[TRANSMIT] else { return Ok(()) };
        let mut any = false;
        for _ in 0..MAX_BUFFERS {
            if !ring.next(&mut self.chain)? {
                if ring.enable_notification()? {
                    continue;
                }
                break;
            }
            any = true;
            let mut bytes = [0; CHUNK];
            while !self.chain.readable.is_empty() {
                let len = usize::try_from(self.chain.readable.len()).unwrap_or(CHUNK).min(CHUNK);
                if self.chain.readable.read(&self.memory, &mut bytes[..len]).is_err() {
                    break;
                }
                // Nobody listens: the guest cannot help it.
                let _ = output.write_all(&bytes[..len]);
            }
            ring.complete(self.chain.head, 0)?;
        }
        if any {
            let _ = output.flush();
        }
        ring.signal()
    }

    /// To the guest.
    fn receive(&mut self, input: &mut VecDeque<u8>) -> Result<(), RingError> {
        let Some(ring) = &mut self.rings[RECEIVE] else { return Ok(()) };
        while !input.is_empty() {
            if !ring.next(&mut self.chain)? {
                if ring.enable_notification()? {
                    continue;
                }
                break;
            }
            let mut bytes = [0; CHUNK];
            let len = usize::try_from(self.chain.writable.len()).unwrap_or(CHUNK).min(CHUNK).min(input.len());
            for (place, byte) in bytes.iter_mut().zip(input.drain(..len)) {
                *place = byte;
            }
            let written = self.chain.writable.write(&self.memory, &bytes[..len]).is_ok();
            ring.complete(self.chain.head, if written { len as u32 } else { 0 })?;
        }
        ring.signal()
    }
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}
