//! The file of keys that outlive the server: a `redb` database.
//!
//! | table | key | value | |
//! |---|---|---|---|
//! | `meta` | `"xenstored"` | `u64` | version of this format, [`VERSION`] |
//! | `nodes` | `&str`, the absolute path | `(&str, &[u8])` | permissions as `n0 r5`, and the value; a row for each node, `/` first |
//!
//! Paths sort so that a node comes before those below it, and those below it are one range: all that begins with the path and a slash. What is
//! written at once is one transaction of the database, which is on the disk when it ends. The database's pages are written to
//! free places and the one that names them last, with checksums, so a crash at any moment leaves the state before or after.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use redb::backends::FileBackend;
use redb::{Builder, Database, ReadableDatabase, ReadableTable, StorageBackend, TableDefinition, TableError};
use xenstore::{Blob, NodeState, Perms, Record};

/// Version of the format.
pub const VERSION: u64 = 1;
const META: TableDefinition<&str, u64> = TableDefinition::new("meta");
const NODES: TableDefinition<&str, (&str, &[u8])> = TableDefinition::new("nodes");
/// The only row of [`META`].
const FORMAT: &str = "xenstored";
/// Bytes of the file that are kept in memory; the store has all keys in memory anyway.
const CACHE: usize = 1 << 20;

/// Why the file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    /// Another program has it open.
    #[error("in use by another program")]
    InUse,
    /// It is something else.
    #[error("is no file of xenstored's keys: {0}; name another file, or remove this one if it is not needed")]
    Foreign(String),
    /// It is another version's.
    #[error("has format {0}, this program knows {VERSION}")]
    Version(u64),
    /// It was changed by something else than this program.
    #[error("is damaged: {0}; restore it, or remove it to begin without keys")]
    Damaged(String),
    /// The host's answer.
    #[error("{0}")]
    Host(#[from] io::Error),
}

/// An open file of keys.
pub struct Keys(Database);

impl Keys {
    /// Opens the file at `path`, or makes one for its owner alone, and tells what is in it, parents first.
    ///
    /// # Errors
    /// [`KeysError`].
    pub fn open(path: &Path) -> Result<(Keys, Vec<NodeState>), KeysError> {
        if !path.try_exists()? {
            make(path)?;
        }
        if !path.metadata()?.is_file() {
            return Err(KeysError::Foreign("not a regular file".into()));
        }
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        Keys::on(FileBackend::new(file).map_err(of_database)?)
    }

    /// As [`Keys::open`], on anything that stores bytes.
    ///
    /// # Errors
    /// [`KeysError`].
    pub fn on(storage: impl StorageBackend) -> Result<(Keys, Vec<NodeState>), KeysError> {
        let is_new = storage.len()? == 0;
        let opened = Builder::new().set_cache_size(CACHE).set_check_integrity_on_open(true).create_with_backend(storage);
        let keys = Keys(opened.map_err(of_database)?);
        if is_new {
            keys.begin()?;
        }
        let nodes = keys.read()?;
        Ok((keys, nodes))
    }

    /// Writes `records` all at once. When this is done they are on the disk; when it fails, they are or are not, and the file is to be opened anew.
    ///
    /// # Errors
    /// [`KeysError`].
    pub fn write(&self, records: &[Record]) -> Result<(), KeysError> {
        let transaction = self.0.begin_write().map_err(of_database)?;
        {
            let mut table = transaction.open_table(NODES).map_err(of_database)?;
            for record in records {
                match record {
                    Record::Node(NodeState { path, value, perms }) => {
                        let perms = Vec::from(perms.clone()).join(" ");
                        table.insert(path.as_str(), (perms.as_str(), value.as_bytes())).map_err(of_database)?;
                    }
                    Record::Removed(path) => {
                        table.remove(path.as_str()).map_err(of_database)?;
                        // '0' is the character after '/'.
                        let (first, end) = (format!("{path}/"), format!("{path}0"));
                        table.retain_in(first.as_str()..end.as_str(), |_, _| false).map_err(of_database)?;
                    }
                }
            }
        }
        transaction.commit().map_err(of_database)
    }

    fn begin(&self) -> Result<(), KeysError> {
        let transaction = self.0.begin_write().map_err(of_database)?;
        transaction.open_table(NODES).map_err(of_database)?;
        transaction.open_table(META).map_err(of_database)?.insert(FORMAT, VERSION).map_err(of_database)?;
        transaction.commit().map_err(of_database)
    }

    fn read(&self) -> Result<Vec<NodeState>, KeysError> {
        let transaction = self.0.begin_read().map_err(of_database)?;
        let version = transaction.open_table(META).map_err(of_table)?.get(FORMAT).map_err(of_database)?.map(|version| version.value());
        match version {
            Some(VERSION) => {}
            Some(other) => return Err(KeysError::Version(other)),
            None => return Err(KeysError::Foreign("a database of another program".into())),
        }
        let table = transaction.open_table(NODES).map_err(of_table)?;
        let mut nodes = Vec::new();
        for row in table.iter().map_err(of_database)? {
            let (path, row) = row.map_err(of_database)?;
            let (path, (perms, value)) = (path.value().to_owned(), row.value());
            let perms =
                Perms::parse(perms.split(' ').map(str::as_bytes)).map_err(|_| KeysError::Damaged(format!("permissions of {path}")))?;
            nodes.push(NodeState { path, value: Blob::from(value), perms });
        }
        Ok(nodes)
    }
}

/// Makes an empty file of keys, which gets its name when it is complete: a crash leaves it, or nothing, but not a half one.
fn make(path: &Path) -> Result<(), KeysError> {
    let mut draft = path.as_os_str().to_owned();
    draft.push(format!(".{}", std::process::id()));
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).mode(0o600).open(&draft)?;
    let made = FileBackend::new(file).map_err(of_database).and_then(Keys::on).map(drop);
    let named = made.and_then(|()| match std::fs::hard_link(&draft, path) {
        // Another program was faster; its file is as good.
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error.into()),
        _ => Ok(()),
    });
    std::fs::remove_file(&draft)?;
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(directory)?.sync_all()?;
    named
}

fn of_table(error: TableError) -> KeysError {
    match error {
        TableError::Storage(error) => of_database(error),
        other => KeysError::Foreign(other.to_string()),
    }
}

fn of_database(error: impl Into<redb::Error>) -> KeysError {
    match error.into() {
        redb::Error::DatabaseAlreadyOpen | redb::Error::LockProtocolMismatch => KeysError::InUse,
        redb::Error::Corrupted(what) => KeysError::Damaged(what),
        redb::Error::Io(error) if error.kind() == io::ErrorKind::InvalidData => KeysError::Foreign(error.to_string()),
        redb::Error::Io(error) => KeysError::Host(error),
        redb::Error::UpgradeRequired(version) => KeysError::Foreign(format!("database format {version}")),
        other => KeysError::Host(io::Error::other(other)),
    }
}
