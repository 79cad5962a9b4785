//! Device status (virtio 1.2 sections 2.1 and 3.1): the steps of initialisation as a state machine.
//!
//! What a driver may write depends on the step: features before FEATURES_OK, queue registers between FEATURES_OK and DRIVER_OK,
//! and nothing of either once the device runs. Monitors that let queue registers change later have been broken into that way
//! (CVE-2026-5747), so the transport asks [`DeviceStatus`] before each write.

use abi::virtio::status;
use serde::{Deserialize, Serialize};

/// How far initialisation has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Phase {
    /// After power on or reset.
    Reset,
    /// The guest has seen the device.
    Acknowledged,
    /// The guest has a driver.
    Driver,
    /// Features are settled; queues are being set up.
    FeaturesOk,
    /// The device runs.
    DriverOk,
}

/// What a write of the status register asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Nothing beyond the new status.
    None,
    /// Put everything back to the beginning.
    Reset,
    /// Start the device.
    Activate,
}

/// The status register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStatus {
    phase: Phase,
    failed: bool,
}

impl Default for DeviceStatus {
    fn default() -> Self {
        DeviceStatus { phase: Phase::Reset, failed: false }
    }
}

/// The bits in the order in which they have to be set, each with the phase it leads to.
const STEPS: [(u8, Phase); 4] = [
    (status::ACKNOWLEDGE, Phase::Acknowledged),
    (status::DRIVER, Phase::Driver),
    (status::FEATURES_OK, Phase::FeaturesOk),
    (status::DRIVER_OK, Phase::DriverOk),
];

impl DeviceStatus {
    /// The driver wrote `value`. `features_fit` says whether the features it accepted can be had; if not, FEATURES_OK stays
    /// clear, which is how the driver learns of it (3.1.1 step 6). Bits cannot be cleared one by one, and none can be skipped;
    /// what is out of order is ignored.
    pub fn write(&mut self, value: u8, features_fit: bool) -> Action {
        if value == 0 {
            *self = DeviceStatus::default();
            return Action::Reset;
        }
        if value & self.bits() != self.bits() {
            return Action::None;
        }
        let before = self.phase;
        for (bit, phase) in STEPS {
            if phase <= self.phase {
                continue;
            }
            if value & bit == 0 || (phase == Phase::FeaturesOk && !features_fit) {
                break;
            }
            self.phase = phase;
        }
        self.failed |= value & status::FAILED != 0;
        if before < Phase::DriverOk && self.phase == Phase::DriverOk && !self.failed { Action::Activate } else { Action::None }
    }

    /// The register's value, without DEVICE_NEEDS_RESET, which is the device's own.
    pub fn bits(&self) -> u8 {
        let steps = STEPS.iter().filter(|(_, phase)| *phase <= self.phase).fold(0, |bits, (bit, _)| bits | bit);
        if self.failed { steps | status::FAILED } else { steps }
    }

    /// Whether the device runs.
    pub fn is_running(&self) -> bool {
        self.phase == Phase::DriverOk
    }

    /// Whether the driver may choose features now.
    pub fn takes_features(&self) -> bool {
        self.phase < Phase::FeaturesOk
    }

    /// Whether the driver may set up queues now.
    pub fn takes_queues(&self) -> bool {
        self.phase == Phase::FeaturesOk && !self.failed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_usual_order_activates_once() {
        let mut device = DeviceStatus::default();
        assert_eq!(device.write(1, true), Action::None);
        assert_eq!(device.write(3, true), Action::None);
        assert!(device.takes_features());
        assert_eq!(device.write(0xb, true), Action::None);
        assert!(device.takes_queues() && !device.takes_features());
        assert_eq!(device.write(0xf, true), Action::Activate);
        assert_eq!(device.write(0xf, true), Action::None);
        assert!(device.is_running() && !device.takes_queues());
        assert_eq!(device.write(0, true), Action::Reset);
        assert_eq!(device.bits(), 0);
    }

    #[test]
    fn features_that_do_not_fit_leave_features_ok_clear() {
        let mut device = DeviceStatus::default();
        device.write(3, false);
        device.write(0xb, false);
        assert_eq!(device.bits(), 3);
        assert_eq!(device.write(0xf, false), Action::None);
        assert_eq!(device.bits(), 3);
    }

    #[test]
    fn driver_ok_cannot_skip_features_ok() {
        let mut device = DeviceStatus::default();
        assert_eq!(device.write(7, true), Action::None);
        assert_eq!(device.bits(), 3);
    }

    #[test]
    fn a_failed_driver_gets_no_device() {
        let mut device = DeviceStatus::default();
        device.write(0xb, true);
        device.write(0x8b, true);
        assert!(!device.takes_queues());
        assert_eq!(device.write(0x8f, true), Action::None);
        assert_eq!(device.write(0, true), Action::Reset);
    }

    proptest! {
        #[test]
        fn no_order_of_writes_activates_twice_without_reset(writes in proptest::collection::vec((any::<u8>(), any::<bool>()), 0..40)) {
            let mut device = DeviceStatus::default();
            let mut active = false;
            for (value, fit) in writes {
                let before = device;
                match device.write(value, fit) {
                    Action::Activate => { prop_assert!(!active); active = true; }
                    Action::Reset => active = false,
                    Action::None => prop_assert_eq!(device.bits() & before.bits(), before.bits()),
                }
                prop_assert!(!(active && device.takes_queues()));
                prop_assert!(!(device.takes_queues() && device.takes_features()));
            }
        }
    }
}
