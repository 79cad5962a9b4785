//! `vmctl kv`: the keys of a running machine.

use std::io::{ErrorKind, IsTerminal, Write};
use std::os::unix::ffi::OsStringExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use vmd::kv::{self, JsonValue, Source};
use vmd::socket::Connection;
use vmd::socket::connection::ConnectionError;
use vmd::socket::protocol::{Refusal, Reply, Request};

use crate::args::KvCommand;
use crate::{STATUS_NOT_FOUND, STATUS_TIME_OUT};

/// Does what `command` says; the exit status.
///
/// # Errors
/// What the socket, the machine or the host refused, in words for people.
pub fn kv(command: KvCommand) -> anyhow::Result<u8> {
    let done = match command {
        KvCommand::Get { machine, no_newline, json, key } => get(&machine.control, key, no_newline, json),
        KvCommand::Set { machine, input, key, value } => {
            let value = match (input, value) {
                (Some(file), _) => Source::File(file).read()?,
                (None, Some(value)) if value == "-" => {
                    let input = kv::read_value(std::io::stdin()).context("standard input")?;
                    input.context("standard input: larger than a value of the store can be")?
                }
                (None, value) => value.unwrap_or_default().into_vec(),
            };
            Connection::open(&machine.control)?
                .call(&Request::KvSet { path: key, value: JsonValue(value) })
                .map_err(anyhow::Error::from)
                .and_then(done)
        }
        KvCommand::Ls { machine, recursive, json, path } => list(&machine.control, path.unwrap_or_default(), recursive, json),
        KvCommand::Rm { machine, key } => {
            Connection::open(&machine.control)?.call(&Request::KvRemove { path: key }).map_err(anyhow::Error::from).and_then(done)
        }
        KvCommand::Watch { machine, count, timeout, json, paths } => watch(&machine.control, paths, count, timeout, json),
    };
    match done {
        // Whoever read our output has seen enough.
        Err(error) if error.downcast_ref::<std::io::Error>().is_some_and(|error| error.kind() == ErrorKind::BrokenPipe) => Ok(0),
        done => done,
    }
}

fn get(control: &Path, path: String, no_newline: bool, json: bool) -> anyhow::Result<u8> {
    let value = match Connection::open(control)?.call(&Request::KvGet { path })? {
        Reply::Value(value) => value,
        reply => return done(reply),
    };
    let mut bytes = if json { serde_json::to_vec(&value)? } else { value.0 };
    let mut stdout = std::io::stdout().lock();
    // Exact for programs; for people the prompt should not follow the value on its line.
    if json || !no_newline && stdout.is_terminal() && !bytes.ends_with(b"\n") {
        bytes.push(b'\n');
    }
    stdout.write_all(&bytes)?;
    stdout.flush()?;
    Ok(0)
}

fn list(control: &Path, path: String, recursive: bool, json: bool) -> anyhow::Result<u8> {
    let request = if recursive { Request::KvTree { path } } else { Request::KvList { path } };
    let mut stdout = std::io::stdout().lock();
    match Connection::open(control)?.call(&request)? {
        Reply::Names(names) if json => writeln!(stdout, "{}", serde_json::to_string_pretty(&names)?)?,
        Reply::Tree(tree) if json => writeln!(stdout, "{}", serde_json::to_string_pretty(&tree)?)?,
        Reply::Names(names) => names.iter().try_for_each(|name| writeln!(stdout, "{name}"))?,
        Reply::Tree(tree) => tree.keys().try_for_each(|path| writeln!(stdout, "{path}"))?,
        reply => return done(reply),
    }
    stdout.flush()?;
    Ok(0)
}

fn watch(control: &Path, paths: Vec<String>, count: Option<u64>, timeout: Option<Duration>, json: bool) -> anyhow::Result<u8> {
    let deadline = timeout.map(|timeout| Instant::now() + timeout);
    let mut connection = Connection::open(control)?;
    for path in paths {
        match connection.call(&Request::KvWatch { path })? {
            Reply::Done => {}
            reply => return done(reply),
        }
    }
    let mut left = count;
    let mut stdout = std::io::stdout().lock();
    while left != Some(0) {
        let (path, value) = match connection.next(deadline) {
            Ok(Some(Reply::Changed { path, value })) => (path, value),
            Ok(Some(reply)) => return done(reply),
            Ok(None) if count.is_some() => return Ok(STATUS_TIME_OUT),
            Ok(None) => return Ok(0),
            Err(ConnectionError::Ended(_)) if count.is_none() => return Ok(0),
            Err(error) => return Err(error.into()),
        };
        match value {
            value if json => writeln!(stdout, "{}", serde_json::json!({ "path": path, "value": value }))?,
            Some(JsonValue(value)) => writeln!(stdout, "{path}={}", kv::printable(&value))?,
            None => writeln!(stdout, "{path} removed")?,
        }
        stdout.flush()?;
        left = left.map(|left| left - 1);
    }
    Ok(0)
}

/// The exit status for a reply that is not what was asked for, or needs no more words than that.
fn done(reply: Reply) -> anyhow::Result<u8> {
    match reply {
        Reply::Done => Ok(0),
        Reply::Refused { kind: Refusal::NotFound, text } => {
            eprintln!("vmctl: {text}");
            Ok(STATUS_NOT_FOUND)
        }
        Reply::Refused { text, .. } => bail!("{text}"),
        other => bail!("the machine answered something else: {other:?}"),
    }
}
