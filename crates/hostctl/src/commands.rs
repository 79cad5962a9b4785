//! What each command does with the store.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use abi::pvbus::KVOP_MAXSIZE;
use pvbus::store::Watch;
use pvbus::{Nanos, StoreError};

use crate::args::{Arguments, Command, HELP, USAGE, Value};
use crate::error::Error;
use crate::machine::MACHINE;
use crate::output::Output;
use crate::select::{self, Selection};
use crate::sys::file::Access;
use crate::sys::{self, File, time};
use crate::transport::{Event, Opened};
use crate::{detection, serve};

/// Does what the command line says.
///
/// # Errors
/// [`Error`].
pub fn run(arguments: &Arguments) -> Result<(), Error> {
    let mut output = Output::open(arguments)?;
    match &arguments.command {
        Command::Help => output.line(format_args!("{USAGE}{}", HELP.trim_end())),
        Command::Version => output.line(concat!("hostctl ", env!("CARGO_PKG_VERSION"))),
        Command::Type => {
            let (device, type_name) = select::type_of(arguments.device.as_deref())?;
            output.line(format_args!("{device}: {type_name}"))
        }
        Command::Detect => {
            let detection = pvbus::detect(&MACHINE);
            match arguments.json {
                true => output.line(detection::json(&detection)),
                false => output.line(detection::text(&detection).trim_end()),
            }
        }
        Command::Serve => serve::serve(arguments),
        Command::Get(key) => {
            let mut store = open(arguments)?;
            let value = if arguments.openbsd { store.read_or_list(key) } else { store.read(key) };
            let value = value.map_err(refused(key, &*store))?;
            if arguments.quiet { Ok(()) } else { output.value(key, &value) }
        }
        Command::Set(key, value) => {
            let value = contents(value, arguments.raw)?;
            let mut store = open(arguments)?;
            store.write(key, &value).map_err(refused(key, &*store))
        }
        Command::List(path) => {
            let mut store = open(arguments)?;
            let names = store.list(path).map_err(refused(path, &*store))?;
            output.names(&names)
        }
        Command::Remove(key) => {
            let mut store = open(arguments)?;
            store.remove(key).map_err(refused(key, &*store))
        }
        Command::Watch(keys) => watch(&mut *open(arguments)?, keys, arguments, &mut output),
    }
}

/// The store, with the explanation where it is wanted.
fn open(arguments: &Arguments) -> Result<Box<dyn Opened>, Error> {
    let Selection { store, name, way, why } = select::open(arguments.device.as_deref(), arguments.patience())?;
    if arguments.explain {
        sys::say(&format!("hostctl: store: {name}\nhostctl: way: {way}\nhostctl: why: {why}\n"));
    }
    Ok(store)
}

/// Prints what the keys are, and then each change, until there were enough or the time is over.
fn watch(store: &mut dyn Opened, keys: &[Vec<u8>], arguments: &Arguments, output: &mut Output) -> Result<(), Error> {
    let deadline = arguments.timeout.map(time::after);
    let mut watches = Vec::new();
    for key in keys {
        let begun = store.subscribe(key).and_then(|()| store.watch(key)).and_then(|watch| Ok((watch, found(store.read(key))?)));
        let (watch, value) = begun.map_err(refused(key, store))?;
        output.change(key, value.as_deref())?;
        watches.push(watch);
    }
    let mut left = arguments.count;
    loop {
        for (key, value) in changes(store, &mut watches, deadline)? {
            output.change(&key, value.as_deref())?;
            left = left.map(|left| left.saturating_sub(1));
            if left == Some(0) {
                return Ok(());
            }
        }
    }
}

/// A key, and what has become of it.
type Change = (Vec<u8>, Option<Vec<u8>>);

/// Waits, and gives what has changed.
fn changes(store: &mut dyn Opened, watches: &mut [Watch], deadline: Option<Nanos>) -> Result<Vec<Change>, Error> {
    let event = store.wait(deadline).map_err(refused(b"watch", store))?;
    let mut changes = Vec::new();
    match event {
        Event::TimeOver => return Err(Error::TimeOver),
        Event::Changed(path) => {
            let value = found(store.read(&path)).map_err(refused(&path, store))?;
            changes.push((path, value));
        }
        Event::Perhaps => {
            for watch in watches {
                if let Some(value) = store.changed(watch).map_err(refused(watch.key(), store))? {
                    changes.push((watch.key().to_vec(), value));
                }
            }
        }
    }
    Ok(changes)
}

/// A key that is not there has no value.
fn found(value: Result<Vec<u8>, StoreError>) -> Result<Option<Vec<u8>>, StoreError> {
    match value {
        Ok(value) => Ok(Some(value)),
        Err(StoreError::NotFound) => Ok(None),
        Err(error) => Err(error),
    }
}

/// What a refusal of `key` is told as; of the store's name where there is no key.
fn refused(key: &[u8], store: &dyn Opened) -> impl FnOnce(StoreError) -> Error {
    let key = if key.is_empty() { store.kind().to_string() } else { String::from_utf8_lossy(key).into_owned() };
    let (rules, absence) = (store.rules(), store.absence());
    move |error| {
        let rules = if error == StoreError::NotFound { absence } else { rules };
        Error::Store { key, error, rules }
    }
}

/// The bytes of a new value. From a file, a newline at its end is not part of it, except as raw bytes.
fn contents(value: &Value, raw: bool) -> Result<Vec<u8>, Error> {
    // Enough to see that it is too much.
    const MOST: usize = KVOP_MAXSIZE + 2;
    let read = match value {
        Value::Bytes(bytes) => return Ok(bytes.clone()),
        Value::Stdin => File::STDIN.read_to_end(MOST),
        Value::File(path) => {
            let name = String::from_utf8_lossy(path);
            File::open(path, Access::Read).map_err(Error::system(format_args!("fopen: {name}")))?.read_to_end(MOST)
        }
    };
    let mut bytes = read.map_err(Error::system("input file"))?;
    if bytes.is_empty() && !raw {
        return Err(Error::Input("input file"));
    }
    if !raw && bytes.ends_with(b"\n") {
        bytes.pop();
    }
    if bytes.len() > KVOP_MAXSIZE { Err(Error::Input("value too long")) } else { Ok(bytes) }
}
