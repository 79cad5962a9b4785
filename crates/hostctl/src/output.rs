//! How results are printed: as OpenBSD does, byte by byte, or as JSON.

use alloc::borrow::ToOwned;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt::Display;

use crate::args::Arguments;
use crate::error::Error;
use crate::json::{Json, base64};
use crate::sys::File;
use crate::sys::file::Access;
use crate::vis;

/// Where results go, and in which form.
pub struct Output {
    /// Standard output when there is none.
    file: Option<File>,
    name: String,
    json: bool,
    raw: bool,
}

impl Output {
    /// As the command line wants it. The file of `-o` is made, or emptied, at once.
    ///
    /// # Errors
    /// [`Error::System`] when there can be no such file.
    pub fn open(arguments: &Arguments) -> Result<Output, Error> {
        let (file, name) = match &arguments.output {
            None => (None, "standard output".to_owned()),
            Some(path) => {
                let name = format!("fopen: {}", String::from_utf8_lossy(path));
                (Some(File::open(path, Access::Replace).map_err(Error::system(&name))?), name)
            }
        };
        Ok(Output { file, name, json: arguments.json, raw: arguments.raw })
    }

    /// A value that was read. An empty one is nothing in OpenBSD's form.
    ///
    /// # Errors
    /// [`Error::System`] when it cannot be written; so the others.
    pub fn value(&mut self, key: &[u8], value: &[u8]) -> Result<(), Error> {
        if self.json {
            return self.line(json_pair(key, Some(value)));
        }
        if self.raw {
            return self.write(value);
        }
        if value.is_empty() { Ok(()) } else { self.write(&[&vis::encode(value), b"\n".as_slice()].concat()) }
    }

    /// Names of keys, a line each.
    ///
    /// # Errors
    /// As [`Output::value`].
    pub fn names(&mut self, names: &[Vec<u8>]) -> Result<(), Error> {
        if self.json {
            return self.line(Json::List(names.iter().map(|name| Json::text(String::from_utf8_lossy(name))).collect()));
        }
        let lines: Vec<u8> = names.iter().flat_map(|name| [one_line(name), b"\n".to_vec()].concat()).collect();
        self.write(&lines)
    }

    /// What a watched key has become; `None` when it is not there. One line each, written at once.
    ///
    /// # Errors
    /// As [`Output::value`].
    pub fn change(&mut self, key: &[u8], value: Option<&[u8]>) -> Result<(), Error> {
        if self.json {
            return self.line(json_pair(key, value));
        }
        let line = match value {
            Some(value) => [one_line(key), b": ".to_vec(), one_line(value)].concat(),
            None => [one_line(key), b" is not there".to_vec()].concat(),
        };
        self.write(&[&line, b"\n".as_slice()].concat())
    }

    /// A line of text.
    ///
    /// # Errors
    /// As [`Output::value`].
    pub fn line(&mut self, line: impl Display) -> Result<(), Error> {
        self.write(format!("{line}\n").as_bytes())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.file.as_ref().unwrap_or(File::STDOUT).write_all(bytes).map_err(Error::system(&self.name))
    }
}

/// Key and value as an object; bytes that are no text as `base64` in place of `value`.
fn json_pair(key: &[u8], value: Option<&[u8]>) -> Json {
    let key = ("key", Json::text(String::from_utf8_lossy(key)));
    let value = match value.map(|value| (value, core::str::from_utf8(value))) {
        None => ("value", Json::Null),
        Some((_, Ok(text))) => ("value", Json::text(text)),
        Some((bytes, Err(_))) => ("base64", Json::String(base64(bytes))),
    };
    Json::Object([key, value].into())
}

/// Visible, newlines too.
fn one_line(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    for byte in vis::encode(bytes) {
        match byte {
            b'\n' => out.extend(br"\n"),
            byte => out.push(byte),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_that_are_no_text_are_base64_in_json() {
        assert_eq!(json_pair(b"k", Some(b"a\n")).to_string(), r#"{"key":"k","value":"a\n"}"#);
        assert_eq!(json_pair(b"k", Some(b"\xff\0")).to_string(), r#"{"key":"k","base64":"/wA="}"#);
        assert_eq!(json_pair(b"k", None).to_string(), r#"{"key":"k","value":null}"#);
    }

    #[test]
    fn change_is_one_line_whatever_the_value() {
        assert_eq!(one_line(b"a\nb\\n\x1b"), br"a\nb\\n\^[");
    }
}
