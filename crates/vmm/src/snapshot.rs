//! State of a device or a dialect as plain data.
//!
//! Each says its state as a [`Saved`] value and can be put back to it. The value carries the device's name and
//! the version of its shape, so that a snapshot of another device or of a later version is refused and not misread.
//! Deadlines in it are nanoseconds of the machine's clock; who restores a machine restores the clock first.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// State of one device or dialect.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Saved {
    /// Kind of device.
    pub device: String,
    /// Version of the shape of `value`.
    pub version: u32,
    /// The state itself.
    pub value: serde_json::Value,
}

/// Why a state was refused.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The state is another device's.
    #[error("state is of device {found:?}, wanted {wanted:?}")]
    Device {
        /// The device that was asked.
        wanted: &'static str,
        /// What the state says.
        found: String,
    },
    /// The state has a shape this program does not know.
    #[error("{device} state has version {found}, this program knows {wanted}")]
    Version {
        /// The device.
        device: &'static str,
        /// What this program writes.
        wanted: u32,
        /// What the state says.
        found: u32,
    },
    /// The value does not have the promised shape.
    #[error("{device} state: {source}")]
    Shape {
        /// The device.
        device: &'static str,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// The value has the right shape, but no device can be in this state.
    #[error("{device} state: {what}")]
    Impossible {
        /// The device.
        device: &'static str,
        /// What is wrong with it.
        what: &'static str,
    },
}

impl Saved {
    /// Wraps `state` of `device`.
    pub fn new<S: Serialize>(device: &'static str, version: u32, state: &S) -> Saved {
        let value = serde_json::to_value(state).expect("device states have string keys only, which always serialise");
        Saved { device: device.into(), version, value }
    }

    /// Gives the state back if it is `device`'s in `version`.
    ///
    /// # Errors
    /// [`RestoreError`] when it is not.
    pub fn open<S: DeserializeOwned>(&self, device: &'static str, version: u32) -> Result<S, RestoreError> {
        if self.device != device {
            return Err(RestoreError::Device { wanted: device, found: self.device.clone() });
        }
        if self.version != version {
            return Err(RestoreError::Version { device, wanted: version, found: self.version });
        }
        S::deserialize(&self.value).map_err(|source| RestoreError::Shape { device, source })
    }
}

/// A device that can say its state.
pub trait Snapshot: Send + Sync {
    /// The state now.
    fn state(&self) -> Saved;
    /// Puts the device into `state`.
    ///
    /// # Errors
    /// [`RestoreError`] when the state is not this device's; the device is unchanged then.
    fn restore(&self, state: &Saved) -> Result<(), RestoreError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn state_of_another_device_or_version_is_refused() {
        let saved = Saved::new("pit", 2, &[1u8, 2, 3]);
        assert_eq!(saved.open::<[u8; 3]>("pit", 2).unwrap(), [1, 2, 3]);
        assert!(matches!(saved.open::<[u8; 3]>("rtc", 2), Err(RestoreError::Device { .. })));
        assert!(matches!(saved.open::<[u8; 3]>("pit", 1), Err(RestoreError::Version { found: 2, .. })));
        assert!(matches!(saved.open::<[u8; 4]>("pit", 2), Err(RestoreError::Shape { .. })));
    }
}
