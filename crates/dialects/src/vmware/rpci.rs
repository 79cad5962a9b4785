//! Requests of the guest: keys, what the tools report about the guest, and acknowledgments.
//!
//! A request is `command arguments`; the answer is `1 data` or `0 reason` (open-vm-tools `lib/rpcOut/rpcout.c`). Which commands there are:
//! open-vm-tools `lib/include/vmware/guestrpc/` and `services/plugins/`, OpenBSD `sys/dev/pv/vmt.c`. Requests may end in NULs: vmtoolsd and
//! the Rust client send one, OpenBSD's driver a whole buffer of them.
//!
//! What the tools report is written below [`REPORTS`], one node each, for the host to read; `docs/vmware.md` has the list.

use abi::vmware::rpc::{self as words, guest_info};

use super::guestinfo;
use super::tclo::Tclo;
use crate::store::{Client, Store, StoreError};

/// Where the tools' reports are in the store.
pub const REPORTS: &str = "data/vmware";
/// RPCI: free space of the disks, as JSON.
const SET_GUEST_DISK_INFO: &str = "SetGuestDiskInfo";
/// RPCI: version of the tools, with or without the kind of their installation.
const SET_VERSION: [&str; 2] = ["tools.set.version", "tools.set.versiontype"];
/// RPCI: the tools can do something.
const CAPABILITY: &str = "tools.capability.";
/// RPCI: answered without value.
const MACHINE_ID: &str = "machine.id.get";
/// RPCI: taken note of by saying so.
const ACKNOWLEDGED: [&str; 5] =
    ["log", "vmx.set_option", "vmx.capability.unified_loop", "disk.wiper.enable", "guest.upgrader_send_cmd_line_args"];
/// RPCI: progress of a customisation, taken note of as well.
const DEPLOY_PACKAGE: &str = "deployPkg.";

/// Answers a request.
pub(super) fn answer(request: &[u8], store: &dyn Store, tclo: &mut Tclo, now: u64) -> Vec<u8> {
    let text = without_nuls(request);
    let (command, arguments) = cut(text);
    // A command that is no text is none.
    let command = std::str::from_utf8(command).unwrap_or_default();
    let outcome = match command {
        words::INFO_GET => get(store, cut(arguments).0).ok_or_else(|| words::NO_VALUE.to_owned()),
        words::INFO_SET => set(store, arguments),
        // Some reports are binary: a NUL at the end may belong to them.
        words::SET_GUEST_INFO => report_guest_info(store, cut(request).1),
        SET_GUEST_DISK_INFO => report(store, "disk-details", arguments),
        words::STATE_CHANGE_STATUS => {
            if let [status, b' ', number @ b'0'..=b'9'] = arguments {
                tclo.state_changed(*status == b'1', number - b'0', now);
            }
            Ok(Vec::new())
        }
        words::CAPABILITY_STATE_CHANGE => {
            tclo.set_state_change(arguments != b"0");
            Ok(Vec::new())
        }
        MACHINE_ID => Err("No machine id".into()),
        _ if SET_VERSION.contains(&command) => report(store, "tools-version", cut(arguments).0),
        _ if ACKNOWLEDGED.contains(&command) || command.starts_with(CAPABILITY) || command.starts_with(DEPLOY_PACKAGE) => Ok(Vec::new()),
        _ => Err(words::UNKNOWN_COMMAND.into()),
    };
    match outcome {
        Ok(data) => [words::SUCCESS, &data].concat(),
        Err(reason) => [words::FAILURE, reason.as_bytes()].concat(),
    }
}

fn get(store: &dyn Store, key: &[u8]) -> Option<Vec<u8>> {
    guestinfo::get(store, std::str::from_utf8(key).ok()?)
}

fn set(store: &dyn Store, arguments: &[u8]) -> Result<Vec<u8>, String> {
    let (key, value) = cut(arguments);
    let key = std::str::from_utf8(key).map_err(|_| "The key is not UTF-8".to_owned())?;
    guestinfo::set(store, key, value).map_err(reason)?;
    Ok(Vec::new())
}

/// `SetGuestInfo  KIND VALUE`, with two spaces.
fn report_guest_info(store: &dyn Store, arguments: &[u8]) -> Result<Vec<u8>, String> {
    let (kind, value) = cut(arguments.trim_ascii_start());
    let text = without_nuls(value);
    let (name, value) = match std::str::from_utf8(kind).ok().and_then(|kind| kind.parse().ok()) {
        Some(guest_info::DNS_NAME) => ("dns-name", text),
        Some(guest_info::IP_ADDRESS) => ("ip", text),
        Some(guest_info::DISK_FREE_SPACE) => ("disks", value),
        Some(guest_info::BUILD_NUMBER) => ("tools-build", text),
        Some(guest_info::OS_NAME_FULL) => ("os-name-full", text),
        Some(guest_info::OS_NAME) => ("os-name", text),
        Some(guest_info::UPTIME) => ("uptime", text),
        Some(guest_info::MEMORY) => ("memory", value),
        Some(guest_info::NIC_V2) => ("nics-v2", value),
        Some(guest_info::NIC_V3) => ("nics-v3", value),
        Some(guest_info::OS_DETAILED) => ("os-detailed", text),
        _ => return Err("Unknown guest info".into()),
    };
    report(store, name, value)
}

fn report(store: &dyn Store, name: &str, value: &[u8]) -> Result<Vec<u8>, String> {
    store.write(Client::Guest, &format!("{REPORTS}/{name}"), value).map_err(reason)?;
    Ok(Vec::new())
}

fn reason(error: StoreError) -> String {
    error.to_string()
}

/// The first word and what is behind the space after it.
fn cut(text: &[u8]) -> (&[u8], &[u8]) {
    let mut parts = text.splitn(2, |byte| *byte == b' ');
    (parts.next().unwrap_or_default(), parts.next().unwrap_or_default())
}

fn without_nuls(text: &[u8]) -> &[u8] {
    let length = text.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    text.get(..length).unwrap_or_default()
}
