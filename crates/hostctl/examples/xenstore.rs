//! Directed tests of both XenStore clients, the library for programs (`xenstore::client`) and pvbus' by the guest's device, against a real xenstored.
//!
//! `tests/hostctl/xen.rs` runs this program in dom0 of a real Xen, `tests/xen_domains.rs` where our server is in place of Xen's. It prints one line for each
//! test, `PASS name` or `FAIL name: why`, and ends with status 0 when all passed. Everything is below `data/rig` of this domain.

use std::fmt::{Debug, Display};
use std::process::ExitCode;
use std::time::Duration;

use hostctl::transport::xen;
use pvbus::xen::xenstore::Client as GuestClient;
use pvbus::{Store, StoreError};
use xenstore::Perms;
use xenstore::client::{Client, ClientError, Refusal, WatchEvent};

/// A test says why it failed.
type Test = fn() -> Result<(), String>;

const TESTS: &[(&str, Test)] = &[
    ("library_reads_writes_lists_and_removes", library_keys),
    ("library_changes_permissions", library_permissions),
    ("library_repeats_a_transaction_that_others_are_in_the_way_of", library_transaction),
    ("library_undoes_a_transaction_that_fails", library_abort),
    ("library_hears_of_changes_below_a_watch_until_it_ends", library_watch),
    ("pvbus_repeats_a_transaction_that_others_are_in_the_way_of", pvbus_transaction),
    ("pvbus_undoes_a_transaction_that_fails", pvbus_abort),
    ("pvbus_is_told_when_a_watched_key_changes", pvbus_watch),
    ("pvbus_lists_a_directory_longer_than_a_message", pvbus_long_directory),
];

/// How long an event may take.
const PATIENCE: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    let mut has_failed = false;
    for (name, test) in TESTS {
        match test() {
            Ok(()) => println!("PASS {name}"),
            Err(why) => {
                has_failed = true;
                println!("FAIL {name}: {why}");
            }
        }
    }
    if has_failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn text(error: impl Display) -> String {
    error.to_string()
}

fn same<T: PartialEq + Debug>(what: &str, is: T, wanted: T) -> Result<(), String> {
    if is == wanted { Ok(()) } else { Err(format!("{what}: {is:?}, and not {wanted:?}")) }
}

fn library() -> Result<Client, String> {
    Client::open().map_err(text)
}

fn guest() -> Result<GuestClient<xen::Device>, String> {
    xen::open(PATIENCE).map_err(text)
}

fn library_keys() -> Result<(), String> {
    let mut client = library()?;
    client.write("data/rig/a/value", b"1\0\xff").map_err(text)?;
    same("value", client.read("data/rig/a/value").map_err(text)?, b"1\0\xff".to_vec())?;
    client.mkdir("data/rig/a/empty").map_err(text)?;
    let mut names = client.list("data/rig/a").map_err(text)?;
    names.sort();
    same("names", names, vec!["empty".to_owned(), "value".to_owned()])?;
    client.remove("data/rig/a").map_err(text)?;
    same("exists", client.exists("data/rig/a/value").map_err(text)?, false)?;
    match client.read("data/rig/a/value") {
        Err(ClientError::Refused(Refusal::Missing)) => Ok(()),
        other => Err(format!("{other:?}")),
    }
}

fn library_permissions() -> Result<(), String> {
    let mut client = library()?;
    client.write("data/rig/shared", b"").map_err(text)?;
    let wanted = Perms::parse([&b"n0"[..], b"r5"].into_iter()).map_err(text)?;
    client.set_perms("data/rig/shared", &wanted).map_err(text)?;
    same("permissions", client.perms("data/rig/shared").map_err(text)?, wanted)
}

fn library_transaction() -> Result<(), String> {
    let (mut client, mut other) = (library()?, library()?);
    client.write("data/rig/count", b"0").map_err(text)?;
    let mut rounds = 0;
    client
        .transaction(|transaction| {
            rounds += 1;
            let count = transaction.read("data/rig/count")?;
            if rounds < 3 {
                other.write("data/rig/count", rounds.to_string().as_bytes())?;
            }
            transaction.write("data/rig/seen", &count)
        })
        .map_err(text)?;
    same("rounds", rounds, 3)?;
    same("seen", client.read("data/rig/seen").map_err(text)?, b"2".to_vec())
}

fn library_abort() -> Result<(), String> {
    let mut client = library()?;
    let failed: Result<(), _> = client.transaction(|transaction| {
        transaction.write("data/rig/half", b"x")?;
        Err(ClientError::ZeroByte)
    });
    same("failed", matches!(failed, Err(ClientError::ZeroByte)), true)?;
    same("exists", client.exists("data/rig/half").map_err(text)?, false)
}

fn library_watch() -> Result<(), String> {
    let (mut client, mut other) = (library()?, library()?);
    let event = |path: &str| WatchEvent { path: path.to_owned(), token: "mine".to_owned() };
    client.watch("data/rig/watched", "mine").map_err(text)?;
    same("first event", client.next_event().map_err(text)?, event("data/rig/watched"))?;
    other.write("data/rig/watched/below", b"1").map_err(text)?;
    same("event", client.next_event().map_err(text)?, event("data/rig/watched/below"))?;
    client.unwatch("data/rig/watched", "mine").map_err(text)?;
    other.write("data/rig/watched/below", b"2").map_err(text)?;
    client.read("data/rig/watched/below").map_err(text)?;
    same("event after the end", client.take_event(), None)
}

fn pvbus_transaction() -> Result<(), String> {
    let (mut client, mut other) = (guest()?, library()?);
    client.write(b"data/rig/count", b"0").map_err(text)?;
    let mut rounds = 0;
    client
        .transaction(|transaction| {
            rounds += 1;
            let count = transaction.read(b"data/rig/count")?;
            if rounds < 3 {
                other.write("data/rig/count", rounds.to_string().as_bytes()).map_err(|_| StoreError::Unsupported)?;
            }
            transaction.write(b"data/rig/seen", &count)
        })
        .map_err(text)?;
    same("rounds", rounds, 3)?;
    same("seen", client.read(b"data/rig/seen").map_err(text)?, b"2".to_vec())
}

fn pvbus_abort() -> Result<(), String> {
    let mut client = guest()?;
    let failed: Result<(), _> = client.transaction(|transaction| {
        transaction.write(b"data/rig/half", b"x")?;
        Err(StoreError::BadKey)
    });
    same("failed", failed, Err(StoreError::BadKey))?;
    same("half", client.read(b"data/rig/half"), Err(StoreError::NotFound))
}

fn pvbus_watch() -> Result<(), String> {
    let (mut client, mut other) = (guest()?, library()?);
    let mut watch = Store::watch(&mut client, b"data/rig/key").map_err(text)?;
    let mut change = |client: &mut GuestClient<xen::Device>, value: Option<&[u8]>| {
        match value {
            Some(value) => other.write("data/rig/key", value),
            None => other.remove("data/rig/key"),
        }
        .map_err(text)?;
        // The event may take a moment.
        for _ in 0..PATIENCE.as_millis() / 10 {
            if let Some(now) = client.changed(&mut watch).map_err(text)? {
                return same("value", now.as_deref(), value);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Err("the change was not told".to_owned())
    };
    change(&mut client, Some(b"1"))?;
    change(&mut client, Some(b"2"))?;
    change(&mut client, None)?;
    same("without a change", client.changed(&mut watch), Ok(None))?;
    Store::unwatch(&mut client, watch).map_err(text)
}

fn pvbus_long_directory() -> Result<(), String> {
    let mut client = guest()?;
    let name = |number: u32| format!("a-name-of-some-length-{number:03}");
    for number in 0..400 {
        client.write(format!("data/rig/many/{}", name(number)).as_bytes(), b"").map_err(text)?;
    }
    let mut names = client.list(b"data/rig/many").map_err(text)?;
    names.sort();
    same("names", names, (0..400).map(|number| name(number).into_bytes()).collect())
}
