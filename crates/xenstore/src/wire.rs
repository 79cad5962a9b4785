//! Requests as they are on the wire, parsed strictly: the right number of strings, each with its zero byte, numbers that are numbers.
//!
//! Source: xen-project/xen `docs/misc/xenstore.txt`. C xenstored lets some of what is refused here pass (`atoi` of anything, missing final zero
//! bytes); no known client depends on that, except that SET_PERMS may lack its last zero byte.

use abi::xen::xenstore::{HEADER_SIZE, Header, PAYLOAD_MAX, op};
use zerocopy::FromBytes;

use crate::domain::Ring;
use crate::domid::{DomId, decimal};
use crate::error::Error;
use crate::perms::Perms;
use crate::quota::Quota;

/// A request. Paths are as the client wrote them.
#[derive(Debug, PartialEq, Eq)]
pub enum Request<'a> {
    /// A command and its arguments.
    Control(Vec<&'a [u8]>),
    /// Path.
    Directory(&'a [u8]),
    /// Path, and where in the list of names the reply begins.
    DirectoryPart(&'a [u8], usize),
    /// Path.
    Read(&'a [u8]),
    /// Path and value.
    Write(&'a [u8], &'a [u8]),
    /// Path.
    Mkdir(&'a [u8]),
    /// Path.
    Remove(&'a [u8]),
    /// Path.
    GetPerms(&'a [u8]),
    /// Path and permissions.
    SetPerms(&'a [u8], Perms),
    /// Path, token and depth.
    Watch(&'a [u8], &'a [u8], Option<u32>),
    /// Path and token.
    Unwatch(&'a [u8], &'a [u8]),
    /// Drops watches and transactions.
    ResetWatches,
    /// Begins a transaction.
    TransactionStart,
    /// Ends the header's transaction: commits, or not.
    TransactionEnd(bool),
    /// Domain and its ring.
    Introduce(DomId, Ring),
    /// Domain.
    Release(DomId),
    /// Domain.
    GetDomainPath(DomId),
    /// Domain.
    IsDomainIntroduced(DomId),
    /// Domain.
    Resume(DomId),
    /// Domain and its target.
    SetTarget(DomId, DomId),
    /// Another domain's features, or the caller's.
    GetFeature(Option<DomId>),
    /// Domain and features.
    SetFeature(DomId, u32),
    /// A domain's quota or the default, or without a quota the names of all.
    GetQuota(Option<DomId>, Option<Quota>),
    /// A domain's quota or the default, and the limit.
    SetQuota(Option<DomId>, Quota, u32),
}

impl<'a> Request<'a> {
    /// Parses the payload of operation `number`.
    ///
    /// # Errors
    /// [`Error::NoOperation`], [`Error::BadRequest`].
    pub fn parse(number: u32, payload: &'a [u8]) -> Result<Request<'a>, Error> {
        let request = match number {
            op::CONTROL => Request::Control(strings(payload)?.collect()),
            op::DIRECTORY => Request::Directory(one(payload)?),
            op::READ => Request::Read(one(payload)?),
            op::GET_PERMS => Request::GetPerms(one(payload)?),
            op::WATCH => match exactly(payload) {
                Ok([path, token]) => Request::Watch(path, token, None),
                _ => {
                    let [path, token, depth] = exactly(payload)?;
                    Request::Watch(path, token, Some(number_of(depth)?))
                }
            },
            op::UNWATCH => {
                let [path, token] = exactly(payload)?;
                Request::Unwatch(path, token)
            }
            op::TRANSACTION_START => nothing(payload, Request::TransactionStart)?,
            op::TRANSACTION_END => match payload {
                b"T\0" => Request::TransactionEnd(true),
                b"F\0" => Request::TransactionEnd(false),
                _ => return Err(Error::BadRequest),
            },
            op::INTRODUCE => {
                let [domain, gfn, port] = exactly(payload)?;
                Request::Introduce(domain_of(domain)?, Ring { gfn: gfn_of(gfn)?, port: number_of(port)? })
            }
            op::RELEASE => Request::Release(domain_of(one(payload)?)?),
            op::GET_DOMAIN_PATH => Request::GetDomainPath(domain_of(one(payload)?)?),
            op::WRITE => {
                let (path, value) = split(payload).ok_or(Error::BadRequest)?;
                Request::Write(path, value)
            }
            op::MKDIR => Request::Mkdir(one(payload)?),
            op::RM => Request::Remove(one(payload)?),
            op::SET_PERMS => {
                let (path, perms) = split(payload).ok_or(Error::BadRequest)?;
                let perms = perms.strip_suffix(b"\0").unwrap_or(perms);
                Request::SetPerms(path, Perms::parse(perms.split(|byte| *byte == 0))?)
            }
            op::IS_DOMAIN_INTRODUCED => Request::IsDomainIntroduced(domain_of(one(payload)?)?),
            op::RESUME => Request::Resume(domain_of(one(payload)?)?),
            op::SET_TARGET => {
                let [domain, target] = exactly(payload)?;
                Request::SetTarget(domain_of(domain)?, domain_of(target)?)
            }
            op::RESET_WATCHES => nothing(payload, Request::ResetWatches)?,
            op::DIRECTORY_PART => {
                let [path, offset] = exactly(payload)?;
                Request::DirectoryPart(path, number_of(offset)?)
            }
            op::GET_FEATURE => match nothing(payload, Request::GetFeature(None)) {
                Ok(own) => own,
                Err(_) => Request::GetFeature(Some(domain_of(one(payload)?)?)),
            },
            op::SET_FEATURE => {
                let [domain, features] = exactly(payload)?;
                Request::SetFeature(domain_of(domain)?, number_of(features)?)
            }
            op::GET_QUOTA => match (nothing(payload, ()), exactly(payload), exactly(payload)) {
                (Ok(()), _, _) => Request::GetQuota(None, None),
                (_, Ok([quota]), _) => Request::GetQuota(None, Some(quota_of(quota)?)),
                (_, _, Ok([domain, quota])) => Request::GetQuota(Some(domain_of(domain)?), Some(quota_of(quota)?)),
                _ => return Err(Error::BadRequest),
            },
            op::SET_QUOTA => match (exactly(payload), exactly(payload)) {
                (Ok([quota, limit]), _) => Request::SetQuota(None, quota_of(quota)?, number_of(limit)?),
                (_, Ok([domain, quota, limit])) => Request::SetQuota(Some(domain_of(domain)?), quota_of(quota)?, number_of(limit)?),
                _ => return Err(Error::BadRequest),
            },
            _ => return Err(Error::NoOperation),
        };
        Ok(request)
    }
}

/// Whether operation `number` is for privileged clients only.
pub fn is_privileged(number: u32) -> bool {
    matches!(
        number,
        op::CONTROL
            | op::INTRODUCE
            | op::RELEASE
            | op::IS_DOMAIN_INTRODUCED
            | op::RESUME
            | op::SET_TARGET
            | op::SET_FEATURE
            | op::GET_QUOTA
            | op::SET_QUOTA
    )
}

/// Whether operation `number` has nothing to do with the transaction in its header.
pub fn ignores_transaction(number: u32) -> bool {
    matches!(number, op::WATCH | op::UNWATCH)
}

/// What the next bytes of a connection are.
#[derive(Debug, PartialEq, Eq)]
pub enum Next<'a> {
    /// Not a whole message yet.
    Incomplete,
    /// A message that no client may send: it is longer than a message can be.
    Broken,
    /// A message, and what follows it.
    Message(Header, &'a [u8], &'a [u8]),
}

/// Cuts the next message off `bytes`.
pub fn next(bytes: &[u8]) -> Next<'_> {
    let Ok((header, rest)) = Header::read_from_prefix(bytes) else { return Next::Incomplete };
    let length = header.len.get() as usize;
    if length > PAYLOAD_MAX {
        return Next::Broken;
    }
    match rest.split_at_checked(length) {
        Some((payload, rest)) => Next::Message(header, payload, rest),
        None => Next::Incomplete,
    }
}

/// Bytes of the longest message.
pub const MESSAGE_MAX: usize = HEADER_SIZE + PAYLOAD_MAX;

/// What stands before the first zero byte, and what behind it.
fn split(payload: &[u8]) -> Option<(&[u8], &[u8])> {
    let end = payload.iter().position(|byte| *byte == 0)?;
    Some((payload.get(..end)?, payload.get(end + 1..)?))
}

/// All strings of a payload, each with its zero byte.
fn strings(payload: &[u8]) -> Result<impl Iterator<Item = &[u8]>, Error> {
    match payload.strip_suffix(b"\0") {
        Some(strings) => Ok(strings.split(|byte| *byte == 0)),
        None => Err(Error::BadRequest),
    }
}

fn exactly<const N: usize>(payload: &[u8]) -> Result<[&[u8]; N], Error> {
    let mut found: [&[u8]; N] = [&[]; N];
    let mut strings = strings(payload)?;
    for place in &mut found {
        *place = strings.next().ok_or(Error::BadRequest)?;
    }
    if strings.next().is_none() { Ok(found) } else { Err(Error::BadRequest) }
}

fn one(payload: &[u8]) -> Result<&[u8], Error> {
    exactly(payload).map(|[only]| only)
}

/// No payload, or the empty string that client libraries send instead.
fn nothing<T>(payload: &[u8], request: T) -> Result<T, Error> {
    if matches!(payload, [] | [0]) { Ok(request) } else { Err(Error::BadRequest) }
}

fn domain_of(text: &[u8]) -> Result<DomId, Error> {
    DomId::parse(text).ok_or(Error::BadRequest)
}

fn number_of<T: std::str::FromStr>(text: &[u8]) -> Result<T, Error> {
    decimal(text).ok_or(Error::BadRequest)
}

/// Frame numbers are signed on the wire; what is beyond 63 bits comes as a negative number.
fn gfn_of(text: &[u8]) -> Result<u64, Error> {
    match text.strip_prefix(b"-") {
        Some(digits) => number_of::<i64>(digits).map(|number| number.wrapping_neg().cast_unsigned()),
        None => number_of(text),
    }
}

fn quota_of(name: &[u8]) -> Result<Quota, Error> {
    Quota::of_name(name).ok_or(Error::BadRequest)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn strings_are_counted_strictly() {
        assert_eq!(Request::parse(op::READ, b"/a\0"), Ok(Request::Read(b"/a")));
        for bad in [&b""[..], b"/a", b"/a\0\0", b"/a\0b\0", b"/a\0b"] {
            assert_eq!(Request::parse(op::READ, bad), Err(Error::BadRequest), "{bad:?}");
        }
        assert_eq!(Request::parse(op::WATCH, b"a\0t\0"), Ok(Request::Watch(b"a", b"t", None)));
        assert_eq!(Request::parse(op::WATCH, b"a\0\0"), Ok(Request::Watch(b"a", b"", None)));
        assert_eq!(Request::parse(op::WATCH, b"a\0t\x003\0"), Ok(Request::Watch(b"a", b"t", Some(3))));
        for bad in [&b"a\0"[..], b"a\0t", b"a\0t\0-1\0", b"a\0t\0x\0", b"a\0t\0\0", b"a\0t\x001\x002\0"] {
            assert_eq!(Request::parse(op::WATCH, bad), Err(Error::BadRequest), "{bad:?}");
        }
    }

    #[test]
    fn values_hold_anything_and_set_perms_may_lack_its_last_zero() {
        assert_eq!(Request::parse(op::WRITE, b"/a\0x\0y\0"), Ok(Request::Write(b"/a", b"x\0y\0")));
        assert_eq!(Request::parse(op::WRITE, b"/a\0"), Ok(Request::Write(b"/a", b"")));
        assert_eq!(Request::parse(op::WRITE, b"/a"), Err(Error::BadRequest));
        let perms = Perms::parse([&b"n1"[..], b"r2"].into_iter()).unwrap();
        assert_eq!(Request::parse(op::SET_PERMS, b"/a\0n1\0r2\0"), Ok(Request::SetPerms(b"/a", perms.clone())));
        assert_eq!(Request::parse(op::SET_PERMS, b"/a\0n1\0r2"), Ok(Request::SetPerms(b"/a", perms)));
        assert_eq!(Request::parse(op::SET_PERMS, b"/a\0"), Err(Error::BadRequest));
        assert_eq!(Request::parse(op::SET_PERMS, b"/a\0n1\0\0"), Err(Error::BadRequest));
    }

    #[test]
    fn frame_numbers_may_be_negative() {
        let ring = |gfn| Ok(Request::Introduce(DomId(1), Ring { gfn, port: 2 }));
        assert_eq!(Request::parse(op::INTRODUCE, b"1\x00100\x002\0"), ring(100));
        assert_eq!(Request::parse(op::INTRODUCE, b"1\0-1\x002\0"), ring(u64::MAX));
        assert_eq!(Request::parse(op::INTRODUCE, b"1\x00100\0"), Err(Error::BadRequest));
        assert_eq!(Request::parse(op::INTRODUCE, b"1\x00100\0-2\0"), Err(Error::BadRequest));
    }

    #[test]
    fn quotas_and_features_take_fewer_arguments() {
        assert_eq!(Request::parse(op::GET_QUOTA, b"\0"), Ok(Request::GetQuota(None, None)));
        assert_eq!(Request::parse(op::GET_QUOTA, b""), Ok(Request::GetQuota(None, None)));
        assert_eq!(Request::parse(op::GET_QUOTA, b"nodes\0"), Ok(Request::GetQuota(None, Some(Quota::Nodes))));
        assert_eq!(Request::parse(op::GET_QUOTA, b"3\0nodes\0"), Ok(Request::GetQuota(Some(DomId(3)), Some(Quota::Nodes))));
        assert_eq!(Request::parse(op::SET_QUOTA, b"nodes\x005\0"), Ok(Request::SetQuota(None, Quota::Nodes, 5)));
        assert_eq!(Request::parse(op::SET_QUOTA, b"3\0nodes\x005\0"), Ok(Request::SetQuota(Some(DomId(3)), Quota::Nodes, 5)));
        assert_eq!(Request::parse(op::SET_QUOTA, b"nodes\0-1\0"), Err(Error::BadRequest));
        assert_eq!(Request::parse(op::GET_FEATURE, b"\0"), Ok(Request::GetFeature(None)));
        assert_eq!(Request::parse(op::GET_FEATURE, b"3\0"), Ok(Request::GetFeature(Some(DomId(3)))));
    }

    #[test]
    fn what_is_no_request_is_not_implemented() {
        for number in [op::WATCH_EVENT, op::ERROR, 20, 27, 0xffff, u32::MAX] {
            assert_eq!(Request::parse(number, b"\0"), Err(Error::NoOperation), "{number}");
        }
    }

    proptest! {
        #[test]
        fn any_payload_is_a_request_or_an_error(number in 0u32..30, payload in prop::collection::vec(prop_oneof![Just(0u8), Just(b'/'), Just(b'1'), any::<u8>()], 0..40)) {
            let _ = Request::parse(number, &payload);
        }

        #[test]
        fn any_bytes_are_a_message_or_not(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            if let Next::Message(header, payload, rest) = next(&bytes) {
                prop_assert_eq!(HEADER_SIZE + payload.len() + rest.len(), bytes.len());
                prop_assert_eq!(header.len.get() as usize, payload.len());
            }
        }
    }
}
