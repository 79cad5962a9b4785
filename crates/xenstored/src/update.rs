//! Who asks for a live upgrade, and when: CONTROL `live-update` as xenstore-control of C xenstored sends it, or SIGUSR2.
//!
//! | arguments | |
//! |---|---|
//! | `-f FILE` | the program to go on as |
//! | `-c CMDLINE` | its command line instead of this program's; divided at spaces |
//! | `-a` | forget both |
//! | `-s [-t SECONDS] [-F]` | go: as soon as no transaction is open, or `BUSY` after SECONDS (60); with -F go then nevertheless |
//!
//! Source: xen-project/xen `docs/misc/xenstore.txt`, CONTROL live-update. Answers are `OK`, to `-s` by the new program, or a text that says why not.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{Access, access};
use xenstore::{Answer, Error, Host};

/// How long open transactions are waited for when nobody says another time.
const WAIT: Duration = Duration::from_secs(60);

/// An upgrade that is to be.
pub struct Order {
    /// The program; this one's file when none was named.
    pub program: Option<PathBuf>,
    /// Its command line; this one's when none was given.
    pub arguments: Option<Vec<String>>,
    /// Until when open transactions are waited for.
    pub wait_until: Instant,
    /// Whether transactions that are open then are made to conflict.
    pub is_forced: bool,
}

impl Order {
    /// A signal's. It cannot be told that transactions are open, so it does not have to be.
    pub fn by_signal() -> Order {
        Order { program: None, arguments: None, wait_until: Instant::now() + WAIT, is_forced: true }
    }
}

/// The orders that clients give. Cheap to clone; all clones are one.
#[derive(Clone)]
pub struct Orders {
    state: Arc<Mutex<Staged>>,
    called: Arc<OwnedFd>,
}

#[derive(Default)]
struct Staged {
    program: Option<PathBuf>,
    arguments: Option<Vec<String>>,
    /// Of the order that was given and is not over.
    given: Option<Order>,
    is_going: bool,
}

impl Orders {
    /// None so far.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn new() -> io::Result<Orders> {
        Ok(Orders { state: Arc::default(), called: Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?) })
    }

    /// The order that made the descriptor readable.
    pub fn take(&self) -> Option<Order> {
        // Only the readiness is to go; the count says nothing.
        let _ = rustix::io::read(&*self.called, &mut [0; 8]);
        self.with(|staged| staged.given.take())
    }

    /// The order has failed; another may be given.
    pub fn is_over(&self) {
        self.with(|staged| *staged = Staged::default());
    }

    fn with<T>(&self, work: impl FnOnce(&mut Staged) -> T) -> T {
        work(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl AsFd for Orders {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.called.as_fd()
    }
}

impl Host for Orders {
    fn control(&mut self, command: &[u8], arguments: &[&[u8]]) -> Option<Result<Answer, Error>> {
        if command != b"live-update" {
            return None;
        }
        let Ok(arguments) = arguments.iter().map(|argument| std::str::from_utf8(argument)).collect::<Result<Vec<_>, _>>() else {
            return Some(Err(Error::BadRequest));
        };
        let answer = self.with(|staged| staged.on(&arguments));
        if answer == Ok(Answer::OnceTakenOver) {
            // It fails only when the counter is full, and then it is readable anyway.
            let _ = rustix::io::write(&*self.called, &1u64.to_ne_bytes());
        }
        Some(answer)
    }
}

impl Staged {
    fn on(&mut self, arguments: &[&str]) -> Result<Answer, Error> {
        let done = || Ok(Answer::Now("OK".into()));
        match arguments {
            _ if self.is_going => Ok(Answer::Now("BUSY".into())),
            ["-f", file] => match access(*file, Access::EXEC_OK) {
                Ok(()) => {
                    self.program = Some(file.into());
                    done()
                }
                Err(error) => Ok(Answer::Now(format!("{file}: {error}"))),
            },
            ["-c", line] => {
                self.arguments = Some(line.split_ascii_whitespace().map(str::to_owned).collect());
                done()
            }
            ["-a"] => {
                *self = Staged::default();
                done()
            }
            ["-s", options @ ..] => {
                let (wait, is_forced) = start_options(options)?;
                let (program, arguments) = (self.program.take(), self.arguments.take());
                self.given = Some(Order { program, arguments, wait_until: Instant::now() + wait, is_forced });
                self.is_going = true;
                Ok(Answer::OnceTakenOver)
            }
            _ => Err(Error::BadRequest),
        }
    }
}

fn start_options(options: &[&str]) -> Result<(Duration, bool), Error> {
    match options {
        [] => Ok((WAIT, false)),
        ["-F"] => Ok((WAIT, true)),
        ["-t", seconds] => Ok((Duration::from_secs(u64::from(seconds.parse::<u32>().map_err(|_| Error::BadRequest)?)), false)),
        ["-t", seconds, "-F"] => start_options(&["-t", seconds]).map(|(wait, _)| (wait, true)),
        _ => Err(Error::BadRequest),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn say(orders: &mut Orders, arguments: &[&str]) -> Result<Answer, Error> {
        let arguments: Vec<&[u8]> = arguments.iter().map(|argument| argument.as_bytes()).collect();
        orders.control(b"live-update", &arguments).unwrap()
    }

    fn ok() -> Result<Answer, Error> {
        Ok(Answer::Now("OK".into()))
    }

    #[test]
    fn program_and_arguments_are_staged_and_go_once() {
        let mut orders = Orders::new().unwrap();
        assert_eq!(say(&mut orders, &["-f", "/bin/true"]), ok());
        assert_eq!(say(&mut orders, &["-c", "--socket  /x --daemon"]), ok());
        assert!(orders.take().is_none());
        assert_eq!(say(&mut orders, &["-s", "-t", "5", "-F"]), Ok(Answer::OnceTakenOver));
        assert_eq!(say(&mut orders, &["-s"]), Ok(Answer::Now("BUSY".into())));
        let order = orders.take().unwrap();
        assert_eq!(order.program, Some("/bin/true".into()));
        assert_eq!(order.arguments.unwrap(), ["--socket", "/x", "--daemon"]);
        assert!(order.is_forced && order.wait_until <= Instant::now() + Duration::from_secs(5));
        orders.is_over();
        assert_eq!(say(&mut orders, &["-s"]), Ok(Answer::OnceTakenOver));
        assert_eq!(orders.take().unwrap().program, None);
    }

    #[test]
    fn what_cannot_be_is_said_at_once() {
        let mut orders = Orders::new().unwrap();
        assert!(matches!(say(&mut orders, &["-f", "/nonexistent"]), Ok(Answer::Now(said)) if said.starts_with("/nonexistent: ")));
        for bad in [&[][..], &["-x"], &["-f"], &["-s", "-t"], &["-s", "-t", "x"], &["-s", "5"]] {
            assert_eq!(say(&mut orders, bad), Err(Error::BadRequest), "{bad:?}");
        }
        assert_eq!(orders.control(b"other", &[]), None);
    }

    #[test]
    fn abort_forgets_what_was_staged() {
        let mut orders = Orders::new().unwrap();
        say(&mut orders, &["-f", "/bin/true"]).unwrap();
        assert_eq!(say(&mut orders, &["-a"]), ok());
        say(&mut orders, &["-s"]).unwrap();
        assert_eq!(orders.take().unwrap().program, None);
    }
}
