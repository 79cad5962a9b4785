//! Key/value pairs as OpenBSD's hyperv(4) names them: `Pool/key`, divided at the last slash, the pool's name in any case.
//!
//! | pool | who writes |
//! |---|---|
//! | `External` | the host |
//! | `Guest` | this machine |
//! | `Auto` | this machine: what the kernel tells of it; other keys are not added |
//! | `Guest/Parameters` | the host, about itself |
//!
//! Unlike OpenBSD's, keys and values are Unicode of the protocol's lengths, keys of the Guest pool are replaced and removed, what the kernel tells is
//! told anew when it changes, and a list is not made by writing.

use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::net::IpAddr;

use abi::hyperv::kvp::{self, KEY_SIZE, VALUE_SIZE};
use spin::Mutex;

use crate::detect::Kind;
use crate::driver::GuestInfo;
use crate::net::Nic;
use crate::store::{Store, StoreError};

/// Most keys of a pool.
const MAX_KEYS: usize = 1024;

/// A pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pool {
    /// The host's keys for this machine.
    External,
    /// This machine's keys for the host.
    Guest,
    /// What the kernel tells of this machine.
    Auto,
    /// What the host tells of itself.
    Parameters,
}

impl Pool {
    /// All pools, by their numbers.
    pub const ALL: [Pool; 4] = [Pool::External, Pool::Guest, Pool::Auto, Pool::Parameters];

    /// Its name (OpenBSD `sys/dev/pv/hypervic.c`).
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Pool::External => "External",
            Pool::Guest => "Guest",
            Pool::Auto => "Auto",
            Pool::Parameters => "Guest/Parameters",
        }
    }

    /// Its number in messages.
    #[must_use]
    pub const fn number(self) -> u8 {
        match self {
            Pool::External => kvp::pool::EXTERNAL,
            Pool::Guest => kvp::pool::GUEST,
            Pool::Auto => kvp::pool::AUTO,
            Pool::Parameters => kvp::pool::AUTO_EXTERNAL,
        }
    }

    /// The pool of a name.
    ///
    /// # Errors
    /// [`StoreError::BadKey`].
    pub fn named(name: &[u8]) -> Result<Pool, StoreError> {
        Pool::ALL.into_iter().find(|pool| pool.name().as_bytes().eq_ignore_ascii_case(name)).ok_or(StoreError::BadKey)
    }

    /// The pool of a number.
    pub(super) fn numbered(number: u8) -> Option<Pool> {
        Pool::ALL.into_iter().find(|pool| pool.number() == number)
    }
}

/// Pool and key of `Pool/key`.
///
/// # Errors
/// [`StoreError::BadKey`].
pub fn split(key: &[u8]) -> Result<(Pool, &[u8]), StoreError> {
    let slash = key.iter().rposition(|&byte| byte == b'/').ok_or(StoreError::BadKey)?;
    let (pool, name) = key.split_at_checked(slash).ok_or(StoreError::BadKey)?;
    Ok((Pool::named(pool)?, name.strip_prefix(b"/").unwrap_or(name)))
}

/// The pool of a key that lists its keys: `Pool` or `Pool/`.
///
/// # Errors
/// [`StoreError::BadKey`].
pub fn directory(key: &[u8]) -> Result<Pool, StoreError> {
    Pool::named(key.strip_suffix(b"/").unwrap_or(key))
}

/// A key and its value as text that messages hold: UTF-16 with a terminating zero, in fields of [`KEY_SIZE`] and [`VALUE_SIZE`] bytes.
///
/// # Errors
/// [`StoreError::BadKey`], [`StoreError::TooLong`].
pub fn record<'a>(key: &'a [u8], value: &'a [u8]) -> Result<(&'a str, &'a str), StoreError> {
    let text = |field, size| {
        let text = core::str::from_utf8(field).ok().filter(|text| !text.contains('\0')).ok_or(StoreError::BadKey)?;
        if text.encode_utf16().count() < size / 2 { Ok(text) } else { Err(StoreError::TooLong) }
    };
    let key = text(key, KEY_SIZE)?;
    if key.is_empty() { Err(StoreError::BadKey) } else { Ok((key, text(value, VALUE_SIZE)?)) }
}

/// The pools of this machine, in the order in which their keys came.
#[derive(Default)]
pub(in super::super) struct Pools(Mutex<Content>);

#[derive(Default)]
struct Content {
    pools: [Vec<(String, String)>; Pool::ALL.len()],
    /// What the kernel has told last.
    told: Vec<(&'static str, String)>,
    nics: Vec<Nic>,
}

impl Content {
    fn pool(&mut self, pool: Pool) -> &mut Vec<(String, String)> {
        let [external, guest, auto, parameters] = &mut self.pools;
        match pool {
            Pool::External => external,
            Pool::Guest => guest,
            Pool::Auto => auto,
            Pool::Parameters => parameters,
        }
    }

    fn set(&mut self, pool: Pool, key: &str, value: &str) -> Result<(), StoreError> {
        let records = self.pool(pool);
        if let Some(record) = records.iter_mut().find(|record| record.0 == key) {
            record.1 = value.to_string();
        } else if records.len() < MAX_KEYS {
            records.push((key.to_string(), value.to_string()));
        } else {
            return Err(StoreError::Full);
        }
        Ok(())
    }

    fn remove(&mut self, pool: Pool, key: &[u8]) -> Result<(), StoreError> {
        let records = self.pool(pool);
        let at = records.iter().position(|record| record.0.as_bytes() == key).ok_or(StoreError::NotFound)?;
        records.remove(at);
        Ok(())
    }

    fn get(&mut self, pool: Pool, key: &[u8]) -> Option<&str> {
        self.pool(pool).iter().find(|record| record.0.as_bytes() == key).map(|record| record.1.as_str())
    }
}

impl Pools {
    /// Makes `value` the value of `key`; for the host, which may do so in every pool.
    pub fn set(&self, pool: Pool, key: &str, value: &str) -> Result<(), StoreError> {
        self.0.lock().set(pool, key, value)
    }

    /// Removes a key.
    pub fn remove(&self, pool: Pool, key: &str) -> Result<(), StoreError> {
        self.0.lock().remove(pool, key.as_bytes())
    }

    /// The value of a key.
    pub fn get(&self, pool: Pool, key: &str) -> Option<String> {
        self.0.lock().get(pool, key.as_bytes()).map(ToString::to_string)
    }

    /// The key with a number, and its value.
    pub fn at(&self, pool: Pool, index: usize) -> Option<(String, String)> {
        self.0.lock().pool(pool).get(index).cloned()
    }

    /// The card with a MAC address, as it was told last.
    pub fn nic(&self, mac: &str) -> Option<Nic> {
        self.0.lock().nics.iter().find(|nic| nic.mac_text().eq_ignore_ascii_case(mac)).cloned()
    }

    /// Takes what the kernel tells. A key that says the same as before keeps what somebody has written there meanwhile.
    pub fn tell(&self, guest: &GuestInfo) {
        let now = auto(guest);
        let mut content = self.0.lock();
        let before = core::mem::replace(&mut content.told, now.clone());
        for (key, value) in now.iter().filter(|record| !before.contains(record)) {
            // There are few, and the pool has room for them first.
            let _ = content.set(Pool::Auto, key, value);
        }
        content.nics.clone_from(&guest.nics);
    }
}

/// What hosts expect of the Auto pool, as far as the kernel knows it (Linux `tools/hv/hv_kvp_daemon.c`; OpenBSD `sys/dev/pv/hypervic.c`).
fn auto(guest: &GuestInfo) -> Vec<(&'static str, String)> {
    /// `PROCESSOR_ARCHITECTURE_AMD64` of Windows, as OpenBSD says it.
    const AMD64: &str = "9";
    let addresses = |wanted: fn(&IpAddr) -> bool| {
        let all = guest.nics.iter().flat_map(|nic| &nic.addresses).map(|address| address.ip);
        all.filter(wanted).map(|ip| ip.to_string()).collect::<Vec<_>>().join(";")
    };
    let mut version = guest.os_version.split('.');
    let mut next_number = || version.next().unwrap_or_default().to_string();
    [
        ("FullyQualifiedDomainName", guest.hostname.clone()),
        ("IntegrationServicesVersion", env!("CARGO_PKG_VERSION").to_string()),
        ("NetworkAddressIPv4", addresses(IpAddr::is_ipv4)),
        ("NetworkAddressIPv6", addresses(IpAddr::is_ipv6)),
        ("OSBuildNumber", guest.os_version.clone()),
        ("OSName", guest.os_name_full.clone()),
        ("OSMajorVersion", next_number()),
        ("OSMinorVersion", next_number()),
        ("OSVersion", guest.os_version.clone()),
        ("ProcessorArchitecture", AMD64.to_string()),
    ]
    .map(|(key, value)| (key, fitting(value)))
    .into()
}

/// As much of a text as a value holds.
fn fitting(mut text: String) -> String {
    while text.encode_utf16().count() >= VALUE_SIZE / 2 {
        text.pop();
    }
    text
}

/// The pools as an information store.
pub struct KvpStore(Arc<Pools>);

impl KvpStore {
    pub(in super::super) fn new(pools: &Arc<Pools>) -> KvpStore {
        KvpStore(Arc::clone(pools))
    }
}

impl Store for KvpStore {
    fn kind(&self) -> Kind {
        Kind::HyperV
    }

    fn read(&mut self, key: &[u8]) -> Result<Vec<u8>, StoreError> {
        let (pool, name) = split(key)?;
        self.0.0.lock().get(pool, name).map(|value| value.as_bytes().to_vec()).ok_or(StoreError::NotFound)
    }

    fn read_or_list(&mut self, key: &[u8]) -> Result<Vec<u8>, StoreError> {
        match split(key)? {
            (_, b"") => Ok(self.list(key)?.join(&b'\n')),
            _ => self.read(key),
        }
    }

    fn write(&mut self, key: &[u8], value: &[u8]) -> Result<(), StoreError> {
        let (pool, name) = split(key)?;
        let (name, value) = record(name, value)?;
        let mut content = self.0.0.lock();
        match pool {
            Pool::Guest => content.set(pool, name, value),
            Pool::Auto if content.get(pool, name.as_bytes()).is_some() => content.set(pool, name, value),
            Pool::Auto => Err(StoreError::NotFound),
            Pool::External | Pool::Parameters => Err(StoreError::Denied),
        }
    }

    fn list(&mut self, key: &[u8]) -> Result<Vec<Vec<u8>>, StoreError> {
        if key.is_empty() {
            return Ok(Pool::ALL.map(|pool| pool.name().into()).to_vec());
        }
        let mut content = self.0.0.lock();
        Ok(content.pool(directory(key)?).iter().map(|record| record.0.clone().into_bytes()).collect())
    }

    fn remove(&mut self, key: &[u8]) -> Result<(), StoreError> {
        match split(key)? {
            (_, b"") => Err(StoreError::BadKey),
            (Pool::Guest, name) => self.0.0.lock().remove(Pool::Guest, name),
            _ => Err(StoreError::Denied),
        }
    }
}
