//! A person at a machine's serial port: types, and reads what comes back.

use std::io::{Read, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

/// Longest that anything takes on a machine that is not overloaded.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running program whose standard input and output are the port. Its messages go where the test's go.
pub struct Session {
    child: Child,
    input: ChildStdin,
    output: Receiver<Vec<u8>>,
    /// Everything that came.
    seen: String,
    /// How much of it has been looked at.
    read: usize,
}

impl Session {
    /// Starts the program.
    pub fn start(mut command: Command) -> Session {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("the program starts");
        let mut stream = child.stdout.take().unwrap();
        let (sender, output) = mpsc::channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = stream.read(&mut buffer) {
                if sender.send(buffer[..count].to_vec()).is_err() {
                    break;
                }
            }
        });
        let input = child.stdin.take().unwrap();
        Session { child, input, output, seen: String::new(), read: 0 }
    }

    /// Its process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Types text.
    pub fn type_in(&mut self, text: &str) {
        self.input.write_all(text.as_bytes()).unwrap();
        self.input.flush().unwrap();
    }

    /// Waits until `text` comes; returns what came before it since the last time.
    #[track_caller]
    pub fn wait_for(&mut self, text: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(at) = self.seen[self.read..].find(text) {
                let before = self.seen[self.read..self.read + at].to_owned();
                self.read += at + text.len();
                return before;
            }
            match self.output.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(bytes) => self.seen.push_str(&String::from_utf8_lossy(&bytes)),
                Err(RecvTimeoutError::Timeout) => panic!("no «{text}» in {PATIENCE:?} in:\n{}", self.seen),
                Err(RecvTimeoutError::Disconnected) => panic!("the machine ended, without «{text}»:\n{}", self.seen),
            }
        }
    }

    /// Waits for the end; the exit status.
    #[track_caller]
    pub fn status(&mut self) -> Option<i32> {
        match super::wait(&mut self.child, PATIENCE) {
            Some(status) => status.code(),
            None => panic!("the machine did not end in {PATIENCE:?}:\n{}", self.seen),
        }
    }
}

impl Drop for Session {
    /// A test that failed leaves nothing running.
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
