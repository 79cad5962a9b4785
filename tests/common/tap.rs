//! A network between the host and a guest of a test.

// Each test program uses a part of this.
#![allow(dead_code)]

use std::process::Command;

/// A network between this machine and the guest's, which takes root to make.
pub struct Tap(pub String);

impl Tap {
    /// Makes it, if it can be made here.
    pub fn new(name: &str, address: &str) -> Option<Tap> {
        let ip = |arguments: &[&str]| Command::new("ip").args(arguments).status().is_ok_and(|status| status.success());
        let tap = ip(&["tuntap", "add", "dev", name, "mode", "tap"]).then(|| Tap(name.to_owned()))?;
        (ip(&["address", "add", address, "dev", name]) && ip(&["link", "set", name, "up"])).then_some(tap)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "delete", &self.0]).status();
    }
}
