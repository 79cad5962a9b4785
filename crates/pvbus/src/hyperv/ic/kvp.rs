//! Key/value pairs: the host reads and writes the [`pools`](super::pools), and asks for a network card's addresses.
//!
//! The verdict is the message's status, as with Linux. Of every pool keys are enumerated and read, in those that are the host's they are set and
//! removed; addresses are told, but not set.

use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;

use abi::hyperv::ic::{Version, kind, status, version};
use abi::hyperv::kvp::{Addresses, Enumerate, Header, Key, LONG_NUMBER, NUMBER, QWORD, Record, TEXT, family, operation};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::pools::{Pool, Pools, record};
use super::{Answer, Request, Service};
use crate::driver::Event;
use crate::store::StoreError;

/// The component.
pub(in super::super) struct Kvp {
    pools: Arc<Pools>,
}

impl Kvp {
    pub fn new(pools: &Arc<Pools>) -> Kvp {
        Kvp { pools: Arc::clone(pools) }
    }

    /// Does an operation; `None` when the body is not as long as that.
    fn carry_out(&self, body: &mut [u8]) -> Option<u32> {
        let (header, _) = Header::read_from_prefix(body).ok()?;
        let pool = Pool::numbered(header.pool);
        Some(match (header.operation, pool) {
            (operation::GET_IP_INFO, _) => self.addresses(Addresses::mut_from_prefix(body).ok()?.0),
            (operation::GET, Some(pool)) => {
                let record: &mut Record = rest(body)?;
                let key = text(&record.key, record.key_size.get());
                self.pools.get(pool, &key).map_or(status::NO_MORE_ITEMS, |value| fill(record, &key, &value))
            }
            (operation::ENUMERATE, Some(pool)) => {
                let enumerate: &mut Enumerate = rest(body)?;
                let found = self.pools.at(pool, usize::try_from(enumerate.index.get()).unwrap_or(usize::MAX));
                found.map_or(status::NO_MORE_ITEMS, |(key, value)| fill(&mut enumerate.record, &key, &value))
            }
            (operation::SET, Some(pool @ (Pool::External | Pool::Parameters))) => {
                let message: &mut Record = rest(body)?;
                let (key, value) = (text(&message.key, message.key_size.get()), value(message));
                verdict(record(key.as_bytes(), value.as_bytes()).and_then(|(key, value)| self.pools.set(pool, key, value)))
            }
            (operation::DELETE, Some(pool @ (Pool::External | Pool::Parameters))) => {
                let message: &mut Key = rest(body)?;
                match self.pools.remove(pool, &text(&message.key, message.key_size.get())) {
                    Err(StoreError::NotFound) => status::NO_MORE_ITEMS,
                    removed => verdict(removed),
                }
            }
            _ => status::NOT_SUPPORTED,
        })
    }

    /// What the kernel has told of the card that the host names.
    fn addresses(&self, message: &mut Addresses) -> u32 {
        let mac = text(message.adapter.as_bytes(), u32::MAX);
        let Some(nic) = self.pools.nic(&mac) else { return status::FAIL };
        let list = |texts: Vec<String>| texts.join(";");
        let addresses = list(nic.addresses.iter().map(|address| address.ip.to_string()).collect());
        let masks = list(nic.addresses.iter().map(|address| mask(address.ip, address.prefix)).collect());
        message.family = nic.addresses.iter().fold(0, |all, address| all | if address.ip.is_ipv4() { family::IPV4 } else { family::IPV6 });
        let done = [put(message.addresses.as_mut_bytes(), &addresses), put(message.masks.as_mut_bytes(), &masks)];
        if done == [true; 2] { status::OK } else { status::FAIL }
    }
}

impl Service for Kvp {
    const NAME: &'static str = "kvp";
    const KIND: u16 = kind::KVP;
    const VERSIONS: &'static [Version] = &version::KVP;

    fn answer(&mut self, request: Request<'_>, _events: &mut Vec<Event>) -> Answer {
        Answer::Now(self.carry_out(request.body).unwrap_or(status::FAIL))
    }
}

/// What follows the header.
fn rest<T: FromBytes + IntoBytes + Immutable + KnownLayout>(body: &mut [u8]) -> Option<&mut T> {
    T::mut_from_prefix(body.get_mut(size_of::<Header>()..)?).ok().map(|(value, _)| value)
}

fn verdict(done: Result<(), StoreError>) -> u32 {
    if done.is_ok() { status::OK } else { status::FAIL }
}

/// The text in a field, at most `size` bytes of it, and up to its terminating zero. What is no Unicode becomes U+FFFD.
fn text(field: &[u8], size: u32) -> String {
    let size = usize::try_from(size).unwrap_or(usize::MAX).min(field.len());
    let (units, _) = field.get(..size).unwrap_or_default().as_chunks();
    let units: Vec<u16> = units.iter().map(|unit| u16::from_le_bytes(*unit)).take_while(|unit| *unit != 0).collect();
    String::from_utf16_lossy(&units)
}

/// A value as text: numbers in decimal, as OpenBSD shows them.
fn value(record: &Record) -> String {
    let [a, b, c, d, e, f, g, h, ..] = record.value;
    match record.value_type.get() {
        NUMBER => u32::from_le_bytes([a, b, c, d]).to_string(),
        LONG_NUMBER | QWORD => u64::from_le_bytes([a, b, c, d, e, f, g, h]).to_string(),
        _ => text(&record.value, record.value_size.get()),
    }
}

/// Fills a record with texts that were checked when they came.
fn fill(message: &mut Record, key: &str, value: &str) -> u32 {
    let bytes = |text: &str| u32::try_from((text.encode_utf16().count() + 1) * 2).unwrap_or_default();
    (message.value_type, message.key_size, message.value_size) = (TEXT.into(), bytes(key).into(), bytes(value).into());
    if put(&mut message.key, key) && put(&mut message.value, value) { status::OK } else { status::FAIL }
}

/// Puts a text with its terminating zero into a field, and zeros behind it; `false` when it does not fit.
fn put(field: &mut [u8], text: &str) -> bool {
    let mut units = text.encode_utf16();
    field.fill(0);
    let (letters, _) = field.as_chunks_mut();
    let Some((_, letters)) = letters.split_last_mut() else { return false };
    letters.iter_mut().zip(&mut units).for_each(|(letter, unit)| *letter = unit.to_le_bytes());
    units.next().is_none()
}

/// A network's mask: IPv4's with dots, IPv6's as a length.
fn mask(ip: core::net::IpAddr, prefix: u8) -> String {
    match ip {
        core::net::IpAddr::V4(_) => {
            let bits = u32::MAX.checked_shl(32_u32.saturating_sub(prefix.into())).unwrap_or(0);
            core::net::Ipv4Addr::from_bits(bits).to_string()
        }
        core::net::IpAddr::V6(_) => alloc::format!("/{prefix}"),
    }
}
