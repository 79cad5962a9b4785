//! The negotiation of `pvbus::xen::negotiation` is that of the monitor's backends: whatever a frontend says, both do the same.

use std::sync::{Arc, Mutex};

use dialects::xen::xenbus::{self, ConnectError, Driver, Frontend, Keys};
use pvbus::xen::negotiation::{Backend, BackendStep};

/// A store that has the frontend's state, and takes down the backend's.
#[derive(Default)]
struct States {
    frontend: Mutex<u32>,
    backend: Mutex<u32>,
}

impl Keys for States {
    fn read(&self, path: &str) -> Option<String> {
        // Nobody takes the device away, which backends see in their key `online`.
        path.ends_with("/state").then(|| self.frontend.lock().unwrap().to_string())
    }
    fn write(&self, keys: &[(String, String)]) {
        let (_, state) = keys.last().unwrap();
        *self.backend.lock().unwrap() = state.parse().unwrap();
    }
}

/// A device that takes down what it is to do.
#[derive(Default)]
struct Steps(Mutex<Vec<&'static str>>);

impl Driver for Steps {
    fn offers(&self) -> Vec<(&'static str, String)> {
        self.0.lock().unwrap().push("offer");
        Vec::new()
    }
    fn connect(&mut self, _: &Frontend<'_>) -> Result<Vec<(&'static str, String)>, ConnectError> {
        self.0.lock().unwrap().push("connect");
        Ok(Vec::new())
    }
    fn disconnect(&mut self) {
        self.0.lock().unwrap().push("disconnect");
    }
}

const fn steps(step: BackendStep) -> &'static [&'static str] {
    match step {
        BackendStep::Stay => &[],
        BackendStep::Offer => &["offer"],
        BackendStep::Restart => &["disconnect", "offer"],
        BackendStep::Connect => &["connect"],
        BackendStep::Close => &["disconnect"],
    }
}

#[test]
fn backends_of_the_monitor_take_the_same_steps() {
    const STATES: u32 = 10;
    for sequence in 0..STATES.pow(4) {
        let store = Arc::new(States::default());
        let mut theirs = xenbus::Backend::new(Steps::default(), store.clone(), String::new(), String::new());
        let mut ours = Backend::Initialising;
        for at in 0..4 {
            let state = sequence / STATES.pow(at) % STATES;
            *store.frontend.lock().unwrap() = state;
            theirs.frontend_changed();
            let step = ours.on(state);
            let done = std::mem::take(&mut *theirs.driver().0.lock().unwrap());
            assert_eq!(done, steps(step), "{sequence:04}");
            if step != BackendStep::Stay {
                assert_eq!(*store.backend.lock().unwrap(), ours.number(), "{sequence:04}");
            }
        }
    }
}
