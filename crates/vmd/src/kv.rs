//! Keys and values of the store as people write them, on the command line and in JSON.
//!
//! ```text
//!   /local/domain/1/data     a path of the whole store
//!   data/x, data/            a path of this machine: it has a slash
//!   hostname                 a key for guests: vm-data/hostname
//!   guestinfo.a.b, a.b       the same by VMware's name: vm-data/a/b, as [`guestinfo::path`] has it
//! ```
//!
//! A value in JSON is a string where it is text, otherwise an object with its bytes in base64 (RFC 4648): `{"base64": "AAEC"}`. A dump is one
//! object from paths to values.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use abi::vmware::rpc::GUESTINFO;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use dialects::store::{Client, MAX_VALUE, Store, StoreError};
use dialects::vmware::guestinfo;
use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;

use crate::config::ConfigError;
use crate::store::is_own_directory;

/// The store's path of a key as people write it.
///
/// # Errors
/// [`ConfigError::Syntax`] for an empty key. Everything else that is no path the store refuses itself.
pub fn parse_key(text: &str) -> Result<String, ConfigError> {
    match text {
        "" => Err(ConfigError::Syntax("an empty key; write a name or a path".into())),
        "/" => Ok(text.into()),
        _ if text.contains('/') => Ok(text.strip_suffix('/').unwrap_or(text).into()),
        _ => {
            let key = if guestinfo::path(text).is_some() { text.into() } else { format!("{GUESTINFO}{text}") };
            guestinfo::path(&key).ok_or_else(|| ConfigError::Syntax(format!("'{text}' is not a key")))
        }
    }
}

/// `KEY=VALUE`, `KEY=@FILE`, or `KEY=@@VALUE` for a value that begins with one `@`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assignment {
    /// Path in the store.
    pub path: String,
    /// Where its value comes from.
    pub source: Source,
}

/// Where a value comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// These bytes.
    Given(Vec<u8>),
    /// What the file has.
    File(PathBuf),
}

impl FromStr for Assignment {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Assignment, ConfigError> {
        let Some((key, value)) = text.split_once('=') else {
            return Err(ConfigError::Syntax(format!("'{text}' has no value; write KEY=VALUE or KEY=@FILE")));
        };
        let source = match value.strip_prefix('@') {
            None => Source::Given(value.into()),
            Some(rest) if rest.starts_with('@') => Source::Given(rest.into()),
            Some("") => return Err(ConfigError::Syntax(format!("'{text}' lacks a file after @; a value that is an @ is written @@"))),
            Some(file) => Source::File(file.into()),
        };
        Ok(Assignment { path: parse_key(key)?, source })
    }
}

/// Why a value cannot be had, or cannot be set.
#[derive(Debug, thiserror::Error)]
pub enum ValueError {
    /// Its file.
    #[error("{}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// The host's answer.
        source: std::io::Error,
    },
    /// Its file is larger than a value can be.
    #[error("{}: larger than a value of the store can be, {MAX_VALUE} bytes", .0.display())]
    TooLarge(PathBuf),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Source {
    /// The value.
    ///
    /// # Errors
    /// [`ValueError::File`], [`ValueError::TooLarge`].
    pub fn read(&self) -> Result<Vec<u8>, ValueError> {
        match self {
            Source::Given(bytes) => Ok(bytes.clone()),
            Source::File(path) => {
                let fail = |source| ValueError::File { path: path.clone(), source };
                read_value(std::fs::File::open(path).map_err(fail)?).map_err(fail)?.ok_or_else(|| ValueError::TooLarge(path.clone()))
            }
        }
    }
}

/// Everything that `from` gives, or `None` when that is more than a value can be.
///
/// # Errors
/// Those of reading.
pub fn read_value(from: impl Read) -> std::io::Result<Option<Vec<u8>>> {
    let mut bytes = Vec::new();
    from.take(MAX_VALUE as u64 + 1).read_to_end(&mut bytes)?;
    Ok((bytes.len() <= MAX_VALUE).then_some(bytes))
}

/// Sets keys before the machine starts, in their order.
///
/// # Errors
/// [`ValueError`] of the first that cannot be set.
pub fn preset(store: &dyn Store, assignments: &[Assignment]) -> Result<(), ValueError> {
    for assignment in assignments {
        store.write(Client::Host, &assignment.path, &assignment.source.read()?)?;
    }
    Ok(())
}

/// A value in JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "JsonForm", try_from = "JsonForm")]
pub struct JsonValue(pub Vec<u8>);

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum JsonForm {
    Text(String),
    Binary { base64: String },
}

impl From<JsonValue> for JsonForm {
    fn from(JsonValue(bytes): JsonValue) -> JsonForm {
        match String::from_utf8(bytes) {
            Ok(text) if is_text(&text) => JsonForm::Text(text),
            Ok(text) => JsonForm::Binary { base64: BASE64.encode(text) },
            Err(error) => JsonForm::Binary { base64: BASE64.encode(error.as_bytes()) },
        }
    }
}

impl TryFrom<JsonForm> for JsonValue {
    type Error = base64::DecodeError;

    fn try_from(form: JsonForm) -> Result<JsonValue, base64::DecodeError> {
        match form {
            JsonForm::Text(text) => Ok(JsonValue(text.into())),
            JsonForm::Binary { base64 } => BASE64.decode(base64).map(JsonValue),
        }
    }
}

/// A value on one line for people: control characters, backslashes and what is not UTF-8 escaped, as it may be a guest's.
pub fn printable(value: &[u8]) -> String {
    let mut line = String::with_capacity(value.len());
    for chunk in value.utf8_chunks() {
        for letter in chunk.valid().chars() {
            match letter {
                '\\' => line.push_str("\\\\"),
                letter if letter.is_control() => line.extend(letter.escape_default()),
                letter => line.push(letter),
            }
        }
        line.extend(chunk.invalid().iter().map(|byte| format!("\\x{byte:02x}")));
    }
    line
}

/// Whether people can read it. What they cannot would also grow sixfold in a JSON string.
fn is_text(text: &str) -> bool {
    text.chars().all(|c| !c.is_control() || matches!(c, '\t' | '\n' | '\r'))
}

/// `top` and everything below it, sorted by path: all that have a value, or nothing below them. Without the others, which are only there
/// for their children, and without the empty directories that each machine has.
///
/// # Errors
/// [`StoreError`] about `top`. Keys that go while we look are left out.
pub fn tree(store: &dyn Store, top: &str) -> Result<BTreeMap<String, JsonValue>, StoreError> {
    let mut found = BTreeMap::new();
    let mut left = vec![(top.to_owned(), store.list(Client::Host, top)?)];
    while let Some((path, names)) = left.pop() {
        let Ok(value) = store.read(Client::Host, &path) else { continue };
        let children = names.iter().map(|name| child(&path, name));
        left.extend(children.filter_map(|path| store.list(Client::Host, &path).ok().map(|names| (path, names))));
        if !value.is_empty() || names.is_empty() && !path.is_empty() && !is_own_directory(&path) {
            found.insert(path, JsonValue(value));
        }
    }
    Ok(found)
}

/// The path of `name` in `parent`.
pub fn child(parent: &str, name: &str) -> String {
    match parent {
        "" => name.into(),
        "/" => format!("/{name}"),
        _ => format!("{parent}/{name}"),
    }
}

/// A file that gets the whole store as one JSON object when the machine has ended.
pub struct Dump {
    file: PathBuf,
    /// Where a new file is made, to take the old one's place at once; `None` for devices and pipes, which are written as they are.
    directory: Option<PathBuf>,
}

impl Dump {
    /// A dump into `file`. Tries whether it can be written, so that a run does not end with that news.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn new(file: &Path) -> std::io::Result<Dump> {
        // A link stays what it is and its target is replaced.
        let file = file.canonicalize().unwrap_or_else(|_| file.to_owned());
        if file.metadata().is_ok_and(|metadata| !metadata.is_file() && !metadata.is_dir()) {
            std::fs::File::options().write(true).open(&file)?;
            return Ok(Dump { file, directory: None });
        }
        if file.is_dir() {
            return Err(std::io::ErrorKind::IsADirectory.into());
        }
        let directory = file.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new(".")).to_owned();
        NamedTempFile::new_in(&directory)?;
        Ok(Dump { file, directory: Some(directory) })
    }

    /// Writes what is below the machine's home, the file as a whole or not at all.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn write(&self, store: &dyn Store) -> std::io::Result<()> {
        let tree = tree(store, "").map_err(std::io::Error::other)?;
        let mut text = serde_json::to_vec_pretty(&tree)?;
        text.push(b'\n');
        let Some(directory) = &self.directory else { return std::fs::write(&self.file, text) };
        let mut temporary = NamedTempFile::new_in(directory)?;
        temporary.write_all(&text)?;
        temporary.as_file().sync_all()?;
        temporary.persist(&self.file)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::MachineStore;

    #[test]
    fn keys_are_paths_or_names_for_guests() {
        for (text, path) in [
            ("/local/domain/1/data", "/local/domain/1/data"),
            ("/", "/"),
            ("data/x", "data/x"),
            ("data/", "data"),
            ("hostname", "vm-data/hostname"),
            ("guestinfo.hostname", "vm-data/hostname"),
            ("guestinfo.a.b", "vm-data/a/b"),
            ("a.b", "vm-data/a/b"),
            ("a b", "vm-data/a@20b"),
        ] {
            assert_eq!(parse_key(text).unwrap(), path, "{text}");
        }
        assert!(parse_key("").is_err());
    }

    #[test]
    fn assignments_take_text_files_and_a_literal_at() {
        let parse = |text: &str| text.parse::<Assignment>();
        let given = |path: &str, value: &str| Assignment { path: path.into(), source: Source::Given(value.into()) };
        assert_eq!(parse("a=b=c"), Ok(given("vm-data/a", "b=c")));
        assert_eq!(parse("a="), Ok(given("vm-data/a", "")));
        assert_eq!(parse("data/a=@@x"), Ok(given("data/a", "@x")));
        assert_eq!(parse("a=@/etc/motd").unwrap().source, Source::File("/etc/motd".into()));
        assert!(parse("a").unwrap_err().to_string().contains("KEY=VALUE"));
        assert!(parse("a=@").unwrap_err().to_string().contains("@@"));
        assert!(parse("=b").unwrap_err().to_string().contains("empty key"));
    }

    #[test]
    fn values_are_text_or_base64() {
        for (bytes, json) in [
            (&b"plain"[..], r#""plain""#),
            (b"", r#""""#),
            ("zwei\nZeilen \u{fc}".as_bytes(), "\"zwei\\nZeilen \u{fc}\""),
            (b"\0\x01\x02", r#"{"base64":"AAEC"}"#),
            (b"\xff", r#"{"base64":"/w=="}"#),
        ] {
            let value = JsonValue(bytes.into());
            assert_eq!(serde_json::to_string(&value).unwrap(), json);
            assert_eq!(serde_json::from_str::<JsonValue>(json).unwrap(), value);
        }
        for bad in [r#"{"base64":"!"}"#, r#"{"hex":"00"}"#, "5", "null"] {
            assert!(serde_json::from_str::<JsonValue>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn values_are_one_line_for_people() {
        assert_eq!(printable(b"plain = value"), "plain = value");
        assert_eq!(printable(b"two\nlines\\"), "two\\nlines\\\\");
        assert_eq!(printable(b"\x1b[2J\xff"), "\\u{1b}[2J\\xff");
        assert_eq!(printable("gr\u{fc}n".as_bytes()), "gr\u{fc}n");
    }

    #[test]
    fn dump_has_every_value_and_no_bare_parents() {
        let store = MachineStore::new().unwrap();
        for (path, value) in [("vm-data/a", &b"both"[..]), ("vm-data/a/b", b"\xff"), ("data/empty", b"")] {
            store.write(Client::Host, path, value).unwrap();
        }
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("out.json");
        std::fs::write(&file, "old").unwrap();
        Dump::new(&file).unwrap().write(&store).unwrap();
        let wanted = "{\n  \"data/empty\": \"\",\n  \"vm-data/a\": \"both\",\n  \"vm-data/a/b\": {\n    \"base64\": \"/w==\"\n  }\n}\n";
        assert_eq!(std::fs::read_to_string(&file).unwrap(), wanted);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1, "no temporary file stays");
    }

    #[test]
    fn dump_that_cannot_be_written_is_known_before() {
        let directory = tempfile::tempdir().unwrap();
        assert!(Dump::new(&directory.path().join("absent/out.json")).is_err());
        assert!(Dump::new(directory.path()).is_err());
    }

    #[test]
    fn dump_into_a_device_leaves_the_device() {
        let null = Path::new("/dev/null");
        Dump::new(null).unwrap().write(&MachineStore::new().unwrap()).unwrap();
        assert!(!null.metadata().unwrap().is_file());
    }

    #[test]
    fn files_larger_than_a_value_are_refused() {
        assert_eq!(read_value(&vec![0; MAX_VALUE][..]).unwrap().map(|bytes| bytes.len()), Some(MAX_VALUE));
        assert_eq!(read_value(std::io::repeat(0)).unwrap(), None);
    }
}
