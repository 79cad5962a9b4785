//! JSON, as far as this program writes it (RFC 8259).

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt::{self, Display, Write};

/// A value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Json {
    /// `null`.
    Null,
    /// `true` or `false`.
    Bool(bool),
    /// A number.
    Number(u64),
    /// A string.
    String(String),
    /// A list.
    List(Vec<Json>),
    /// An object, in this order.
    Object(Vec<(&'static str, Json)>),
}

impl Json {
    /// A string of what `text` displays.
    pub fn text(text: impl Display) -> Json {
        let mut string = String::new();
        // A String takes everything.
        let _ = write!(string, "{text}");
        Json::String(string)
    }
}

impl<T: Into<Json>> From<Option<T>> for Json {
    fn from(value: Option<T>) -> Json {
        value.map_or(Json::Null, Into::into)
    }
}

impl Display for Json {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Json::Null => f.write_str("null"),
            Json::Bool(value) => write!(f, "{value}"),
            Json::Number(value) => write!(f, "{value}"),
            Json::String(value) => string(f, value),
            Json::List(values) => {
                f.write_char('[')?;
                for (at, value) in values.iter().enumerate() {
                    write!(f, "{}{value}", if at == 0 { "" } else { "," })?;
                }
                f.write_char(']')
            }
            Json::Object(members) => {
                f.write_char('{')?;
                for (at, (name, value)) in members.iter().enumerate() {
                    write!(f, "{}\"{name}\":{value}", if at == 0 { "" } else { "," })?;
                }
                f.write_char('}')
            }
        }
    }
}

fn string(f: &mut fmt::Formatter<'_>, value: &str) -> fmt::Result {
    f.write_char('"')?;
    for character in value.chars() {
        match character {
            '"' => f.write_str("\\\"")?,
            '\\' => f.write_str("\\\\")?,
            '\n' => f.write_str("\\n")?,
            '\r' => f.write_str("\\r")?,
            '\t' => f.write_str("\\t")?,
            '\0'..' ' => write!(f, "\\u{:04x}", u32::from(character))?,
            _ => f.write_char(character)?,
        }
    }
    f.write_char('"')
}

/// `bytes` in Base64 (RFC 4648, section 4), for values that are no text.
#[must_use]
pub fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let word = group.iter().chain(&[0; 2]).take(3).fold(0, |word, &byte| word << 8 | usize::from(byte));
        for digit in 0..4 {
            let character = if digit <= group.len() { char::from(ALPHABET[word >> (18 - 6 * digit) & 63]) } else { '=' };
            out.push(character);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn others_read_what_is_written() {
        let nasty: String = (0..300).filter_map(char::from_u32).chain("\u{1f980}\u{2028}".chars()).collect();
        let json = Json::Object(vec![
            ("text", Json::text(&nasty)),
            ("list", Json::List(vec![Json::Null, Json::Bool(true), Json::Number(u64::MAX)])),
            ("empty", Json::Object(vec![])),
        ]);
        let read: serde_json::Value = serde_json::from_str(&json.to_string()).unwrap();
        assert_eq!(read, serde_json::json!({ "text": nasty, "list": [null, true, u64::MAX], "empty": {} }));
    }

    #[test]
    fn base64_is_that_of_the_rfc() {
        // RFC 4648, section 10.
        for (bytes, text) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg=="), ("foobar", "Zm9vYmFy")] {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
    }
}
