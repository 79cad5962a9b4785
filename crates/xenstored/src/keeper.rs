//! What the event loop does so that keys outlive the server: at the end of each turn it writes down what the turn has changed.
//!
//! All requests of a turn share one transaction of the file, and those that come meanwhile share the next. While the file cannot be written, what
//! belongs into it is not changed, and it is tried again every [`AGAIN`].

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use xenstore::{NodeState, Server};

use crate::keys::{Keys, KeysError};

/// How long after a failure the file is tried again.
pub const AGAIN: Duration = Duration::from_secs(1);

/// The file of keys, open or waiting to be so again.
pub struct Keeper {
    path: PathBuf,
    file: File,
}

enum File {
    Open(Keys),
    Failed { tried: Instant },
}

impl Keeper {
    /// Opens the file at `path` and tells what is in it, see [`Keys::open`].
    ///
    /// # Errors
    /// [`KeysError`].
    pub fn open(path: &Path) -> Result<(Keeper, Vec<NodeState>), KeysError> {
        let (keys, nodes) = Keys::open(path)?;
        Ok((Keeper { path: path.into(), file: File::Open(keys) }, nodes))
    }

    /// For a server that goes on and cannot be ended: writes down its keys in the file at `path`. A file that cannot be used now is tried again,
    /// as after any failure.
    pub fn resume(path: &Path, server: &mut Server) -> Keeper {
        let mut keeper = Keeper { path: path.into(), file: File::Failed { tried: Instant::now() } };
        // Nothing can be wrong with no nodes; from here on what cannot be written down is held back.
        let begun = server.keep(&[]).map_err(|error| KeysError::Damaged(error.to_string()));
        if let Err(error) = begun.and_then(|()| keeper.begin_again(server)) {
            keeper.log(&error);
            keeper.fail(server);
        }
        keeper
    }

    /// Writes down what has changed; whether there was anything to do.
    pub fn keep(&mut self, server: &mut Server) -> bool {
        match &self.file {
            File::Open(keys) => {
                let Some(records) = server.unkept() else { return false };
                match keys.write(&records) {
                    Ok(()) => server.settle(true),
                    Err(error) => {
                        self.log(&error);
                        self.fail(server);
                    }
                }
                true
            }
            File::Failed { tried } if tried.elapsed() >= AGAIN => {
                match self.begin_again(server) {
                    Ok(()) => tracing::info!(file = %self.path.display(), "keys are written again"),
                    Err(_) => self.fail(server),
                }
                true
            }
            File::Failed { .. } => false,
        }
    }

    /// When [`Keeper::keep`] is to be called at the latest.
    pub fn due(&self) -> Option<Instant> {
        match self.file {
            File::Open(_) => None,
            File::Failed { tried } => Some(tried + AGAIN),
        }
    }

    /// A failed transaction may have reached the file, so what is in it is read again.
    fn begin_again(&mut self, server: &mut Server) -> Result<(), KeysError> {
        let (keys, nodes) = Keys::open(&self.path)?;
        server.keep(&nodes).map_err(|error| KeysError::Damaged(error.to_string()))?;
        keys.write(&server.unkept().unwrap_or_default())?;
        server.settle(true);
        self.file = File::Open(keys);
        Ok(())
    }

    fn fail(&mut self, server: &mut Server) {
        self.file = File::Failed { tried: Instant::now() };
        server.settle(false);
    }

    fn log(&self, error: &KeysError) {
        let file = self.path.display();
        tracing::error!(%file, %error, "keys cannot be written; those that are not a domain's cannot be changed until they can");
    }
}
