//! How results are printed: as OpenBSD does, byte by byte, or as JSON.

use std::fs::File;
use std::io::{self, Write};

use base64::prelude::{BASE64_STANDARD, Engine};
use serde_json::{Value, json};

use crate::args::Arguments;
use crate::error::Error;
use crate::vis;

/// Where results go, and in which form.
pub struct Output {
    to: Box<dyn Write>,
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
        let (to, name): (Box<dyn Write>, String) = match &arguments.output {
            None => (Box::new(io::stdout()), "standard output".into()),
            Some(path) => {
                let what = format!("fopen: {}", path.display());
                (Box::new(File::create(path).map_err(|error| Error::system(&what, &error))?), what)
            }
        };
        Ok(Output { to, name, json: arguments.json, raw: arguments.raw })
    }

    /// A value that was read. An empty one is nothing in OpenBSD's form.
    ///
    /// # Errors
    /// [`Error::System`] when it cannot be written; so the others.
    pub fn value(&mut self, key: &[u8], value: &[u8]) -> Result<(), Error> {
        if self.json {
            return self.line(&json_pair(key, Some(value)).to_string());
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
            return self.line(&Value::from(names.iter().map(|name| String::from_utf8_lossy(name)).collect::<Vec<_>>()).to_string());
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
            return self.line(&json_pair(key, value).to_string());
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
    pub fn line(&mut self, line: &str) -> Result<(), Error> {
        self.write(format!("{line}\n").as_bytes())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.to.write_all(bytes).and_then(|()| self.to.flush()).map_err(|error| Error::system(&self.name, &error))
    }
}

/// Key and value as an object; bytes that are no text as `base64` in place of `value`.
fn json_pair(key: &[u8], value: Option<&[u8]>) -> Value {
    let key = String::from_utf8_lossy(key);
    match value.map(|value| (value, std::str::from_utf8(value))) {
        None => json!({ "key": key, "value": null }),
        Some((_, Ok(text))) => json!({ "key": key, "value": text }),
        Some((bytes, Err(_))) => json!({ "key": key, "base64": BASE64_STANDARD.encode(bytes) }),
    }
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
        assert_eq!(json_pair(b"k", Some(b"\xff\0")).to_string(), r#"{"base64":"/wA=","key":"k"}"#);
        assert_eq!(json_pair(b"k", None).to_string(), r#"{"key":"k","value":null}"#);
    }

    #[test]
    fn change_is_one_line_whatever_the_value() {
        assert_eq!(one_line(b"a\nb\\n\x1b"), br"a\nb\\n\^[");
    }
}
