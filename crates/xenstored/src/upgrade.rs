//! Live upgrade: this process goes on as another program, and no client notices.
//!
//! It is asked for as C xenstored's is (xen-project/xen `docs/misc/xenstore.txt`, CONTROL live-update): `live-update -f FILE` names the program, `-s`
//! starts it, `-a` forgets it. SIGUSR2 alone starts the program at the path that this one was started from, which a package's update has replaced.
//! The loop pauses when nobody has a transaction open, or a second has passed. Then the new program is first run beside this one, only to
//! tell whether it can read the state; if it cannot, or anything else fails, this program goes on.

use std::convert::Infallible;
use std::ffi::{CString, OsStr, OsString};
use std::fs::File;
use std::io::Seek;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use rustix::process::{Signal, getpid, kill_process};
use xenstore::{Error, Host};
use xenstored::Service;
use xenstored::handover::{ACCEPTED, Handover, keep_one_open, keep_open};

use crate::process::become_program;

/// Hidden options of the command line, see [`Arguments`](crate::args::Arguments).
pub const RESUME: &str = "--resume";
pub const CHECK: &str = "--check-state";

/// How long the new program may think about the state. Clients wait meanwhile.
const PATIENCE: Duration = Duration::from_secs(5);

/// The program that was named, if one was.
#[derive(Clone, Default)]
pub struct Next(Arc<Mutex<Option<PathBuf>>>);

impl Next {
    fn set(&self, program: Option<PathBuf>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = program;
    }

    fn take(&self) -> Option<PathBuf> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Whom the store asks about domains: there are none, and commands about this program are answered.
pub struct Program(pub Next);

impl Host for Program {
    fn control(&mut self, command: &[u8], arguments: &[&[u8]]) -> Option<Result<String, Error>> {
        (command == b"live-update").then(|| self.live_update(arguments))
    }
}

impl Program {
    fn live_update(&mut self, arguments: &[&[u8]]) -> Result<String, Error> {
        match arguments {
            [b"-f", file] => {
                let file = Path::new(OsStr::from_bytes(file));
                let can_run = |path: &Path| path.metadata().is_ok_and(|about| about.is_file() && about.permissions().mode() & 0o111 != 0);
                if !file.is_absolute() || !can_run(file) {
                    return Err(Error::BadRequest);
                }
                self.0.set(Some(file.into()));
            }
            [b"-a"] => self.0.set(None),
            // How long to wait, and whether to do it then (-t SECONDS, -F), is decided here.
            [b"-s", ..] => kill_process(getpid(), Signal::USR2).map_err(|_| Error::Refused)?,
            _ => return Err(Error::BadRequest),
        }
        Ok("OK".into())
    }
}

/// Goes on as the next program. Returns only when that fails; the log has the reason.
pub fn upgrade(service: &Service, next: &Next) {
    let program = next.take().or_else(|| std::env::args_os().next().map(PathBuf::from)).unwrap_or_default();
    let Err(error) = try_upgrade(service, &program);
    tracing::error!(program = %program.display(), error = format!("{error:#}"), "cannot go on as another program");
    if let Err(error) = keep_open(service, false) {
        tracing::warn!(%error, "sockets stay open in programs that this one starts");
    }
}

fn try_upgrade(service: &Service, program: &Path) -> anyhow::Result<Infallible> {
    let mut state = Handover::of(service).write()?;
    check(program, state.try_clone()?)?;
    state.rewind()?;
    keep_open(service, true)?;
    keep_one_open(state.as_fd(), true)?;
    tracing::info!(program = %program.display(), connections = service.connections.len(), "going on as another program");
    let arguments =
        [OsString::from(program)].into_iter().chain(arguments_of_this()).chain([RESUME.into(), state.as_raw_fd().to_string().into()]);
    let arguments = arguments.map(|argument| CString::new(argument.as_bytes())).collect::<Result<Vec<_>, _>>()?;
    let path = CString::new(program.as_os_str().as_bytes())?;
    Err(become_program(&path, &arguments).into())
}

/// Asks the program whether it can go on from `state`, and takes no answer for one that is not [`ACCEPTED`].
fn check(program: &Path, state: File) -> anyhow::Result<()> {
    let mut command = Command::new(program);
    command.arg(CHECK).stdin(state).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().context("it does not start")?;
    let start = Instant::now();
    while child.try_wait()?.is_none() {
        if start.elapsed() > PATIENCE {
            child.kill()?;
            child.wait()?;
            bail!("it does not say whether it can read this program's state");
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let output = child.wait_with_output()?;
    let accepted = output.status.success() && output.stdout.trim_ascii() == ACCEPTED.as_bytes();
    ensure!(accepted, "it cannot read this program's state: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}

/// This program's arguments but for an earlier [`RESUME`].
fn arguments_of_this() -> impl Iterator<Item = OsString> {
    let mut all = std::env::args_os().skip(1);
    std::iter::from_fn(move || {
        loop {
            let argument = all.next()?;
            if argument != RESUME {
                return Some(argument);
            }
            all.next();
        }
    })
}
