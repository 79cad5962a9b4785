//! QEMU's `isa-debug-exit`: a write ends the run with a value of the guest's choice.
//!
//! QEMU `docs/` and `hw/misc/debugexit.c`: port 0xf4 (as every test suite configures it), and the monitor's exit status is
//! `(value << 1) | 1`, so that it is never 0.

use std::sync::Arc;

use crate::{DeviceMap, MachineEvents, PortDevice};

/// The port, four bytes wide.
pub const PORT: u16 = 0xf4;

/// The device. It has no state.
pub struct DebugExit(Arc<dyn MachineEvents>);

impl DebugExit {
    /// Tells `events` of writes.
    pub fn new(events: Arc<dyn MachineEvents>) -> Arc<DebugExit> {
        Arc::new(DebugExit(events))
    }

    /// Puts the port into `map`.
    pub fn map(self: &Arc<Self>, map: &mut DeviceMap) {
        map.add_ports(PORT..=PORT + 3, self.clone());
    }
}

impl PortDevice for DebugExit {
    fn port_in(&self, _port: u16, _size: u8) -> u32 {
        0
    }

    fn port_out(&self, _port: u16, _size: u8, value: u32) {
        self.0.debug_exit(value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Events;

    #[test]
    fn write_ends_the_run_with_its_value() {
        let events = Arc::new(Events::default());
        let mut map = DeviceMap::default();
        DebugExit::new(events.clone()).map(&mut map);
        map.port(0xf4).unwrap().port_out(0xf4, 4, 0x10);
        assert_eq!(events.take(), ["debug exit 16"]);
    }
}
