//! The ports of QEMU's `pc-testdev`, which hypervisor test suites written for QEMU (kvm-unit-tests) use.
//!
//! QEMU `hw/misc/pc-testdev.c`: a register at port 0xe0 (and 0xe8) of any width, port 0xe4 that makes the host unmap a page for a
//! moment (which a guest must not notice; here nothing happens, and it does not), 24 ports from 0x2000 that set interrupt lines,
//! and 64 KiB of memory behind MMIO accesses at 0xff000000.

use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::interrupts::InterruptRouter;
use crate::ports::{read_bytes, write_bytes};
use crate::snapshot::{RestoreError, Saved, Snapshot};
use crate::{DeviceMap, InterruptLine, MmioDevice, PortDevice};

/// Name and version in a [`Saved`] state.
const STATE: (&str, u32) = ("testdev", 1);
const REGISTER: RangeInclusive<u16> = 0xe0..=0xe3;
const FLUSH: RangeInclusive<u16> = 0xe4..=0xe7;
const REGISTER_BYTES: RangeInclusive<u16> = 0xe8..=0xeb;
const LINES: RangeInclusive<u16> = 0x2000..=0x2017;
const MEMORY: RangeInclusive<u64> = 0xff00_0000..=0xff00_ffff;
const MEMORY_SIZE: usize = 0x10000;
/// Lines below this one are ISA interrupts, which the 8259 pair sees too.
const ISA_LINES: u8 = 16;

#[derive(Clone, Serialize, Deserialize)]
struct Registers {
    register: [u8; 4],
    lines: Vec<bool>,
    memory: Vec<u8>,
}

/// The device.
pub struct TestDevice {
    lines: Vec<Arc<dyn InterruptLine>>,
    registers: Mutex<Registers>,
}

impl TestDevice {
    /// A device that drives the interrupt lines of `router`.
    pub fn new(router: &Arc<InterruptRouter>) -> Arc<TestDevice> {
        let count = LINES.len() as u8;
        let line = |n| if n < ISA_LINES { router.isa_line(n) } else { router.gsi_line(n) };
        Arc::new(TestDevice { lines: (0..count).map(line).collect(), registers: Mutex::new(Registers::new()) })
    }

    /// Puts ports and memory into `map`, after the PCI bus, among whose ports some of them are.
    pub fn map(self: &Arc<Self>, map: &mut DeviceMap) {
        map.add_ports(*REGISTER.start()..=*REGISTER_BYTES.end(), self.clone());
        map.add_ports(LINES, self.clone());
        map.add_mmio(MEMORY, self.clone());
    }

    /// Power-on state.
    pub fn reset(&self) {
        let mut registers = self.lock();
        *registers = Registers::new();
        self.drive(&registers);
    }

    fn drive(&self, registers: &Registers) {
        for (line, level) in self.lines.iter().zip(&registers.lines) {
            line.set(*level);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Registers {
    fn new() -> Registers {
        Registers { register: [0; 4], lines: vec![false; LINES.len()], memory: vec![0; MEMORY_SIZE] }
    }
}

impl PortDevice for TestDevice {
    fn port_in(&self, port: u16, size: u8) -> u32 {
        let registers = self.lock();
        read_bytes(port, size, |port| {
            if REGISTER.contains(&port) || REGISTER_BYTES.contains(&port) {
                registers.register[usize::from(port & 3)]
            } else if FLUSH.contains(&port) || LINES.contains(&port) {
                0
            } else {
                0xff
            }
        })
    }

    fn port_out(&self, port: u16, size: u8, value: u32) {
        let mut registers = self.lock();
        write_bytes(port, size, value, |port, byte| {
            if REGISTER.contains(&port) || REGISTER_BYTES.contains(&port) {
                registers.register[usize::from(port & 3)] = byte;
            }
        });
        // Lines have ports of a byte; wider accesses are none of theirs.
        if LINES.contains(&port) && size == 1 {
            let line = usize::from(port - LINES.start());
            registers.lines[line] = value & 0xff != 0;
            self.lines[line].set(value & 0xff != 0);
        }
    }
}

impl MmioDevice for TestDevice {
    fn mmio_read(&self, offset: u64, data: &mut [u8]) {
        let registers = self.lock();
        for (byte, at) in data.iter_mut().zip(offset as usize..) {
            *byte = registers.memory.get(at).copied().unwrap_or(0xff);
        }
    }

    fn mmio_write(&self, offset: u64, data: &[u8]) {
        let mut registers = self.lock();
        for (byte, at) in data.iter().zip(offset as usize..MEMORY_SIZE) {
            registers.memory[at] = *byte;
        }
    }
}

impl Snapshot for TestDevice {
    fn state(&self) -> Saved {
        Saved::new(STATE.0, STATE.1, &*self.lock())
    }

    fn restore(&self, state: &Saved) -> Result<(), RestoreError> {
        let new: Registers = state.open(STATE.0, STATE.1)?;
        if new.lines.len() != LINES.len() || new.memory.len() != MEMORY_SIZE {
            return Err(RestoreError::Impossible { device: STATE.0, what: "memory or lines of another size" });
        }
        let mut registers = self.lock();
        *registers = new;
        self.drive(&registers);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vmm::backend::IoapicRoute;

    use super::*;
    use crate::MsiSink;
    use crate::interrupts::InterruptSink;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<u32>>);

    impl MsiSink for Recorder {
        fn signal_msi(&self, _: u64, data: u32) {
            self.0.lock().unwrap().push(data);
        }
    }

    impl InterruptSink for Recorder {
        fn set_extint(&self, _: bool) {}
        fn set_ioapic_routes(&self, _: &[Option<IoapicRoute>]) {}
    }

    fn device() -> (Arc<TestDevice>, Arc<InterruptRouter>, Arc<Recorder>) {
        let recorder = Arc::new(Recorder::default());
        let router = InterruptRouter::new(recorder.clone());
        (TestDevice::new(&router), router, recorder)
    }

    #[test]
    fn register_is_reached_in_any_width() {
        let (device, _, _) = device();
        device.port_out(0xe0, 4, 0x1234_5678);
        assert_eq!(device.port_in(0xe0, 1), 0x78);
        assert_eq!(device.port_in(0xe2, 2), 0x1234);
        assert_eq!(device.port_in(0xe8, 4), 0x1234_5678);
        device.port_out(0xe9, 1, 0xff);
        assert_eq!(device.port_in(0xe0, 4), 0x1234_ff78);
    }

    #[test]
    fn lines_reach_the_io_apic() {
        let (device, router, recorder) = device();
        router.mmio_write(0, &(0x10u32 + 2 * 14).to_le_bytes());
        router.mmio_write(0x10, &0x55u32.to_le_bytes());
        device.port_out(0x200e, 1, 1);
        device.port_out(0x200e, 1, 0);
        device.port_out(0x200e, 1, 1);
        assert_eq!(*recorder.0.lock().unwrap(), [0x55, 0x55]);
    }

    #[test]
    fn memory_keeps_what_is_written_up_to_its_end() {
        let (device, _, _) = device();
        device.mmio_write(0xfffc, &[1, 2, 3, 4, 5, 6, 7, 8]);
        let mut data = [0; 8];
        device.mmio_read(0xfffc, &mut data);
        assert_eq!(data, [1, 2, 3, 4, 0xff, 0xff, 0xff, 0xff]);
        let (other, _, _) = self::device();
        other.restore(&device.state()).unwrap();
        other.mmio_read(0xfffc, &mut data);
        assert_eq!(data[..4], [1, 2, 3, 4]);
    }

    proptest! {
        #[test]
        fn no_guest_input_panics(steps in prop::collection::vec((any::<bool>(), any::<u16>(), any::<u32>(), 0usize..3, any::<bool>()), 0..100)) {
            let (device, _, _) = device();
            for (line, at, value, size, write) in steps {
                let port = if line { LINES.start() + at % 24 } else { 0xe0 + at % 12 };
                let size = [1, 2, 4][size];
                if write {
                    device.port_out(port, size, value);
                    device.mmio_write(u64::from(at), &value.to_le_bytes());
                } else {
                    device.port_in(port, size);
                }
            }
        }
    }
}
