//! `vmctl disk` and `vmctl nic`: devices of a running machine.

use std::path::{Path, absolute};
use std::time::{Duration, Instant};

use anyhow::Context;
use vmd::config::{DiskSpec, NicSpec};
use vmd::hotplug::Stage;
use vmd::inventory::{DeviceStatus, Kind};
use vmd::kv;
use vmd::socket::Connection;
use vmd::socket::protocol::{Refusal, Reply, Request};

use crate::args::DeviceCommand;
use crate::power::refused;
use crate::{STATUS_NOT_FOUND, STATUS_TIME_OUT};

/// How long a guest may take to let go of a device when nobody says otherwise; as libxl's `LIBXL_DESTROY_TIMEOUT`.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often the machine is asked whether it has.
const GLANCE: Duration = Duration::from_millis(50);

/// Does what `command` says of disks; the exit status.
///
/// # Errors
/// What the socket, the machine or the host refused, in words for people.
pub fn disk(command: DeviceCommand<DiskSpec>) -> anyhow::Result<u8> {
    act(command, Kind::Disk, |mut spec| {
        // The machine may run in another directory.
        spec.path = absolute(&spec.path).with_context(|| spec.path.display().to_string())?;
        spec.path.to_str().context("a running machine takes only file names that are UTF-8")?;
        Ok(Request::DiskAdd { disk: spec.to_string() })
    })
}

/// Does what `command` says of network cards; the exit status.
///
/// # Errors
/// As [`disk`].
pub fn nic(command: DeviceCommand<NicSpec>) -> anyhow::Result<u8> {
    act(command, Kind::Nic, |spec| Ok(Request::NicAdd { nic: spec.to_string() }))
}

fn act<S>(command: DeviceCommand<S>, kind: Kind, request: impl FnOnce(S) -> anyhow::Result<Request>) -> anyhow::Result<u8>
where
    S: std::str::FromStr<Err = String> + Clone + Send + Sync + 'static,
{
    match command {
        DeviceCommand::Add { machine, device } => add(&machine.control, &request(device)?),
        DeviceCommand::Rm { machine, wait, force, name } => remove(&machine.control, kind, &name, wait, force),
        DeviceCommand::Ls { machine, json } => list(&machine.control, kind, json),
    }
}

fn add(control: &Path, request: &Request) -> anyhow::Result<u8> {
    match Connection::open(control)?.call(request)? {
        Reply::Added(device) => {
            if let Some(place) = &device.place {
                eprintln!("vmctl: the guest finds it as {place}");
            }
            println!("{}", device.name);
            Ok(0)
        }
        reply => refused(reply),
    }
}

fn remove(control: &Path, kind: Kind, name: &str, wait: Option<Duration>, force: bool) -> anyhow::Result<u8> {
    let mut connection = Connection::open(control)?;
    if find(&mut connection, kind, name)?.is_none() {
        eprintln!("vmctl: there is no {kind} {name}");
        return Ok(STATUS_NOT_FOUND);
    }
    let request = |force| Request::DeviceRemove { device: name.into(), force };
    if force && wait.is_none() {
        return done(connection.call(&request(true))?);
    }
    let patience = wait.unwrap_or(PATIENCE);
    match connection.call(&request(false))? {
        Reply::Done => {}
        reply => return refused(reply),
    }
    let deadline = Instant::now() + patience;
    while let Some(device) = find(&mut connection, kind, name)? {
        if Instant::now() >= deadline {
            let said = device.condition.and_then(|condition| condition.said);
            let said = said.map_or_else(String::new, |said| format!("; it says: {}", kv::printable(said.as_bytes())));
            eprintln!("vmctl: the guest has not let go of {name} within {} seconds{said}", patience.as_secs_f64());
            return if force { done(connection.call(&request(true))?) } else { Ok(STATUS_TIME_OUT) };
        }
        std::thread::sleep(GLANCE);
    }
    Ok(0)
}

fn list(control: &Path, kind: Kind, json: bool) -> anyhow::Result<u8> {
    let mut devices = devices(&mut Connection::open(control)?)?;
    devices.retain(|device| device.kind == kind);
    if json {
        println!("{}", serde_json::to_string_pretty(&devices)?);
        return Ok(0);
    }
    for DeviceStatus { name, spec, place, condition, .. } in devices {
        let stage = condition.as_ref().map_or_else(|| "-".to_owned(), |condition| condition.stage.to_string());
        println!("{name:<8}{:<10}{stage:<9}{}", place.unwrap_or_else(|| "-".into()), kv::printable(spec.as_bytes()));
        if let Some(said) = condition.filter(|condition| condition.stage != Stage::InUse).and_then(|condition| condition.said) {
            println!("        {}", kv::printable(said.as_bytes()));
        }
    }
    Ok(0)
}

fn find(connection: &mut Connection, kind: Kind, name: &str) -> anyhow::Result<Option<DeviceStatus>> {
    Ok(devices(connection)?.into_iter().find(|device| device.kind == kind && device.name == name))
}

fn devices(connection: &mut Connection) -> anyhow::Result<Vec<DeviceStatus>> {
    match connection.call(&Request::Devices)? {
        Reply::Devices(devices) => Ok(devices),
        reply => refused(reply),
    }
}

fn done(reply: Reply) -> anyhow::Result<u8> {
    match reply {
        Reply::Done => Ok(0),
        // It went by itself meanwhile.
        Reply::Refused { kind: Refusal::NotFound, .. } => Ok(0),
        reply => refused(reply),
    }
}
