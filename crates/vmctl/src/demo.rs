//! What `vmctl run` does when it is given nothing to boot: the embedded guest, with every dialect, and a few keys for it to find.
//!
//! The guest shows what it detects and reads the keys; the key that it writes in return is shown here as it arrives. On a terminal it
//! leaves the person at its prompt, otherwise it powers off.

use std::io::IsTerminal;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

use dialects::store::{Client, Observer, Store, StoreError, WatchId};
use vmd::config::{BackendChoice, DialectList, Kernel, MachineConfig, SerialTarget};
use vmd::kv;

use crate::terminal;

/// Keys that the guest finds, unless `--kv` sets them otherwise.
const KEYS: [(&str, &str); 2] = [("vm-data/hostname", "pvbus"), ("vm-data/greeting", "the host greets its guest")];
/// The key by which it answers, and its name for people.
const ANSWER: (&str, &str) = ("vm-data/guest/said", "guestinfo.guest.said");
/// Most letters of an answer that are shown.
const SHOWN: usize = 200;

/// Whether there is nothing else to boot.
pub fn is_wanted(config: &MachineConfig) -> bool {
    config.kernel.is_none() && config.bios.is_none() && config.disks.is_empty() && config.initrds.is_empty()
}

/// Completes the machine's configuration. `dialects_given` keeps those it has.
pub fn complete(config: &mut MachineConfig, dialects_given: bool) {
    config.kernel = Some(Kernel::BuiltIn { name: embedded::NAME, data: embedded::GUEST });
    if !dialects_given {
        let anywhere = config.deterministic || config.backend == BackendChoice::Kvm;
        config.dialects = if anywhere { DialectList::everywhere() } else { DialectList::all() };
    }
    if config.cmdline.is_empty() {
        let is_for_people = config.serial == SerialTarget::Stdio && std::io::stdin().is_terminal();
        config.cmdline = if is_for_people { "demo prompt" } else { "demo" }.into();
    }
}

/// Sets the keys.
///
/// # Errors
/// Those of the store.
pub fn set_keys(store: &dyn Store) -> Result<(), StoreError> {
    KEYS.iter().try_for_each(|(path, value)| store.write(Client::Host, path, value.as_bytes()))
}

/// Shows the guest's answers as they arrive, until this is dropped.
pub struct Answers {
    store: Arc<dyn Store>,
    watch: WatchId,
    thread: Option<JoinHandle<()>>,
}

impl Answers {
    /// Begins to listen.
    ///
    /// # Errors
    /// When the host gives no thread, or the store no watch.
    pub fn show(store: Arc<dyn Store>) -> anyhow::Result<Answers> {
        let (sender, changes) = mpsc::channel();
        // An observer may neither wait nor read the store.
        let observer: Observer = Arc::new(move |_| {
            let _ = sender.send(());
        });
        let reader = Arc::clone(&store);
        let thread = std::thread::Builder::new().name("answers".into()).spawn(move || {
            for () in changes {
                if let Ok(value) = reader.read(Client::Host, ANSWER.0) {
                    let text: String = kv::printable(&value).chars().take(SHOWN).collect();
                    terminal::say(&format!("the guest set {} to \"{text}\"", ANSWER.1));
                }
            }
        })?;
        let watch = store.watch(ANSWER.0, observer)?;
        Ok(Answers { store, watch, thread: Some(thread) })
    }
}

impl Drop for Answers {
    fn drop(&mut self) {
        // The observer goes with its watch and the channel with the observer; what has been told is shown first.
        self.store.unwatch(self.watch);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
