use std::sync::Mutex;

use abi::pci::*;
use vm_memory::{Bytes, GuestAddress};

use super::super::rng::{HostEntropy, Rng};
use super::*;
use crate::DeviceMap;
use crate::interrupts::InterruptRouter;
use crate::pci::PciBus;

#[derive(Default)]
struct Host {
    messages: Mutex<Vec<(u64, u32)>>,
}

impl MsiSink for Host {
    fn signal_msi(&self, address: u64, data: u32) {
        self.messages.lock().unwrap().push((address, data));
    }
}

fn rng() -> (Arc<Host>, GuestMemory, Arc<VirtioPci>) {
    let host = Arc::new(Host::default());
    let memory = vmm::memory::map(&[(0, 1 << 20)]).unwrap();
    let function = VirtioPci::new(Box::new(Rng::new(Box::new(HostEntropy))), memory.clone(), host.clone());
    (host, memory, function)
}

impl crate::interrupts::InterruptSink for Host {
    fn set_extint(&self, _asserted: bool) {}
    fn set_ioapic_routes(&self, _routes: &[Option<vmm::backend::IoapicRoute>]) {}
}

/// Whether the function's INTx is up.
fn line(function: &VirtioPci) -> bool {
    function.config().read_u32(COMMAND) >> 16 & u32::from(STATUS_INTERRUPT) != 0
}

fn write(function: &VirtioPci, offset: u64, len: usize, value: u64) {
    function.bar_write(BAR, offset, &value.to_le_bytes()[..len]);
}

fn read(function: &VirtioPci, offset: u64, len: usize) -> u64 {
    let mut bytes = [0; 8];
    function.bar_read(BAR, offset, &mut bytes[..len]);
    u64::from_le_bytes(bytes)
}

/// What a driver does, up to one request.
fn request(function: &VirtioPci, memory: &GuestMemory) {
    write(function, common::DEVICE_STATUS, 1, 3);
    write(function, common::DRIVER_FEATURE_SELECT, 4, 1);
    write(function, common::DRIVER_FEATURE, 4, 1);
    write(function, common::DEVICE_STATUS, 1, 0xb);
    write(function, common::QUEUE_SELECT, 2, 0);
    write(function, common::QUEUE_MSIX_VECTOR, 2, 1);
    write(function, common::QUEUE_DESC, 8, 0x1000);
    write(function, common::QUEUE_DRIVER, 8, 0x2000);
    write(function, common::QUEUE_DEVICE, 8, 0x3000);
    write(function, common::QUEUE_ENABLE, 2, 1);
    write(function, common::DEVICE_STATUS, 1, 0xf);
    assert_eq!(read(function, common::DEVICE_STATUS, 1), 0xf);
    memory.write_obj(0x4000u64, GuestAddress(0x1000)).unwrap();
    memory.write_obj(64u32, GuestAddress(0x1008)).unwrap();
    memory.write_obj(2u16, GuestAddress(0x100c)).unwrap();
    memory.write_obj(1u16, GuestAddress(0x2002)).unwrap();
    let notify = read(function, common::QUEUE_NOTIFY_OFF, 2);
    write(function, NOTIFY + notify * NOTIFY_MULTIPLIER, 2, 0);
    let used: u16 = memory.read_obj(GuestAddress(0x3002)).unwrap();
    assert_eq!(used, 1);
}

#[test]
fn configuration_space_is_that_of_a_modern_device() {
    let (_host, _memory, function) = rng();
    assert_eq!(function.config().read_u32(VENDOR_ID), 0x1044_1af4);
    assert_eq!(function.config().read_u32(REVISION) & 0xff, 1);
    let capabilities = function.config().capability(CAP_VENDOR);
    let kinds: Vec<u8> = capabilities.iter().map(|at| (function.config().read_u32(*at) >> 24) as u8).collect();
    assert_eq!(kinds, [CAP_COMMON_CFG, CAP_ISR_CFG, CAP_DEVICE_CFG, CAP_NOTIFY_CFG, CAP_PCI_CFG]);
    let lengths: Vec<u8> = capabilities.iter().map(|at| (function.config().read_u32(*at) >> 16) as u8).collect();
    assert_eq!(lengths, [16, 16, 16, 20, 20]);
    assert_eq!(function.config().read_u32(capabilities[3] + 16), 4);
    assert_eq!(function.config().msix().unwrap().vectors(), 2);
}

#[test]
fn without_msix_the_line_is_raised_and_reading_isr_drops_it() {
    let (host, memory, function) = rng();
    request(&function, &memory);
    assert!(line(&function));
    assert_eq!(read(&function, ISR, 1), 1);
    assert!(!line(&function));
    assert_eq!(read(&function, ISR, 1), 0);
    assert!(host.messages.lock().unwrap().is_empty());
}

#[test]
fn with_msix_a_message_is_sent() {
    let (host, memory, function) = rng();
    let msix = function.config().capability(CAP_MSIX)[0];
    function.config().write(msix + 2, &MSIX_ENABLE.to_le_bytes());
    // As a guest reaches the table: through the bus.
    let mut bus = PciBus::new();
    bus.add_next(function.clone(), &InterruptRouter::new(host.clone())).unwrap();
    bus.assign().unwrap();
    let base = u64::from(function.config().read_u32(BAR0));
    let mut map = DeviceMap::default();
    Arc::new(bus).map(&mut map);
    let (window, offset) = map.mmio(base).unwrap();
    let entry = offset + u64::from(MSIX_TABLE) + MSIX_ENTRY_SIZE;
    window.mmio_write(entry, &0xfee0_1000u64.to_le_bytes());
    window.mmio_write(entry + 8, &0x41u64.to_le_bytes());
    request(&function, &memory);
    assert_eq!(*host.messages.lock().unwrap(), [(0xfee0_1000, 0x41)]);
    assert_eq!(read(&function, ISR, 1), 0);
}

#[test]
fn the_window_in_configuration_space_reaches_the_registers() {
    let (_host, _memory, function) = rng();
    let window = *function.config().capability(CAP_VENDOR).last().unwrap();
    let set = |offset: u8, bytes: &[u8]| {
        function.config().write(window + offset, bytes);
        function.config_written(window + offset, bytes.len());
    };
    let get = |len: usize| {
        let mut data = vec![0; len];
        assert!(function.config_read(window + capability::DATA, &mut data));
        data
    };
    set(capability::BAR, &[0]);
    set(capability::OFFSET, &(common::DEVICE_STATUS as u32).to_le_bytes());
    set(capability::LENGTH, &1u32.to_le_bytes());
    set(capability::DATA, &[3]);
    assert_eq!(read(&function, common::DEVICE_STATUS, 1), 3);
    assert_eq!(get(1), [3]);
    set(capability::OFFSET, &(common::NUM_QUEUES as u32).to_le_bytes());
    set(capability::LENGTH, &2u32.to_le_bytes());
    assert_eq!(get(4), [1, 0, 0, 0]);
    // Neither beyond the BAR, nor odd, nor longer than the window.
    for (offset, length) in [(0x8000u32, 4u32), (u32::MAX, 1), (1, 2), (0, 8), (0, 0), (0, u32::MAX)] {
        set(capability::OFFSET, &offset.to_le_bytes());
        set(capability::LENGTH, &length.to_le_bytes());
        set(capability::DATA, &[0xff; 4]);
        assert_eq!(get(4), [0; 4]);
    }
    let mut other = [0; 4];
    assert!(!function.config_read(0, &mut other));
}

#[test]
fn a_reset_of_the_bus_resets_the_device() {
    let (_host, memory, function) = rng();
    request(&function, &memory);
    let state = function.state();
    function.reset();
    assert_eq!(read(&function, common::DEVICE_STATUS, 1), 0);
    function.restore(&state).unwrap();
    assert_eq!(read(&function, common::DEVICE_STATUS, 1), 0xf);
    assert_eq!(read(&function, common::QUEUE_DESC, 4), 0x1000);
    assert_eq!(read(&function, ISR, 1), 1);
}

#[test]
fn every_byte_of_the_bar_can_be_read_and_written() {
    let (_host, _memory, function) = rng();
    for offset in (0..BAR_SIZE).step_by(3) {
        for len in [1, 2, 4, 8] {
            let mut data = vec![0; len];
            function.bar_read(BAR, offset, &mut data);
            function.bar_write(BAR, offset, &vec![0xff; len]);
        }
    }
    assert_eq!(read(&function, common::DEVICE_STATUS, 1) & 4, 0);
}
