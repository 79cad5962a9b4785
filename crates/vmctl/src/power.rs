//! `vmctl stop`, `sync`, `freeze`, `thaw` and `status`: a running machine's power, clock, file systems and state.

use std::time::{Duration, Instant};

use anyhow::bail;
use vmd::power::{Via, Wish};
use vmd::socket::Connection;
use vmd::socket::connection::ConnectionError;
use vmd::socket::protocol::{Refusal, Reply, Request};
use vmd::status::{Rest, Status};

use crate::STATUS_TIME_OUT;
use crate::args::{RestArguments, StatusArguments, StopArguments, SyncArguments};

/// How often the machine is asked whether it has rebooted, or a guest that did not listen whether it does now.
const GLANCE: Duration = Duration::from_millis(100);

/// Asks or forces; the exit status. With patience, a guest that is still booting is asked until it listens.
///
/// # Errors
/// What the socket or the machine refused, in words for people.
pub fn stop(arguments: &StopArguments) -> anyhow::Result<u8> {
    let mut connection = Connection::open(&arguments.machine.control)?;
    let before = status(&mut connection)?;
    if arguments.force && arguments.wait.is_none() {
        return force(&mut connection, arguments.reboot);
    }
    let wish = if arguments.reboot { Wish::Reboot } else { Wish::Shutdown };
    let deadline = Instant::now() + arguments.wait.unwrap_or_default();
    match (ask_until(&mut connection, wish, arguments.via, deadline), arguments.wait) {
        (Ok(()), None) => Ok(0),
        (Ok(()), Some(_)) if obeys(&mut connection, before.boots, arguments.reboot, deadline)? => {
            eprintln!("vmctl: the machine has {}", if arguments.reboot { "rebooted" } else { "ended" });
            Ok(0)
        }
        (Ok(()), Some(patience)) => {
            let deed = if arguments.reboot { "rebooted" } else { "shut down" };
            eprintln!("vmctl: the guest has not {deed} within {} seconds", patience.as_secs_f64());
            if arguments.force { force(&mut connection, arguments.reboot) } else { Ok(STATUS_TIME_OUT) }
        }
        (Err(error), _) if arguments.force => {
            eprintln!("vmctl: {error:#}");
            force(&mut connection, arguments.reboot)
        }
        (Err(error), _) => bail!("{error:#}; --force does it without the guest"),
    }
}

/// Asks the guest to set its clock; the exit status.
///
/// # Errors
/// What the socket or the machine refused, in words for people.
pub fn sync(arguments: &SyncArguments) -> anyhow::Result<u8> {
    ask(&mut Connection::open(&arguments.machine.control)?, Wish::SetClock, arguments.via)?;
    Ok(0)
}

/// Has the guest bring its file systems to rest; the exit status.
///
/// # Errors
/// What the socket, the machine or the guest refused, in words for people.
pub fn freeze(arguments: &RestArguments) -> anyhow::Result<u8> {
    rest(arguments, Wish::Freeze, Rest::Frozen)
}

/// Has the guest let its file systems go on; the exit status.
///
/// # Errors
/// As above.
pub fn thaw(arguments: &RestArguments) -> anyhow::Result<u8> {
    rest(arguments, Wish::Thaw, Rest::Working)
}

/// Waits until file systems are as they are wanted.
fn rest(arguments: &RestArguments, wish: Wish, wanted: Rest) -> anyhow::Result<u8> {
    let mut connection = Connection::open(&arguments.machine.control)?;
    ask(&mut connection, wish, Via::Hyperv)?;
    let deadline = Instant::now() + arguments.wait;
    loop {
        let hyperv = status(&mut connection)?.guest.and_then(|guest| guest.hyperv);
        match hyperv.map(|hyperv| hyperv.file_systems) {
            Some(now) if now == wanted => return Ok(0),
            Some(Rest::Freezing | Rest::Thawing) if Instant::now() < deadline => std::thread::sleep(GLANCE),
            Some(Rest::Freezing | Rest::Thawing) => {
                eprintln!("vmctl: the guest has not done it within {} seconds", arguments.wait.as_secs_f64());
                return Ok(STATUS_TIME_OUT);
            }
            Some(now) => bail!("file systems: {now}"),
            None => bail!("the machine has ended or rebooted"),
        }
    }
}

/// Prints how the machine is; the exit status.
///
/// # Errors
/// What the socket or the machine refused, in words for people.
pub fn show(arguments: &StatusArguments) -> anyhow::Result<u8> {
    let status = status(&mut Connection::open(&arguments.machine.control)?)?;
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&status)?);
    } else {
        print!("{status}");
    }
    Ok(0)
}

fn status(connection: &mut Connection) -> anyhow::Result<Status> {
    match connection.call(&Request::Status)? {
        Reply::Status(status) => Ok(*status),
        reply => refused(reply),
    }
}

fn ask(connection: &mut Connection, wish: Wish, via: Via) -> anyhow::Result<()> {
    ask_until(connection, wish, via, Instant::now())
}

/// Asks at least once, and again while the guest does not listen yet.
fn ask_until(connection: &mut Connection, wish: Wish, via: Via, deadline: Instant) -> anyhow::Result<()> {
    loop {
        match connection.call(&Request::Ask { wish, via })? {
            Reply::Asked(via) => {
                eprintln!("vmctl: asked the guest {wish}, by {via}");
                return Ok(());
            }
            Reply::Refused { kind: Refusal::NotReady, .. } if Instant::now() < deadline => std::thread::sleep(GLANCE),
            reply => return refused(reply),
        }
    }
}

fn force(connection: &mut Connection, reboot: bool) -> anyhow::Result<u8> {
    match connection.call(&Request::Force { reboot })? {
        Reply::Done => {
            eprintln!("vmctl: {}", if reboot { "pressed the reset button" } else { "pulled the plug" });
            Ok(0)
        }
        reply => refused(reply),
    }
}

/// Whether the machine ends, or has come up once more than `boots` times, before the deadline.
fn obeys(connection: &mut Connection, boots: u64, reboot: bool, deadline: Instant) -> anyhow::Result<bool> {
    loop {
        match connection.call(&Request::Status) {
            Ok(Reply::Status(status)) if reboot && status.boots > boots => return Ok(true),
            Ok(_) if Instant::now() >= deadline => return Ok(false),
            Ok(_) => std::thread::sleep(GLANCE),
            Err(ConnectionError::Ended(_)) if reboot => bail!("the machine has ended instead of rebooting"),
            Err(ConnectionError::Ended(_)) => return Ok(true),
            Err(error) => return Err(error.into()),
        }
    }
}

/// The error for a reply that is not what was asked for.
///
/// # Errors
/// Always.
pub fn refused<T>(reply: Reply) -> anyhow::Result<T> {
    match reply {
        Reply::Refused { text, .. } => bail!("{text}"),
        other => bail!("the machine answered something else: {other:?}"),
    }
}
