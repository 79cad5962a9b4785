//! Byte strings that need no allocation when they are short, as nearly all names and values are, and are shared when they are long.
//!
//! A node must be small (hundreds of thousands of them are ordinary) and cheap to copy (a snapshot copies the nodes on the way to a change), so
//! neither `Vec` nor `String` will do.

use std::fmt;
use std::sync::Arc;

/// Name of a node in its directory: at most 14 bytes without an allocation, 16 bytes in size.
pub type Name = Bytes<14, Thin>;
const _: () = assert!(size_of::<Name>() == 16);

/// Value of a node: at most 22 bytes without an allocation, 24 bytes in size.
pub type Value = Bytes<22, Arc<[u8]>>;
const _: () = assert!(size_of::<Value>() == 24);

/// Bytes, `N` of them in place.
#[derive(Clone)]
pub enum Bytes<const N: usize, L> {
    /// In place: how many, and they.
    Short(u8, [u8; N]),
    /// Elsewhere, shared.
    Long(L),
}

/// What a long byte string lives in.
pub trait Long: Clone + for<'a> From<&'a [u8]> {
    /// The bytes.
    fn bytes(&self) -> &[u8];
}

impl Long for Arc<[u8]> {
    fn bytes(&self) -> &[u8] {
        self
    }
}

/// A pointer of one word, for [`Name`]: long names are rare enough to be two steps away.
#[derive(Clone)]
pub struct Thin(Arc<Box<[u8]>>);

impl From<&[u8]> for Thin {
    fn from(bytes: &[u8]) -> Thin {
        Thin(Arc::new(bytes.into()))
    }
}

impl Long for Thin {
    fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl<const N: usize, L: Long> Bytes<N, L> {
    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        match self {
            Bytes::Short(length, bytes) => bytes.get(..usize::from(*length)).unwrap_or(bytes),
            Bytes::Long(bytes) => bytes.bytes(),
        }
    }

    /// How many.
    pub fn len(&self) -> usize {
        match self {
            Bytes::Short(length, _) => usize::from(*length),
            Bytes::Long(bytes) => bytes.bytes().len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<const N: usize, L: Long> From<&[u8]> for Bytes<N, L> {
    fn from(bytes: &[u8]) -> Self {
        let mut short = [0; N];
        match (short.get_mut(..bytes.len()), u8::try_from(bytes.len())) {
            (Some(start), Ok(length)) => {
                start.copy_from_slice(bytes);
                Bytes::Short(length, short)
            }
            _ => Bytes::Long(bytes.into()),
        }
    }
}

impl<const N: usize, L: Long> Default for Bytes<N, L> {
    fn default() -> Self {
        Bytes::Short(0, [0; N])
    }
}

impl<const N: usize, L: Long> PartialEq for Bytes<N, L> {
    fn eq(&self, other: &Self) -> bool {
        self.as_bytes() == other.as_bytes()
    }
}

impl<const N: usize, L: Long> Eq for Bytes<N, L> {}

impl<const N: usize, L: Long> fmt::Debug for Bytes<N, L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.as_bytes().escape_ascii())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_kept_at_every_length() {
        for length in 0..64 {
            let bytes: Vec<u8> = (0..length).collect();
            let (name, value) = (Name::from(&bytes[..]), Value::from(&bytes[..]));
            assert_eq!((name.as_bytes(), name.len()), (&bytes[..], bytes.len()));
            assert_eq!((value.as_bytes(), value.len()), (&bytes[..], bytes.len()));
            assert_eq!(matches!(name, Name::Short(..)), length <= 14);
            assert_eq!(matches!(value, Value::Short(..)), length <= 22);
        }
    }
}
