//! The device as OpenBSD's driver uses it: the accesses of `virtio_pci.c` and `vmmci.c`, in their order and width.

use std::sync::Arc;
use std::time::Duration;

use abi::openbsd::vmmci as words;
use abi::pci::{CONFIG_DATA, CONFIG_ENABLE};
use abi::virtio::pci::{ISR_CONFIG, legacy};
use abi::virtio::status;
use proptest::prelude::*;
use vmm::time::Clock;

use super::conversation::{ANSWER_TIME, SHUTDOWN_TIME};
use super::*;
use crate::DeviceMap;
use crate::interrupts::{InterruptRouter, InterruptSink};
use crate::pci::{PciBus, PciFunction};
use crate::snapshot::Snapshot;
use crate::testing::{Events, Time};

/// 2026-07-30 and some microseconds.
const WALL: Duration = Duration::from_micros(1_785_369_600_123_456);
const SECOND: u64 = 1_000_000_000;

struct Machine {
    time: Time,
    events: Arc<Events>,
    device: Arc<Vmmci>,
}

impl Machine {
    fn new() -> Machine {
        let time = Time::new(WALL);
        let events = Arc::new(Events::default());
        let device = Vmmci::new(time.timers.clone(), events.clone());
        Machine { time, events, device }
    }

    /// As after `virtio_pci_attach` with vmmci's child attached.
    fn attached(features: u32) -> Machine {
        let machine = Machine::new();
        machine.write(legacy::DEVICE_STATUS, &[0]);
        for bits in [status::ACKNOWLEDGE, status::DRIVER] {
            let old = machine.read::<1>(legacy::DEVICE_STATUS)[0];
            machine.write(legacy::DEVICE_STATUS, &[old | bits]);
        }
        let offered = u32::from_le_bytes(machine.read(legacy::DEVICE_FEATURES));
        machine.write(legacy::DRIVER_FEATURES, &(offered & features).to_le_bytes());
        machine.write(legacy::DEVICE_STATUS, &[status::ACKNOWLEDGE | status::DRIVER | status::DRIVER_OK]);
        machine
    }

    fn read<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0xaa; N];
        self.device.bar_read(0, offset, &mut data);
        data
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.device.bar_write(0, offset, data);
    }

    fn command(&self) -> u32 {
        u32::from_le_bytes(self.read(legacy::DEVICE_CONFIG + words::COMMAND))
    }

    fn acknowledge(&self, command: u32) {
        self.write(legacy::DEVICE_CONFIG + words::COMMAND, &command.to_le_bytes());
    }

    /// `virtio_pci_read_device_config_8`: the upper half first.
    fn read_8(&self, index: u64) -> u64 {
        let half = |at| u64::from(u32::from_le_bytes(self.read(legacy::DEVICE_CONFIG + index + at)));
        half(4) << 32 | half(0)
    }
}

const ALL: u32 = words::F_TIMESYNC | words::F_ACK | words::F_SYNCRTC;

#[test]
fn openbsd_finds_its_control_device_on_the_bus() {
    struct Nobody;
    impl crate::MsiSink for Nobody {
        fn signal_msi(&self, _: u64, _: u32) {}
    }
    impl InterruptSink for Nobody {
        fn set_extint(&self, _: bool) {}
        fn set_ioapic_routes(&self, _: &[Option<vmm::backend::IoapicRoute>]) {}
    }
    let router = InterruptRouter::new(Arc::new(Nobody));
    let mut bus = PciBus::new();
    bus.add_next(Machine::new().device, &router).unwrap();
    bus.assign().unwrap();
    let mut map = DeviceMap::default();
    Arc::new(bus).map(&mut map);
    let config = |register: u32| {
        map.port(0xcf8).unwrap().port_out(0xcf8, 4, CONFIG_ENABLE | 1 << 11 | register);
        map.port(CONFIG_DATA).unwrap().port_in(CONFIG_DATA, 4)
    };
    // PCI_VENDOR_OPENBSD, PCI_PRODUCT_OPENBSD_CONTROL; communications, miscellaneous, revision 0; the subsystem; INTA.
    assert_eq!([0x00, 0x08, 0x2c].map(config), [0x0777_0b5d, 0x0780_0000, 0xffff_0b5d]);
    assert_eq!(config(0x3c) >> 8 & 0xff, 1);
    let base = config(0x10);
    assert_eq!(base & 3, 1, "BAR 0 is in I/O space");
    let port = (base & !3) as u16;
    assert_eq!(map.port(port).unwrap().port_in(port, 4), ALL);
}

#[test]
fn driver_negotiates_and_finds_no_queue() {
    let machine = Machine::attached(u32::MAX);
    assert_eq!(u32::from_le_bytes(machine.read(legacy::DRIVER_FEATURES)), ALL);
    machine.write(legacy::QUEUE_SELECT, &[0, 0]);
    assert_eq!(machine.read(legacy::QUEUE_SIZE), [0, 0]);
    assert_eq!(machine.read(legacy::QUEUE_ADDRESS), [0; 4]);
}

#[test]
fn shutdown_is_asked_for_acknowledged_and_forced_when_it_takes_too_long() {
    let machine = Machine::attached(ALL);
    machine.device.request(Request::Shutdown).unwrap();
    assert_eq!(machine.read(legacy::ISR_STATUS), [ISR_CONFIG]);
    assert_eq!(machine.read(legacy::ISR_STATUS), [0]);
    assert_eq!(machine.command(), words::SHUTDOWN);
    machine.acknowledge(words::SHUTDOWN);
    assert_eq!(machine.device.conversation(), Conversation::Agreed { request: Request::Shutdown, deadline: SHUTDOWN_TIME });
    machine.time.advance(SHUTDOWN_TIME - 1);
    assert_eq!(machine.events.take(), [""; 0]);
    machine.time.advance(1);
    assert_eq!(machine.events.take(), ["power off"]);
}

#[test]
fn unanswered_reboot_is_forced_after_three_seconds() {
    let machine = Machine::attached(ALL);
    machine.device.request(Request::Reboot).unwrap();
    machine.time.advance(ANSWER_TIME);
    assert_eq!(machine.events.take(), ["reset"]);
}

#[test]
fn driver_that_acknowledges_byte_by_byte_is_understood() {
    let machine = Machine::attached(ALL);
    machine.device.request(Request::Reboot).unwrap();
    for (at, byte) in (0..).zip(words::REBOOT.to_le_bytes()) {
        machine.write(legacy::DEVICE_CONFIG + words::COMMAND + at, &[byte]);
    }
    assert!(matches!(machine.device.conversation(), Conversation::Agreed { request: Request::Reboot, .. }));
}

#[test]
fn guest_that_powers_down_by_itself_is_waited_for_and_then_ended() {
    let machine = Machine::attached(ALL);
    machine.acknowledge(words::SHUTDOWN);
    assert_eq!(machine.device.request(Request::Shutdown), Err(RequestError::GoingDown));
    machine.time.advance(ANSWER_TIME);
    assert_eq!(machine.events.take(), ["power off"]);
}

#[test]
fn clock_request_needs_a_driver_that_knows_it() {
    assert_eq!(Machine::new().device.request(Request::SyncRtc), Err(RequestError::NoDriver));
    assert_eq!(Machine::attached(words::F_ACK).device.request(Request::SyncRtc), Err(RequestError::Unsupported));
    let machine = Machine::attached(ALL);
    machine.device.request(Request::SyncRtc).unwrap();
    assert_eq!(machine.command(), words::SYNCRTC);
    machine.acknowledge(words::SYNCRTC);
    assert_eq!((machine.command(), machine.device.conversation()), (words::NONE, Conversation::Idle));
}

#[test]
fn both_halves_of_the_time_are_of_one_moment() {
    let machine = Machine::attached(ALL);
    for _ in 0..2 {
        let wall = machine.time.clock.wall();
        assert_eq!(machine.read_8(words::TIME_SEC), wall.as_secs());
        // A second and more passes between the readings.
        machine.time.advance(SECOND + 1_000_000);
        assert_eq!(machine.read_8(words::TIME_USEC), u64::from(wall.subsec_micros()));
    }
}

#[test]
fn time_far_in_the_future_has_an_upper_half() {
    let time = Time::new(Duration::from_secs(5 << 32 | 7));
    let machine = Machine { device: Vmmci::new(time.timers.clone(), Arc::new(Events::default())), events: Arc::default(), time };
    assert_eq!(machine.read_8(words::TIME_SEC), 5 << 32 | 7);
}

#[test]
fn time_read_byte_by_byte_is_of_one_moment() {
    let machine = Machine::attached(ALL);
    let mut bytes = [0; 16];
    for (at, byte) in (0..).zip(&mut bytes) {
        [*byte] = machine.read(legacy::DEVICE_CONFIG + words::TIME_SEC + at);
        machine.time.advance(SECOND / 3);
    }
    let (seconds, microseconds) = bytes.split_at(8);
    assert_eq!(seconds, WALL.as_secs().to_le_bytes());
    assert_eq!(microseconds, u64::from(WALL.subsec_micros()).to_le_bytes());
}

#[test]
fn driver_reset_forgets_the_driver_but_not_the_time_limit() {
    let machine = Machine::attached(ALL);
    machine.device.request(Request::Shutdown).unwrap();
    machine.write(legacy::DEVICE_STATUS, &[0]);
    assert_eq!(machine.read(legacy::ISR_STATUS), [0]);
    assert_eq!(machine.device.request(Request::Shutdown), Err(RequestError::NoDriver));
    machine.time.advance(ANSWER_TIME);
    assert_eq!(machine.events.take(), ["power off"]);
}

#[test]
fn state_survives_a_restore() {
    let machine = Machine::attached(ALL);
    machine.device.request(Request::Reboot).unwrap();
    let other = Machine::new();
    other.device.restore(&machine.device.state()).unwrap();
    assert_eq!(other.device.state(), machine.device.state());
    assert_eq!((other.command(), other.read(legacy::ISR_STATUS)), (words::REBOOT, [ISR_CONFIG]));
    other.time.advance(ANSWER_TIME);
    assert_eq!(other.events.take(), ["reset"]);
}

proptest! {
    #[test]
    fn no_guest_input_panics(steps in prop::collection::vec((any::<bool>(), 0u64..80, 0usize..9, any::<u32>()), 0..100)) {
        let machine = Machine::attached(ALL);
        machine.device.request(Request::Shutdown).unwrap();
        for (write, offset, len, value) in steps {
            let mut data = [value as u8; 8];
            if write {
                machine.device.bar_write(0, offset, &data[..len.min(8)]);
            } else {
                machine.device.bar_read(0, offset, &mut data[..len.min(8)]);
            }
        }
    }
}
