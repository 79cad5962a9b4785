//! The outside's hold on a machine: made before it, and good over its reboots.
//!
//! The terminal types into it, signals and the control socket end it, and everybody may ask how it is. The machine attaches each time that
//! power comes on and detaches when it goes.

use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::board::Board;
use crate::config::{DiskSpec, NicSpec};
use crate::hotplug::PlugError;
use crate::inventory::{DeviceStatus, Inventory};
use crate::machine::{Event, EventSender, Outcome};
use crate::paravirtual::Paravirtual;
use crate::power::{self, PowerError, Via, Wish};
use crate::status::{About, Status};
use crate::store::MachineStore;

/// The hold.
pub struct Control {
    store: Arc<MachineStore>,
    inventory: Arc<Inventory>,
    started: Instant,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    stopped: bool,
    /// Times that power came on.
    boots: u64,
    about: Option<About>,
    machine: Option<Running>,
}

/// What can be reached of a machine with power on.
#[derive(Clone)]
pub struct Running {
    /// Ends it.
    pub events: EventSender,
    /// Its devices.
    pub board: Arc<Board>,
    /// Its dialects.
    pub paravirtual: Arc<Paravirtual>,
}

impl Control {
    /// For a machine whose information store is `store`.
    pub fn new(store: Arc<MachineStore>) -> Control {
        Control { store, inventory: Arc::default(), started: Instant::now(), state: Mutex::default() }
    }

    /// The machine's information store.
    pub fn store(&self) -> &Arc<MachineStore> {
        &self.store
    }

    /// The machine's disks and network cards.
    pub fn inventory(&self) -> &Arc<Inventory> {
        &self.inventory
    }

    /// Plugs in a disk.
    ///
    /// # Errors
    /// [`PlugError`]; here and below.
    pub fn add_disk(&self, spec: &DiskSpec) -> Result<DeviceStatus, PlugError> {
        self.inventory.add_disk(&self.running()?, spec)
    }

    /// Plugs in a network card.
    ///
    /// # Errors
    /// As above.
    pub fn add_nic(&self, spec: &NicSpec) -> Result<DeviceStatus, PlugError> {
        self.inventory.add_nic(&self.running()?, spec)
    }

    /// Asks the guest to let go of a device, or takes it.
    ///
    /// # Errors
    /// As above.
    pub fn remove_device(&self, name: &str, force: bool) -> Result<(), PlugError> {
        self.inventory.remove(&self.running()?, name, force)
    }

    /// Ends the machine as if its plug was pulled.
    pub fn stop(&self) {
        let mut state = self.lock();
        state.stopped = true;
        if let Some(machine) = &state.machine {
            end(&machine.events, Outcome::Stopped);
        }
    }

    /// Presses the reset button.
    ///
    /// # Errors
    /// [`PowerError::NotRunning`].
    pub fn reset(&self) -> Result<(), PowerError> {
        end(&self.running()?.events, Outcome::Reset);
        Ok(())
    }

    /// Asks the guest to shut down or to reboot; by which way it was asked.
    ///
    /// # Errors
    /// [`PowerError`] when there is nobody to ask by this way.
    pub fn ask(&self, wish: Wish, via: Via) -> Result<Via, PowerError> {
        power::ask(&self.running()?, wish, via)
    }

    /// Bytes typed at the terminal. Waits while the guest does not read them.
    pub fn terminal_input(&self, mut bytes: &[u8]) {
        const RETRY: Duration = Duration::from_millis(5);
        while !bytes.is_empty() {
            let board = {
                let state = self.lock();
                if state.stopped {
                    return;
                }
                state.machine.as_ref().map(|machine| Arc::clone(&machine.board))
            };
            let taken = board.map_or(0, |board| board.terminal_input(bytes));
            bytes = &bytes[taken..];
            if !bytes.is_empty() {
                std::thread::sleep(RETRY);
            }
        }
    }

    /// How the machine is; `None` until it is known what it will be.
    pub fn status(&self) -> Option<Status> {
        let (about, machine, boots) = {
            let state = self.lock();
            (state.about.clone()?, state.machine.clone(), state.boots)
        };
        Some(Status::new(about, self.started.elapsed(), boots, machine.as_ref(), self.store.as_ref()))
    }

    /// Says what the machine will be.
    pub(crate) fn introduce(&self, about: About) {
        self.lock().about = Some(about);
    }

    /// Power came on.
    pub(crate) fn attach(&self, machine: Running) {
        let mut state = self.lock();
        if state.stopped {
            end(&machine.events, Outcome::Stopped);
        }
        state.boots += 1;
        state.machine = Some(machine);
    }

    /// Power went.
    pub(crate) fn detach(&self) {
        self.lock().machine = None;
        self.inventory.power_off();
    }

    fn running(&self) -> Result<Running, PowerError> {
        self.lock().machine.clone().ok_or(PowerError::NotRunning)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A machine that has ended already no longer listens.
fn end(events: &Sender<Event>, outcome: Outcome) {
    let _ = events.send(Event::End(outcome));
}
