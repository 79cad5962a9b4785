//! `guestinfo` keys as paths of the store: `guestinfo.a.b` is `vm-data/a/b`.
//!
//! A key is parts between dots. In paths only letters, digits, `-` and `_` stand for themselves (XenStore: `docs/misc/xenstore.txt`); any other
//! byte of a part is written as `@` and two hexadecimal digits, and a part without bytes as `@` alone. So each key has one path, and
//! [`key`] takes back what [`path`] made.
//!
//! VMware compares keys without regard to case, and clients rely on it (cloud-init asks for `guestinfo.ovfEnv`, Ignition for
//! `guestinfo.ovfenv`). The store does regard case: a key keeps the letters of whoever wrote it first, and is found by any.

use abi::vmware::rpc::GUESTINFO;

use crate::store::{Client, Store, StoreError, VM_DATA};

/// Begins what stands for a byte that paths cannot have.
const ESCAPE: char = '@';
const DIGITS: &[u8; 16] = b"0123456789abcdef";

/// The path of a key; `None` when it does not begin with `guestinfo.`.
pub fn path(key: &str) -> Option<String> {
    let (prefix, rest) = key.split_at_checked(GUESTINFO.len())?;
    if !prefix.eq_ignore_ascii_case(GUESTINFO) {
        return None;
    }
    let mut path = VM_DATA.to_owned();
    for part in rest.split('.') {
        path.push('/');
        if part.is_empty() {
            path.push(ESCAPE);
        }
        for byte in part.bytes() {
            if stands_for_itself(byte) {
                path.push(char::from(byte));
            } else {
                path.extend([ESCAPE, digit(byte >> 4), digit(byte & 15)]);
            }
        }
    }
    Some(path)
}

/// The key of a path; `None` when no key has it.
pub fn key(path: &str) -> Option<String> {
    let rest = path.strip_prefix(VM_DATA)?.strip_prefix('/')?;
    let parts: Option<Vec<String>> = rest.split('/').map(unescape).collect();
    Some(format!("{GUESTINFO}{}", parts?.join(".")))
}

/// A part of a key from a part of a path. Escapes that [`path`] would not have made are no escapes.
fn unescape(part: &str) -> Option<String> {
    if part.is_empty() {
        return None;
    }
    if part.chars().eq([ESCAPE]) {
        return Some(String::new());
    }
    let mut bytes = Vec::with_capacity(part.len());
    let mut rest = part.bytes();
    while let Some(byte) = rest.next() {
        if stands_for_itself(byte) {
            bytes.push(byte);
            continue;
        }
        let escaped = value(rest.next()?)? << 4 | value(rest.next()?)?;
        if byte != ESCAPE as u8 || stands_for_itself(escaped) || escaped == b'.' {
            return None;
        }
        bytes.push(escaped);
    }
    String::from_utf8(bytes).ok()
}

fn stands_for_itself(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_'
}

fn digit(nibble: u8) -> char {
    char::from(DIGITS[usize::from(nibble & 15)])
}

fn value(digit: u8) -> Option<u8> {
    DIGITS.iter().position(|d| *d == digit).map(|value| value as u8)
}

/// The value of a key as the guest sees it. A key without bytes has no value: nodes above others are such.
pub(super) fn get(store: &dyn Store, key: &str) -> Option<Vec<u8>> {
    find(store, &path(key)?).map(|(_, value)| value)
}

/// Sets a key for the guest.
pub(super) fn set(store: &dyn Store, key: &str, value: &[u8]) -> Result<(), StoreError> {
    let path = path(key).ok_or_else(|| StoreError::BadPath(key.into()))?;
    let there = find(store, &path).map_or(path, |(there, _)| there);
    store.write(Client::Guest, &there, value)
}

/// The node with a value at `path`, or else one whose path differs from it only by case.
fn find(store: &dyn Store, path: &str) -> Option<(String, Vec<u8>)> {
    let value_at = |path: &str| store.read(Client::Guest, path).ok().filter(|value| !value.is_empty());
    if let Some(value) = value_at(path) {
        return Some((path.into(), value));
    }
    let parts: Vec<&str> = path.strip_prefix(VM_DATA)?.strip_prefix('/')?.split('/').collect();
    // Each node is visited at most once, so this ends however the guest has laid out its keys.
    let mut candidates = vec![(VM_DATA.to_owned(), 0)];
    while let Some((candidate, depth)) = candidates.pop() {
        match parts.get(depth) {
            Some(part) => {
                let names = store.list(Client::Guest, &candidate).unwrap_or_default();
                let alike = names.into_iter().filter(|name| name.eq_ignore_ascii_case(part));
                candidates.extend(alike.map(|name| (format!("{candidate}/{name}"), depth + 1)));
            }
            None => {
                if let Some(value) = value_at(&candidate) {
                    return Some((candidate, value));
                }
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::store::testing::MapStore;

    #[test]
    fn dots_become_slashes() {
        assert_eq!(path("guestinfo.userdata").unwrap(), "vm-data/userdata");
        assert_eq!(path("guestinfo.ignition.config.data.encoding").unwrap(), "vm-data/ignition/config/data/encoding");
        assert_eq!(path("GuestInfo.ovfEnv").unwrap(), "vm-data/ovfEnv");
    }

    #[test]
    fn what_paths_cannot_have_is_escaped() {
        assert_eq!(path("guestinfo.a b/c@d").unwrap(), "vm-data/a@20b@2fc@40d");
        assert_eq!(path("guestinfo.").unwrap(), "vm-data/@");
        assert_eq!(path("guestinfo..ü").unwrap(), "vm-data/@/@c3@bc");
        assert_eq!(key("vm-data/a@20b@2fc@40d/@").unwrap(), "guestinfo.a b/c@d.");
    }

    #[test]
    fn what_is_no_key_has_no_path() {
        for key in ["", "guestinfo", "guestinf.a", "machine.id", "ünicode key"] {
            assert_eq!(path(key), None, "{key}");
        }
        for path in [
            "",
            "vm-data",
            "vm-datax/a",
            "data/a",
            "vm-data/a//b",
            "vm-data/",
            "vm-data/@2",
            "vm-data/@2F",
            "vm-data/@61",
            "vm-data/@2e",
            "vm-data/@ff",
            "vm-data/a.b",
        ] {
            assert_eq!(key(path), None, "{path}");
        }
    }

    #[test]
    fn case_of_a_key_does_not_matter() {
        let store = MapStore::default();
        store.write(Client::Host, "vm-data/ovfEnv", b"<Environment/>").unwrap();
        assert_eq!(get(&store, "guestinfo.ovfenv").unwrap(), b"<Environment/>");
        set(&store, "guestinfo.OVFENV", b"new").unwrap();
        assert_eq!(store.read(Client::Host, "vm-data/ovfEnv").unwrap(), b"new");
        assert_eq!(store.list(Client::Host, "vm-data").unwrap(), ["ovfEnv"]);
    }

    #[test]
    fn key_below_a_parent_of_other_case_is_found() {
        let store = MapStore::default();
        store.write(Client::Host, "vm-data/A/x", b"of A").unwrap();
        store.write(Client::Host, "vm-data/a/Y", b"of a").unwrap();
        assert_eq!(get(&store, "guestinfo.a.x").unwrap(), b"of A");
        assert_eq!(get(&store, "guestinfo.A.y").unwrap(), b"of a");
        assert_eq!(get(&store, "guestinfo.a.z"), None);
    }

    #[test]
    fn parent_of_a_key_has_no_value() {
        let store = MapStore::default();
        set(&store, "guestinfo.a.b", b"1").unwrap();
        assert_eq!(get(&store, "guestinfo.a"), None);
        set(&store, "guestinfo.a", b"2").unwrap();
        assert_eq!((get(&store, "guestinfo.a").unwrap(), get(&store, "guestinfo.a.b").unwrap()), (b"2".to_vec(), b"1".to_vec()));
    }

    proptest! {
        #[test]
        fn every_key_has_a_path_of_its_own(rest in "\\PC{0,20}|[a-c.@/ ]{0,12}") {
            let whole = format!("guestinfo.{rest}");
            let path = path(&whole).unwrap();
            prop_assert!(path.split('/').all(|part| !part.is_empty() && part.bytes().all(|b| stands_for_itself(b) || b == b'@')));
            prop_assert_eq!(key(&path), Some(whole));
        }

        #[test]
        fn every_path_of_a_key_comes_back(rest in "[a-c@/0-9f]{0,12}") {
            let whole = format!("vm-data/{rest}");
            if let Some(key) = key(&whole) {
                prop_assert_eq!(path(&key), Some(whole));
            }
        }
    }
}
