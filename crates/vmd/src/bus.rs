//! The doors of a machine's processors: ports, MMIO, MSRs and hypercalls, led to devices and dialects.
//!
//! Dialects are asked first, in order, then the devices. What nobody owns reads as all ones and swallows writes, as on a PC's
//! bus; MSRs and hypercalls nobody owns are declined, which the backend turns into #GP and #UD. Unowned accesses are counted,
//! never logged: a guest can make millions.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use devices::DeviceMap;
use devices::interrupts::InterruptRouter;
use dialects::Dialect;
use vmm::{Bus, Hypercall, MsrFault, PortCall, VcpuId};

/// The bus of one machine.
pub struct MachineBus {
    devices: DeviceMap,
    dialects: Vec<Arc<dyn Dialect>>,
    interrupts: Arc<InterruptRouter>,
    ended: Arc<AtomicBool>,
    unowned: Unowned,
}

/// Accesses that nobody answered.
#[derive(Debug, Default)]
pub struct Unowned {
    /// Ports.
    pub port: AtomicU64,
    /// Addresses.
    pub mmio: AtomicU64,
    /// MSR indices.
    pub msr: AtomicU64,
    /// Hypercalls.
    pub hypercall: AtomicU64,
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

impl MachineBus {
    /// A bus over these devices and dialects. A device sets `ended` when the guest has ended the machine: the processor that did
    /// so then leaves the guest before its next instruction, so that equal runs execute equally many.
    pub fn new(
        devices: DeviceMap,
        dialects: Vec<Arc<dyn Dialect>>,
        interrupts: Arc<InterruptRouter>,
        ended: Arc<AtomicBool>,
    ) -> MachineBus {
        MachineBus { devices, dialects, interrupts, ended, unowned: Unowned::default() }
    }

    /// Whether the guest has ended the machine.
    pub fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Relaxed)
    }

    /// Accesses that nobody answered.
    pub fn unowned(&self) -> &Unowned {
        &self.unowned
    }
}

impl Bus for MachineBus {
    fn port_in(&self, vcpu: VcpuId, port: u16, size: u8) -> Option<u32> {
        if let Some(value) = self.dialects.iter().find_map(|dialect| dialect.port_in(vcpu, port, size)) {
            return Some(value);
        }
        match self.devices.port(port) {
            Some(device) => Some(device.port_in(port, size)),
            None => {
                count(&self.unowned.port);
                Some(u32::MAX)
            }
        }
    }

    fn port_out(&self, vcpu: VcpuId, port: u16, size: u8, value: u32) -> bool {
        if !self.dialects.iter().any(|dialect| dialect.port_out(vcpu, port, size, value)) {
            match self.devices.port(port) {
                Some(device) => device.port_out(port, size, value),
                None => count(&self.unowned.port),
            }
        }
        !self.has_ended()
    }

    fn takes_registers(&self, port: u16) -> bool {
        self.dialects.iter().any(|dialect| dialect.takes_registers(port))
    }

    fn port_call(&self, vcpu: VcpuId, call: &mut PortCall) {
        if let Some(dialect) = self.dialects.iter().find(|dialect| dialect.takes_registers(call.port)) {
            dialect.port_call(vcpu, call);
        }
    }

    fn mmio_read(&self, _vcpu: VcpuId, gpa: u64, data: &mut [u8]) -> bool {
        match self.devices.mmio(gpa) {
            Some((device, offset)) => device.mmio_read(offset, data),
            None => {
                count(&self.unowned.mmio);
                data.fill(0xff);
            }
        }
        true
    }

    fn mmio_write(&self, _vcpu: VcpuId, gpa: u64, data: &[u8]) -> bool {
        match self.devices.mmio(gpa) {
            Some((device, offset)) => device.mmio_write(offset, data),
            None => count(&self.unowned.mmio),
        }
        true
    }

    fn read_msr(&self, vcpu: VcpuId, index: u32) -> Option<Result<u64, MsrFault>> {
        let answer = self.dialects.iter().find_map(|dialect| dialect.read_msr(vcpu, index));
        if answer.is_none() {
            count(&self.unowned.msr);
        }
        answer
    }

    fn write_msr(&self, vcpu: VcpuId, index: u32, value: u64) -> Option<Result<(), MsrFault>> {
        let answer = self.dialects.iter().find_map(|dialect| dialect.write_msr(vcpu, index, value));
        if answer.is_none() {
            count(&self.unowned.msr);
        }
        answer
    }

    fn hypercall(&self, vcpu: VcpuId, call: &mut Hypercall) -> bool {
        let answered = self.dialects.iter().any(|dialect| dialect.hypercall(vcpu, call));
        if !answered {
            count(&self.unowned.hypercall);
        }
        answered
    }

    fn end_of_interrupt(&self, vector: u8) {
        self.dialects.iter().for_each(|dialect| dialect.end_of_interrupt());
        self.interrupts.end_of_interrupt(vector);
    }

    fn acknowledge_extint(&self) -> u8 {
        self.interrupts.acknowledge_extint()
    }
}

#[cfg(test)]
mod tests {
    use devices::interrupts::InterruptSink;
    use devices::{MsiSink, PortDevice};

    use super::*;

    struct Nowhere;

    impl MsiSink for Nowhere {
        fn signal_msi(&self, _address: u64, _data: u32) {}
    }

    impl InterruptSink for Nowhere {
        fn set_extint(&self, _asserted: bool) {}
        fn set_ioapic_routes(&self, _routes: &[Option<vmm::backend::IoapicRoute>]) {}
    }

    struct Echo;

    impl PortDevice for Echo {
        fn port_in(&self, port: u16, _size: u8) -> u32 {
            port.into()
        }
        fn port_out(&self, _port: u16, _size: u8, _value: u32) {}
    }

    #[test]
    fn unowned_accesses_read_ones_and_are_counted() {
        let mut devices = DeviceMap::default();
        devices.add_ports(0x60..=0x60, Arc::new(Echo));
        let bus = MachineBus::new(devices, Vec::new(), InterruptRouter::new(Arc::new(Nowhere)), Arc::default());
        assert_eq!(bus.port_in(0, 0x60, 1), Some(0x60));
        assert_eq!(bus.port_in(0, 0x61, 1), Some(u32::MAX));
        assert!(bus.port_out(0, 0x61, 1, 0));
        let mut data = [0; 4];
        assert!(bus.mmio_read(0, 0xfeb0_0000, &mut data));
        assert_eq!(data, [0xff; 4]);
        assert_eq!(bus.read_msr(0, 0x4b56_4d00), None);
        assert!(!bus.hypercall(0, &mut Hypercall::default()));
        assert_eq!(bus.unowned().port.load(Ordering::Relaxed), 2);
        assert_eq!(bus.unowned().mmio.load(Ordering::Relaxed), 1);
    }
}
