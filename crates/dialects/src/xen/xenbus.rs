//! How a backend and its frontend find together through XenStore (`io/xenbus.h`).
//!
//! [`Backend`] follows the frontend's state and keeps its own, as Linux' backends do (`drivers/block/xen-blkback/xenbus.c`):
//!
//! ```text
//!   frontend            backend
//!   1 Initialising      offers its features            --> 2 InitWait
//!   3 or 4              reads rings and ports, maps    --> 4 Connected      (5 Closing when they are not to be had)
//!   5 Closing           lets go of everything          --> 5 Closing
//!   6 Closed, or gone   lets go of everything          --> 6 Closed, and may begin again
//! ```
//!
//! What a kind of device does at each step is its [`Driver`].
//!
//! A toolstack takes a device away as libxl does (`tools/libs/light/libxl_device.c`, `libxl__initiate_device_generic_remove`): it writes 0 to `online` and
//! Closing to the backend's state. The frontend sees that and closes; a backend that has closed then is over, and its directories can go.

use std::sync::Arc;

use abi::xen::io::xenbus::{ONLINE, STATE, state};

use super::{GrantError, PortError};

/// XenStore, with the rights of the domain that backends are in.
pub trait Keys: Send + Sync {
    /// The value at `path`, if there is one that is text.
    fn read(&self, path: &str) -> Option<String>;

    /// Writes keys, all at once.
    fn write(&self, keys: &[(String, String)]);
}

/// Why a frontend cannot be connected with.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    /// A key is missing, or no number, or of no use.
    #[error("the frontend's {0} is missing or makes no sense")]
    Key(String),
    /// A page of a ring.
    #[error(transparent)]
    Grant(#[from] GrantError),
    /// An event channel.
    #[error(transparent)]
    Port(#[from] PortError),
}

/// What one kind of backend does. Keys are pairs of name and value in the backend's directory.
pub trait Driver: Send {
    /// What it can do, for a frontend to choose from.
    fn offers(&self) -> Vec<(&'static str, String)>;

    /// Takes what the frontend has chosen, begins to work, and tells what a connected frontend has to know.
    ///
    /// # Errors
    /// [`ConnectError`]; it holds on to nothing then.
    fn connect(&mut self, frontend: &Frontend<'_>) -> Result<Vec<(&'static str, String)>, ConnectError>;

    /// Stops working and lets go of all that is the frontend's.
    fn disconnect(&mut self);
}

/// The frontend's directory.
pub struct Frontend<'a> {
    keys: &'a dyn Keys,
    path: &'a str,
}

impl Frontend<'_> {
    /// The text at `name`.
    pub fn text(&self, name: &str) -> Option<String> {
        self.keys.read(&format!("{}/{name}", self.path))
    }

    /// The number at `name`, where there is one.
    ///
    /// # Errors
    /// [`ConnectError::Key`] when it is no number.
    pub fn optional(&self, name: &str) -> Result<Option<u32>, ConnectError> {
        self.text(name).map(|text| text.trim().parse().map_err(|_| ConnectError::Key(name.into()))).transpose()
    }

    /// The number at `name`.
    ///
    /// # Errors
    /// [`ConnectError::Key`] when there is none.
    pub fn number(&self, name: &str) -> Result<u32, ConnectError> {
        self.optional(name)?.ok_or_else(|| ConnectError::Key(name.into()))
    }
}

/// A backend in its negotiation.
pub struct Backend<D> {
    driver: D,
    keys: Arc<dyn Keys>,
    /// Its own directory and the frontend's.
    path: String,
    frontend: String,
    state: u32,
    is_over: bool,
}

impl<D: Driver> Backend<D> {
    /// A backend whose directories exist and say Initialising.
    pub fn new(driver: D, keys: Arc<dyn Keys>, path: String, frontend: String) -> Backend<D> {
        Backend { driver, keys, path, frontend, state: state::INITIALISING, is_over: false }
    }

    /// The driver.
    pub fn driver(&mut self) -> &mut D {
        &mut self.driver
    }

    /// Whether both ends have closed for good.
    pub fn is_over(&self) -> bool {
        self.is_over
    }

    /// The frontend's state, or `online`, may have changed.
    pub fn frontend_changed(&mut self) {
        let number = |path: &str, name: &str| self.keys.read(&format!("{path}/{name}")).and_then(|text| text.trim().parse::<u32>().ok());
        let theirs = number(&self.frontend, STATE).unwrap_or(state::UNKNOWN);
        let leaving = number(&self.path, ONLINE) == Some(0);
        match (theirs, self.state) {
            // Closed, or never begun.
            (state::CLOSED | state::UNKNOWN | state::INITIALISING, mine) if leaving => {
                self.driver.disconnect();
                if mine != state::CLOSED {
                    self.enter(state::CLOSED, Vec::new());
                }
                self.is_over = true;
            }
            // It will see that it is too late.
            (state::INITIALISED | state::CONNECTED, state::INIT_WAIT) if leaving => {}
            (state::INITIALISING, state::INITIALISING | state::CLOSED) => {
                let offers = self.driver.offers();
                self.enter(state::INIT_WAIT, offers);
            }
            (state::INITIALISED | state::CONNECTED, state::INIT_WAIT) => {
                match self.driver.connect(&Frontend { keys: self.keys.as_ref(), path: &self.frontend }) {
                    Ok(keys) => self.enter(state::CONNECTED, keys),
                    Err(error) => self.fail(&error.to_string()),
                }
            }
            (state::CLOSING, state::INIT_WAIT | state::CONNECTED) => {
                self.driver.disconnect();
                self.enter(state::CLOSING, Vec::new());
            }
            (state::CLOSED | state::UNKNOWN, state::INIT_WAIT | state::CONNECTED | state::CLOSING) => {
                self.driver.disconnect();
                self.enter(state::CLOSED, Vec::new());
            }
            // A frontend that begins anew without having closed.
            (state::INITIALISING, state::CONNECTED | state::CLOSING) => {
                self.driver.disconnect();
                let offers = self.driver.offers();
                self.enter(state::INIT_WAIT, offers);
            }
            // All else says nothing new, or nothing that makes sense.
            _ => {}
        }
    }

    /// Lets go of everything, without a word: the machine is over.
    pub fn end(&mut self) {
        self.driver.disconnect();
    }

    /// The device cannot go on: the frontend is told why, and that it is over.
    pub fn fail(&mut self, error: &str) {
        tracing::warn!(device = self.path, error, "xen: backend gives up");
        self.driver.disconnect();
        self.enter(state::CLOSING, vec![("error", error.into())]);
    }

    fn enter(&mut self, new: u32, keys: Vec<(&'static str, String)>) {
        let mut all: Vec<(String, String)> = keys.into_iter().map(|(name, value)| (format!("{}/{name}", self.path), value)).collect();
        all.push((format!("{}/{STATE}", self.path), new.to_string()));
        self.keys.write(&all);
        self.state = new;
    }
}
