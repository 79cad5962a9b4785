//! vmmci against a scripted function on a scripted PCI bus.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use abi::openbsd::vmmci as words;
use abi::pci;
use abi::virtio::pci::legacy;

use super::*;
use crate::detect::Kind;
use crate::driver::{Driver, Event, News};
use crate::hal::{HalError, PciAddress, SECOND, Width};
use crate::testing::{FakeHal, Host};

const PORT: u16 = 0x1000;
const LINE: u8 = 11;

/// A bus with one function, and its registers.
struct Function {
    address: (u8, u8),
    bar: u32,
    selected: u32,
    command: u32,
    time: (u64, u64),
    features: u32,
    isr: u32,
    written: Vec<(u16, u32)>,
}

impl Default for Function {
    fn default() -> Function {
        let features = words::F_TIMESYNC | words::F_ACK | words::F_SYNCRTC | 1 << 7;
        Function {
            address: (5, 0),
            bar: u32::from(PORT) | pci::BAR_IO,
            selected: 0,
            command: 0,
            time: (1_800_000_000, 250_000),
            features,
            isr: 0,
            written: Vec::new(),
        }
    }
}

impl Function {
    fn ask(&mut self, command: u32) {
        self.command = command;
        self.isr = 2;
    }

    /// What was written to a register.
    fn writes(&self, offset: u64) -> Vec<u32> {
        self.written.iter().filter(|(port, _)| *port == PORT + offset as u16).map(|(_, value)| *value).collect()
    }

    fn config(&self) -> u32 {
        let (device, function) = ((self.selected >> 11 & 0x1f) as u8, (self.selected >> 8 & 7) as u8);
        let offset = (self.selected & 0xfc) as u8;
        let multi = u32::from(pci::HEADER_MULTI_FUNCTION) << 16;
        match offset {
            _ if self.selected >> 16 & 0xff != 0 => u32::MAX,
            pci::VENDOR_ID if (device, function) == self.address => u32::from(words::PCI_PRODUCT) << 16 | u32::from(words::PCI_VENDOR),
            // The first function of the device, if ours is another one.
            pci::VENDOR_ID if (device, function) == (self.address.0, 0) => 0x1234_8086,
            pci::VENDOR_ID => u32::MAX,
            pci::CACHE_LINE_SIZE => multi,
            pci::BAR0 => self.bar,
            pci::INTERRUPT_LINE => 1 << 8 | u32::from(LINE),
            _ => 0,
        }
    }
}

impl Host for Function {
    fn port_in(&mut self, port: u16, width: Width) -> Result<u32, HalError> {
        if port == pci::CONFIG_DATA {
            return Ok(self.config());
        }
        let halves = |value: u64| BTreeMap::from([(0, value as u32), (4, (value >> 32) as u32)]);
        let offset = u64::from(port - PORT);
        Ok(match offset {
            legacy::DEVICE_FEATURES => self.features,
            legacy::ISR_STATUS => {
                assert_eq!(width, Width::U8);
                core::mem::take(&mut self.isr)
            }
            20 => self.command,
            24 | 28 => halves(self.time.0)[&(offset - 24)],
            32 | 36 => halves(self.time.1)[&(offset - 32)],
            _ => 0,
        })
    }

    fn port_out(&mut self, port: u16, _: Width, value: u32) -> Result<(), HalError> {
        match port {
            pci::CONFIG_ADDRESS => self.selected = value,
            _ => self.written.push((port, value)),
        }
        Ok(())
    }
}

fn attach(hal: &FakeHal<Function>) -> Vmmci<'_> {
    Vmmci::attach(hal, find(hal).unwrap()).unwrap()
}

fn poll(vmmci: &mut Vmmci<'_>, now: u64) -> Vec<Event> {
    let mut events = Vec::new();
    vmmci.poll(now, &mut events);
    events.into_iter().filter(|event| !matches!(event, Event::Time(_))).collect()
}

#[test]
fn device_is_found_wherever_it_is_on_the_bus() {
    for address in [(0, 0), (5, 0), (31, 0), (7, 3)] {
        let hal = FakeHal::new(Function { address, ..Function::default() });
        assert_eq!(find(&hal), Some(PciAddress { bus: 0, device: address.0, function: address.1 }));
    }
    assert_eq!(find(&FakeHal::new(Function { address: (99, 0), ..Function::default() })), None);
}

#[test]
fn driver_takes_the_features_it_knows_and_says_that_it_is_ready() {
    let hal = FakeHal::new(Function::default());
    assert_eq!(attach(&hal).interrupt_line(), Some(LINE));
    assert_eq!(hal.host().writes(legacy::DRIVER_FEATURES), [7]);
    assert_eq!(hal.host().writes(legacy::DEVICE_STATUS), [0, 1, 3, 7]);
}

#[test]
fn function_without_ports_is_refused() {
    for bar in [0, 0xf000_0000, 1, 0x2_0001] {
        let hal = FakeHal::new(Function { bar, ..Function::default() });
        assert!(matches!(Vmmci::attach(&hal, find(&hal).unwrap()), Err(VmmciError::NoPorts)), "{bar:#x}");
    }
}

#[test]
fn commands_reach_the_kernel_and_are_acknowledged() {
    let commands = [
        (words::SHUTDOWN, Event::Shutdown(Kind::OpenBsd)),
        (words::REBOOT, Event::Reboot(Kind::OpenBsd)),
        (words::SYNCRTC, Event::SyncRtc(Kind::OpenBsd)),
    ];
    for (command, event) in commands {
        let hal = FakeHal::new(Function::default());
        let mut vmmci = attach(&hal);
        hal.host().ask(command);
        assert_eq!(poll(&mut vmmci, 0), [event]);
        assert_eq!(hal.host().writes(legacy::DEVICE_CONFIG), [command]);
        assert_eq!(poll(&mut vmmci, 1), [], "a command is carried out once");
    }
}

#[test]
fn commands_that_do_not_exist_are_ignored() {
    let hal = FakeHal::new(Function::default());
    let mut vmmci = attach(&hal);
    for command in [0, 4, u32::MAX] {
        hal.host().ask(command);
        assert_eq!(poll(&mut vmmci, 0), []);
    }
    assert!(hal.host().writes(legacy::DEVICE_CONFIG).is_empty());
}

#[test]
fn host_without_acknowledgements_gets_none() {
    let hal = FakeHal::new(Function { features: 0, ..Function::default() });
    let mut vmmci = attach(&hal);
    hal.host().ask(words::SHUTDOWN);
    assert_eq!(poll(&mut vmmci, 0), [Event::Shutdown(Kind::OpenBsd)]);
    assert!(hal.host().writes(legacy::DEVICE_CONFIG).is_empty());
}

#[test]
fn time_comes_every_fifteen_seconds_and_anew_when_the_host_wants() {
    let hal = FakeHal::new(Function::default());
    let mut vmmci = attach(&hal);
    let mut set = Vec::new();
    for second in 0..20 {
        if second == 18 {
            hal.host().ask(words::SYNCRTC);
        }
        let mut events = Vec::new();
        assert_eq!(vmmci.poll(second * SECOND, &mut events), Some((second + 1) * SECOND));
        for event in events {
            if let Event::Time(time) = event {
                assert_eq!((time.seconds, time.nanoseconds), (1_800_000_000, 250_000_000));
                set.push((second, time.set));
            }
        }
    }
    assert_eq!(set, [(0, true), (15, false), (18, true)]);
}

#[test]
fn impossible_times_are_not_believed() {
    for time in [(0, 5), (1_800_000_000, 1_000_000), (1_800_000_000, 1 << 40)] {
        let hal = FakeHal::new(Function { time, ..Function::default() });
        let mut events = Vec::new();
        attach(&hal).poll(0, &mut events);
        assert_eq!(events, [], "{time:?}");
    }
}

#[test]
fn power_off_is_told_to_the_host_and_reboot_is_not() {
    let hal = FakeHal::new(Function::default());
    let mut vmmci = attach(&hal);
    vmmci.hear(&News::GoingDown { reboot: true }, 0);
    assert!(hal.host().writes(legacy::DEVICE_CONFIG).is_empty());
    vmmci.hear(&News::GoingDown { reboot: false }, 0);
    assert_eq!(hal.host().writes(legacy::DEVICE_CONFIG), [words::SHUTDOWN]);
}

proptest::proptest! {
    #[test]
    fn no_answers_of_a_bus_panic(answers in proptest::collection::vec(proptest::num::u32::ANY, 1..200), bar in 4u32..0x1_0100) {
        struct Noise(Vec<u32>, usize);
        impl Host for Noise {
            fn port_in(&mut self, _: u16, _: Width) -> Result<u32, HalError> {
                self.1 += 1;
                Ok(self.0[self.1 % self.0.len()])
            }
        }
        let hal = FakeHal::new(Noise(answers.clone(), 0));
        let _ = find(&hal);
        // One that attaches wherever its ports are, up to the end of all ports.
        let mut answers = answers;
        answers.extend([0, bar & !3 | pci::BAR_IO, 0]);
        let hal = FakeHal::new(Noise(answers, 0));
        for start in 0..4 {
            hal.host().1 = start;
            if let Ok(mut vmmci) = Vmmci::attach(&hal, PciAddress { bus: 0, device: 0, function: 0 }) {
                for second in 0..40 {
                    vmmci.poll(second * SECOND, &mut Vec::new());
                }
                vmmci.hear(&News::GoingDown { reboot: false }, 0);
            }
        }
    }
}
