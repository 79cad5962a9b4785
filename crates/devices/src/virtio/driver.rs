//! A driver for tests: the guest's side of a virtio device, over the same registers and rings that a guest uses, without a
//! machine. It can also do what no honest driver does.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use abi::virtio::pci::common;
use abi::virtio::{feature, status};
use vm_memory::{Bytes, GuestAddress};
use vmm::memory::GuestMemory;

use super::VirtioDevice;
use super::interrupt::{InterruptSink, Interrupts};
use super::registers::Registers;

/// Guest memory of a test: 16 MiB at 0.
const MEMORY_SIZE: u64 = 16 << 20;
/// Where the rings of queue 0 are; each queue has [`QUEUE_SPAN`].
const QUEUE_BASE: u64 = 0x10_0000;
const QUEUE_SPAN: u64 = 0x1_0000;
const DRIVER_AREA: u64 = 0x8000;
const DEVICE_AREA: u64 = 0xc000;
/// Where buffers are; a plain bump allocator.
const BUFFERS: u64 = 0x40_0000;

/// Descriptor flags (2.7.5).
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// Counts what a driver would be interrupted by.
#[derive(Default)]
pub struct Counter {
    pub messages: Mutex<Vec<u16>>,
    pub line: AtomicU32,
}

impl InterruptSink for Counter {
    fn msix_enabled(&self) -> bool {
        true
    }
    fn message(&self, vector: u16) {
        self.messages.lock().unwrap().push(vector);
    }
    fn line(&self, asserted: bool) {
        self.line.store(u32::from(asserted), Ordering::SeqCst);
    }
}

pub struct Driver {
    pub memory: GuestMemory,
    pub registers: Registers,
    pub counter: Arc<Counter>,
    pub features: u64,
    next_buffer: AtomicU64,
    queues: Vec<DriverQueue>,
}

#[derive(Clone, Copy, Default)]
struct DriverQueue {
    size: u16,
    next_descriptor: u16,
    available: u16,
    /// `available` when the device was last told.
    told: u16,
    used: u16,
}

impl Driver {
    /// A device before its driver does anything.
    pub fn cold(device: Box<dyn VirtioDevice>) -> Driver {
        Driver::cold_in(device, vmm::memory::map(&[(0, MEMORY_SIZE)]).unwrap())
    }

    pub fn cold_in(device: Box<dyn VirtioDevice>, memory: GuestMemory) -> Driver {
        let counter = Arc::new(Counter::default());
        let queues = device.queue_sizes().len();
        let interrupts = Arc::new(Interrupts::new(queues, counter.clone()));
        let registers = Registers::new(device, memory.clone(), interrupts);
        Driver {
            memory,
            registers,
            counter,
            features: 0,
            next_buffer: AtomicU64::new(BUFFERS),
            queues: vec![DriverQueue::default(); queues],
        }
    }

    /// A device whose driver accepted all offered features but those in `without`, and enabled all queues.
    pub fn start(device: Box<dyn VirtioDevice>, without: u64) -> Driver {
        let mut driver = Driver::cold(device);
        driver.negotiate(without);
        for queue in 0..driver.queues.len() as u16 {
            driver.set_up_queue(queue, 64);
        }
        driver.set_status(0xf);
        driver
    }

    pub fn write(&mut self, register: u64, len: usize, value: u64) {
        self.registers.write_common(register, &value.to_le_bytes()[..len]);
    }

    pub fn read(&self, register: u64, len: usize) -> u64 {
        let mut bytes = [0u8; 8];
        self.registers.read_common(register, &mut bytes[..len]);
        u64::from_le_bytes(bytes)
    }

    pub fn status(&self) -> u8 {
        self.read(common::DEVICE_STATUS, 1) as u8
    }

    pub fn set_status(&mut self, value: u8) {
        self.write(common::DEVICE_STATUS, 1, u64::from(value));
    }

    pub fn offered(&mut self) -> u64 {
        self.write(common::DEVICE_FEATURE_SELECT, 4, 0);
        let low = self.read(common::DEVICE_FEATURE, 4);
        self.write(common::DEVICE_FEATURE_SELECT, 4, 1);
        low | self.read(common::DEVICE_FEATURE, 4) << 32
    }

    /// Up to FEATURES_OK.
    pub fn negotiate(&mut self, without: u64) {
        self.set_status(0);
        self.set_status(1);
        self.set_status(3);
        self.features = self.offered() & !without;
        assert!(self.features & feature::VERSION_1 != 0);
        self.write(common::DRIVER_FEATURE_SELECT, 4, 0);
        self.write(common::DRIVER_FEATURE, 4, self.features & 0xffff_ffff);
        self.write(common::DRIVER_FEATURE_SELECT, 4, 1);
        self.write(common::DRIVER_FEATURE, 4, self.features >> 32);
        self.set_status(0xb);
        assert_eq!(self.status(), 0xb);
    }

    pub fn set_up_queue(&mut self, queue: u16, size: u16) {
        self.write(common::QUEUE_SELECT, 2, u64::from(queue));
        let size = size.min(self.read(common::QUEUE_SIZE, 2) as u16);
        self.write(common::QUEUE_SIZE, 2, u64::from(size));
        self.write(common::QUEUE_MSIX_VECTOR, 2, u64::from(queue) + 1);
        let base = queue_base(queue);
        self.memory.write_slice(&[0; QUEUE_SPAN as usize], GuestAddress(base)).unwrap();
        self.write(common::QUEUE_DESC, 4, base);
        self.write(common::QUEUE_DESC + 4, 4, 0);
        self.write(common::QUEUE_DRIVER, 8, base + DRIVER_AREA);
        self.write(common::QUEUE_DEVICE, 8, base + DEVICE_AREA);
        self.write(common::QUEUE_ENABLE, 2, 1);
        self.queues[usize::from(queue)] = DriverQueue { size, ..DriverQueue::default() };
    }

    /// Room for a buffer, filled with `data`.
    pub fn buffer(&self, data: &[u8]) -> u64 {
        let address = self.room(data.len());
        self.memory.write_slice(data, GuestAddress(address)).unwrap();
        address
    }

    pub fn room(&self, len: usize) -> u64 {
        let len = (len as u64 + 63) & !63;
        let address = self.next_buffer.fetch_add(len, Ordering::SeqCst);
        assert!(address + len <= MEMORY_SIZE, "test uses too much guest memory");
        address
    }

    pub fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory.read_slice(&mut data, GuestAddress(address)).unwrap();
        data
    }

    pub fn set_descriptor(&self, queue: u16, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        self.set_descriptor_at(queue_base(queue) + u64::from(index) * 16, address, len, flags, next);
    }

    pub fn set_descriptor_at(&self, at: u64, address: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.memory.write_slice(&bytes, GuestAddress(at)).unwrap();
    }

    /// Puts a chain on the ring without telling the device: readable pieces, then writable ones. Returns its head.
    pub fn add(&mut self, queue: u16, readable: &[(u64, u32)], writable: &[(u64, u32)]) -> u16 {
        let size = self.queues[usize::from(queue)].size;
        let head = self.queues[usize::from(queue)].next_descriptor;
        let count = readable.len() + writable.len();
        for (place, (address, len)) in readable.iter().chain(writable).enumerate() {
            let index = (head + place as u16) % size;
            let more = if place + 1 < count { NEXT } else { 0 };
            let write = if place >= readable.len() { WRITE } else { 0 };
            self.set_descriptor(queue, index, *address, *len, more | write, (index + 1) % size);
        }
        self.queues[usize::from(queue)].next_descriptor = (head + count as u16) % size;
        self.offer(queue, head);
        head
    }

    /// Makes the chain at `head` available.
    pub fn offer(&mut self, queue: u16, head: u16) {
        let state = &mut self.queues[usize::from(queue)];
        let ring = queue_base(queue) + DRIVER_AREA;
        let slot = ring + 4 + u64::from(state.available % state.size) * 2;
        state.available = state.available.wrapping_add(1);
        let index = state.available;
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.set_available(queue, index);
    }

    pub fn set_available(&self, queue: u16, index: u16) {
        self.memory.store(index, GuestAddress(queue_base(queue) + DRIVER_AREA + 2), Ordering::SeqCst).unwrap();
    }

    /// Asks for an interrupt after the next used buffer.
    pub fn arm(&mut self, queue: u16) {
        let state = self.queues[usize::from(queue)];
        let at = queue_base(queue) + DRIVER_AREA + 4 + u64::from(state.size) * 2;
        self.memory.store(state.used, GuestAddress(at), Ordering::SeqCst).unwrap();
    }

    /// Notifies the device as an honest driver does: only if it wants to hear (2.7.10).
    pub fn tell(&mut self, queue: u16) {
        fence(Ordering::SeqCst);
        let DriverQueue { size, available, told, .. } = self.queues[usize::from(queue)];
        let ring = queue_base(queue) + DEVICE_AREA;
        let wanted = if self.features & feature::EVENT_IDX != 0 {
            let event: u16 = self.memory.load(GuestAddress(ring + 4 + u64::from(size) * 8), Ordering::SeqCst).unwrap();
            available.wrapping_sub(event).wrapping_sub(1) < available.wrapping_sub(told)
        } else {
            let flags: u16 = self.memory.load(GuestAddress(ring), Ordering::SeqCst).unwrap();
            flags & 1 == 0
        };
        self.queues[usize::from(queue)].told = available;
        if wanted {
            self.kick(queue);
        }
    }

    /// Notifies the device, whether it wants or not.
    pub fn kick(&mut self, queue: u16) {
        self.registers.notify(queue);
    }

    /// The next used buffer, if there is one: head and length.
    pub fn poll(&mut self, queue: u16) -> Option<(u16, u32)> {
        let state = &mut self.queues[usize::from(queue)];
        let ring = queue_base(queue) + DEVICE_AREA;
        let index: u16 = self.memory.load(GuestAddress(ring + 2), Ordering::SeqCst).unwrap();
        if index == state.used {
            return None;
        }
        let at = ring + 4 + u64::from(state.used % state.size) * 8;
        state.used = state.used.wrapping_add(1);
        let head: u32 = self.memory.read_obj(GuestAddress(at)).unwrap();
        let len: u32 = self.memory.read_obj(GuestAddress(at + 4)).unwrap();
        Some((head as u16, len))
    }

    /// Waits for the next used buffer.
    pub fn wait(&mut self, queue: u16) -> (u16, u32) {
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            if let Some(used) = self.poll(queue) {
                return used;
            }
            assert!(Instant::now() < end, "device does not answer; status {:#x}", self.status());
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Waits until the device asks for a reset.
    pub fn wait_broken(&mut self) {
        self.wait_until(|driver| driver.status() & status::DEVICE_NEEDS_RESET != 0);
    }

    pub fn wait_until(&mut self, mut condition: impl FnMut(&mut Driver) -> bool) {
        let end = Instant::now() + Duration::from_secs(10);
        while !condition(self) {
            assert!(Instant::now() < end, "waited in vain; status {:#x}", self.status());
            std::thread::sleep(Duration::from_micros(200));
        }
    }
}

pub fn queue_base(queue: u16) -> u64 {
    QUEUE_BASE + u64::from(queue) * QUEUE_SPAN
}
