//! Requests as bytes, and answers from bytes. Texts are UTF-16 with a terminating zero.

use abi::hyperv::ic::status;
use abi::hyperv::kvp::{BODY_BYTES, Enumerate, Header, KEY_SIZE, Key, NUMBER, Record, TEXT, VALUE_SIZE, operation};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

/// Bit of a status: it is none of success.
const FAILED: u32 = 1 << 31;

/// What the guest is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Request {
    Set { pool: u8, key: String, value: String },
    Delete { pool: u8, key: String },
    Enumerate { pool: u8, index: u32 },
}

impl Request {
    /// The body of the message.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let (operation, pool, rest) = match self {
            Request::Set { pool, key, value } => (operation::SET, *pool, record(key, value).as_bytes().to_vec()),
            Request::Delete { pool, key } => {
                let mut body = Key { key_size: 0.into(), key: [0; KEY_SIZE] };
                body.key_size = put(&mut body.key, key).into();
                (operation::DELETE, *pool, body.as_bytes().to_vec())
            }
            Request::Enumerate { pool, index } => {
                let record = Record::new_zeroed();
                (operation::ENUMERATE, *pool, Enumerate { index: (*index).into(), record }.as_bytes().to_vec())
            }
        };
        let mut bytes = [Header { operation, pool, pad: [0; 2] }.as_bytes(), &rest].concat();
        bytes.resize(BODY_BYTES, 0);
        bytes
    }
}

fn record(key: &str, value: &str) -> Record {
    let mut record = Record { value_type: TEXT.into(), ..Record::new_zeroed() };
    record.key_size = put(&mut record.key, key).into();
    record.value_size = put(&mut record.value, value).into();
    record
}

/// Writes a text that fits; how many bytes it has, with its zero.
fn put(place: &mut [u8], text: &str) -> u32 {
    let units = text.encode_utf16().chain([0]);
    place.chunks_exact_mut(2).zip(units).map(|(place, unit)| place.copy_from_slice(&unit.to_le_bytes())).count() as u32 * 2
}

/// Whether a pool can hold this. Linux' daemon counts bytes of UTF-8, of which there are fields as large.
pub(super) fn fits(key: &str, value: &str) -> bool {
    let has_room = |text: &str, size: usize| text.encode_utf16().count() < size / 2 && text.len() < size && !text.contains('\0');
    !key.is_empty() && has_room(key, KEY_SIZE) && has_room(value, VALUE_SIZE)
}

/// How the guest means its answer: by the status, or over the body's header.
pub(super) fn verdict(status: u32, body: &[u8]) -> u32 {
    match body.first_chunk().map(|word| u32::from_le_bytes(*word)) {
        Some(word) if status == status::OK && word & FAILED != 0 => word,
        _ => status,
    }
}

/// Key and value of an answer to [`Request::Enumerate`]; `None` when there is no key, or no text.
pub(super) fn enumerated(body: &[u8]) -> Option<(String, String)> {
    let (_, rest) = Header::ref_from_prefix(body).ok()?;
    let (Enumerate { record, .. }, _) = Enumerate::ref_from_prefix(rest).ok()?;
    let key = text(&record.key, record.key_size.get());
    let value = match record.value_type.get() {
        TEXT => text(&record.value, record.value_size.get()),
        NUMBER => u32::from_le_bytes(*record.value.first_chunk()?).to_string(),
        _ => return None,
    };
    (!key.is_empty()).then_some((key, value))
}

/// The text in the first `size` bytes of a field, up to its zero.
fn text(field: &[u8], size: u32) -> String {
    let field = field.get(..size as usize).unwrap_or(field);
    let units = field.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]]));
    char::decode_utf16(units.take_while(|unit| *unit != 0)).map(|letter| letter.unwrap_or(char::REPLACEMENT_CHARACTER)).collect()
}
