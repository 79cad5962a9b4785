//! What the log tells a person about a domain that runs into its quotas.

// Tests fail by panicking; the lint knows only functions marked as tests.
#![allow(clippy::unwrap_used)]

mod common;

use std::io::{self, Write};
use std::sync::{Arc, Mutex};

use common::Rig;
use xenstore::Quota;

/// A log that is kept.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The lines that `work` leaves in the log.
fn lines_of(work: impl FnOnce()) -> Vec<String> {
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt().without_time().with_ansi(false).with_writer(move || writer.clone()).finish();
    tracing::subscriber::with_default(subscriber, work);
    let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    text.lines().map(str::to_owned).collect()
}

#[test]
fn log_tells_which_domain_ran_into_which_quota() {
    let lines = lines_of(|| {
        let mut rig = Rig::new();
        let (one, two) = (rig.guest(1), rig.guest(2));
        rig.quota(1, Quota::NodeSize, 4);
        rig.quota(2, Quota::Nodes, 2);
        rig.write(one, 0, "x", "12345").unwrap_err();
        rig.write(two, 0, "x", "").unwrap();
        rig.write(two, 0, "y", "").unwrap_err();
    });
    assert_eq!(lines.len(), 2, "{lines:?}");
    assert!(lines[0].ends_with(r#"quota is used up domain=1 quota="node-size" limit=4 hits=1"#), "{lines:?}");
    assert!(lines[1].ends_with(r#"quota is used up domain=2 quota="nodes" limit=2 hits=1"#), "{lines:?}");
}

#[test]
fn guest_that_goes_on_and_on_does_not_flood_the_log() {
    let lines = lines_of(|| {
        let mut rig = Rig::new();
        let guest = rig.guest(1);
        rig.quota(1, Quota::NodeSize, 4);
        (0..10_000).for_each(|_| drop(rig.write(guest, 0, "x", "12345").unwrap_err()));
    });
    assert_eq!(lines.len(), 14, "at 1, 2, 4, ... 8192");
    assert!(lines[13].contains("hits=8192"), "{lines:?}");
}
