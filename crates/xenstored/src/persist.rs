//! Keys that outlive the server, in a file of the `redb` crate.
//!
//! Persistent is everything but what describes running domains ([`TRANSIENT`]): those are gone when the host starts again, and their toolstack writes
//! their keys anew. For the same reason a restored node is never a guest's: what guests owned elsewhere, and the rights they were given, are
//! dropped with them, so that the next domain of a number inherits nothing.
//!
//! ```text
//!   requests ──> Store ── journal of changed paths ──> Persistence::commit ── one durable commit ──> then replies and events are sent
//! ```
//!
//! Whoever serves the store commits before anything is sent, so what a client was told is in the file, and as a journal is taken between requests, no
//! half transaction is. All that was done since the last commit shares one.
//!
//! The file has one table: a path, and under it the permissions as on the wire, each with a zero byte, an empty one, and the value.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::Path as FilePath;
use std::sync::Arc;

use redb::{Database, ReadableDatabase, ReadableTable, StorageBackend, Table, TableDefinition};
use xenstore::{Changed, DomId, Error, Op, Path, Perms, Server, Store};

/// Nodes by their absolute paths. The name is the version of the format.
const NODES: TableDefinition<&str, &[u8]> = TableDefinition::new("nodes-1");

/// Nodes that do not outlive the server, with all below: homes, and what libxl (`/vm`, `/libxl`) and xapi (`/xapi`, `/xenopsd`) note of domains.
const TRANSIENT: [&str; 5] = ["/local/domain", "/vm", "/libxl", "/xapi", "/xenopsd"];

/// Why the file and the store do not agree.
#[derive(Debug, thiserror::Error)]
pub enum PersistError {
    /// The file cannot be read or written.
    #[error(transparent)]
    Database(Box<redb::Error>),
    /// It holds what this program did not write.
    #[error("the file has an impossible node {0:?}")]
    Node(String),
    /// The store refused a node.
    #[error("the store refuses {path:?} of the file: {error}")]
    Refused {
        /// Which.
        path: String,
        /// Why.
        error: Error,
    },
}

impl<E: Into<redb::Error>> From<E> for PersistError {
    fn from(error: E) -> PersistError {
        PersistError::Database(Box::new(error.into()))
    }
}

/// The file.
pub struct Persistence(Database);

impl Persistence {
    /// Opens the file at `path`, and makes it if there is none.
    ///
    /// # Errors
    /// When it cannot be made or read, is something else, or another process has it open.
    pub fn open(path: &FilePath) -> Result<Persistence, PersistError> {
        if !path.exists() {
            // A file that was half made is no database, and would be refused ever after: it gets its name when it is whole.
            let mut unfinished = path.as_os_str().to_owned();
            unfinished.push(".new");
            drop(File::create(&unfinished)?);
            drop(Database::create(&unfinished)?);
            std::fs::rename(&unfinished, path)?;
            // Where it was made, an absolute path has a directory.
            path.parent().map_or(Ok(()), |directory| File::open(directory)?.sync_all())?;
        }
        Ok(Persistence(Database::open(path)?))
    }

    /// As [`Persistence::open`], on any storage.
    ///
    /// # Errors
    /// As [`Persistence::open`].
    pub fn on(storage: impl StorageBackend) -> Result<Persistence, PersistError> {
        Ok(Persistence(Database::builder().create_with_backend(storage)?))
    }

    /// Puts what the file holds into `server`, whose store keeps a journal ([`xenstore::Config::journal`]).
    ///
    /// # Errors
    /// When the file cannot be read, or holds what no store can.
    pub fn restore(&self, server: &mut Server) -> Result<(), PersistError> {
        let host = server.store().open(DomId::HOST, true);
        let restored = self.restore_as(host, server.store());
        server.store().close(host);
        // So far it says what the file has.
        server.store().take_journal();
        restored?.into_iter().for_each(|guest| server.forget(guest));
        self.commit(server.store())
    }

    /// Restores the nodes and tells which guests have a part in them.
    fn restore_as(&self, host: xenstore::ClientId, store: &mut Store) -> Result<BTreeSet<DomId>, PersistError> {
        let transaction = self.0.begin_read()?;
        let nodes = match transaction.open_table(NODES) {
            Ok(nodes) => nodes,
            Err(redb::TableError::TableDoesNotExist(_)) => return Ok(BTreeSet::new()),
            Err(error) => return Err(error.into()),
        };
        let mut guests = BTreeSet::new();
        for node in nodes.iter()? {
            let (path, record) = node?;
            let text = path.value();
            let (perms, value) = parse(record.value()).ok_or_else(|| PersistError::Node(text.into()))?;
            guests.extend(perms.entries().map(|entry| entry.domain).filter(|domain| domain.is_machine() && *domain != DomId::HOST));
            let refused = |error| PersistError::Refused { path: text.into(), error };
            let path = Path::parse(text.as_bytes(), DomId::HOST, 0).map_err(refused)?;
            store.apply(host, 0, Op::Write(path.clone(), value.into())).map_err(refused)?;
            if !path.is_root() {
                store.apply(host, 0, Op::SetPerms(path, Arc::new(perms))).map_err(refused)?;
            }
        }
        Ok(guests)
    }

    /// Brings the file up to date with what `store` has in its journal. On return that is durable.
    ///
    /// # Errors
    /// The file's. Then it has all of the changes or none.
    pub fn commit(&self, store: &mut Store) -> Result<(), PersistError> {
        let mut changes = store.take_journal();
        changes.retain(|(Changed::Set(path) | Changed::Removed(path))| is_persistent(path));
        if changes.is_empty() {
            return Ok(());
        }
        let transaction = self.0.begin_write()?;
        let mut nodes = transaction.open_table(NODES)?;
        for change in changes {
            match change {
                Changed::Set(path) => set(&mut nodes, store, path)?,
                Changed::Removed(path) => remove(&mut nodes, &path)?,
            }
        }
        drop(nodes);
        Ok(transaction.commit()?)
    }
}

/// Writes a node as it is now, and those above it that the file does not have.
fn set(nodes: &mut Table<&str, &[u8]>, store: &Store, path: Path) -> Result<(), redb::StorageError> {
    let mut next = Some(path.clone());
    while let Some(at) = next
        && let Some((value, perms)) = store.node(&at)
    {
        if at != path && nodes.get(at.as_str())?.is_some() {
            break;
        }
        nodes.insert(at.as_str(), record(perms, value).as_slice())?;
        next = at.parent();
    }
    Ok(())
}

fn remove(nodes: &mut Table<&str, &[u8]>, path: &Path) -> Result<(), redb::StorageError> {
    nodes.remove(path.as_str())?;
    // '0' is the character after '/'.
    let (first, end) = (format!("{path}/"), format!("{path}0"));
    nodes.retain_in::<&str, _>(first.as_str()..end.as_str(), |_, _| false)
}

fn is_persistent(path: &Path) -> bool {
    !TRANSIENT.iter().any(|transient| path.is_within(transient))
}

fn record(perms: &Perms, value: &[u8]) -> Vec<u8> {
    let mut record: Vec<u8> = perms.entries().flat_map(|entry| format!("{entry}\0").into_bytes()).collect();
    record.push(0);
    record.extend_from_slice(value);
    record
}

fn parse(record: &[u8]) -> Option<(Perms, &[u8])> {
    let end = record.windows(2).position(|pair| pair == b"\0\0")?;
    let (perms, value) = record.split_at_checked(end)?;
    Some((Perms::parse(perms.split(|byte| *byte == 0)).ok()?, value.get(2..)?))
}

#[cfg(test)]
#[path = "persist_tests.rs"]
mod tests;
