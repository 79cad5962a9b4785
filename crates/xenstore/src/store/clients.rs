//! Clients of the store, and what each of them has open.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{Store, TxId};
use crate::domid::DomId;
use crate::error::Error;
use crate::path::{Path, Watched};
use crate::perms::Caller;
use crate::quota::{Quota, Usage};
use crate::transaction::Transaction;
use crate::watch::Watch;

/// What a watch costs beside its path and token.
const WATCH_BYTES: usize = 256;

/// Number of a client, never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ClientId(pub(crate) u64);

impl ClientId {
    /// The number, from 1 on.
    pub fn number(self) -> u64 {
        self.0
    }
}

/// A client: a connection, or somebody in this process.
pub(crate) struct Client {
    pub(crate) domain: DomId,
    pub(crate) privileged: bool,
    /// By [`watch_key`].
    pub(crate) watches: HashMap<Vec<u8>, Arc<Watch>>,
    pub(crate) transactions: BTreeMap<TxId, Transaction>,
    pub(crate) last_transaction: TxId,
}

impl Client {
    pub(crate) fn new(domain: DomId, privileged: bool) -> Client {
        Client { domain, privileged, watches: HashMap::new(), transactions: BTreeMap::new(), last_transaction: 0 }
    }

    /// Keeps `transaction` under the next number that is free and not 0.
    pub(super) fn add_transaction(&mut self, transaction: Transaction) -> TxId {
        loop {
            self.last_transaction = self.last_transaction.wrapping_add(1).max(1);
            if !self.transactions.contains_key(&self.last_transaction) {
                self.transactions.insert(self.last_transaction, transaction);
                return self.last_transaction;
            }
        }
    }

    /// Bytes of memory that its domain is charged with.
    pub(super) fn memory(&self) -> usize {
        let transactions = self.transactions.values().map(Transaction::memory);
        self.watches.values().map(|watch| watch_memory(watch)).chain(transactions).sum()
    }
}

/// What a watch is found by: its path and token.
pub(super) fn watch_key(path: &str, token: &[u8]) -> Vec<u8> {
    [path.as_bytes(), b"\0", token].concat()
}

pub(super) fn watch_memory(watch: &Watch) -> usize {
    WATCH_BYTES + watch.path.len() + watch.token.len()
}

impl Store {
    /// Lets a client in. Privileged clients may do everything and have no quotas.
    pub fn open(&mut self, domain: DomId, privileged: bool) -> ClientId {
        self.last_client += 1;
        let id = ClientId(self.last_client);
        self.clients.insert(id, Client::new(domain, privileged));
        id
    }

    /// Forgets a client with its watches and transactions.
    pub fn close(&mut self, client: ClientId) {
        self.reset(client);
        self.clients.remove(&client);
    }

    /// RESET_WATCHES: drops the client's watches and transactions.
    pub fn reset(&mut self, client: ClientId) {
        let Some(known) = self.clients.get_mut(&client) else { return };
        let memory = known.memory();
        let watches = std::mem::take(&mut known.watches);
        let transactions = std::mem::take(&mut known.transactions);
        let domain = known.domain;
        self.usages.refund(domain, Usage::of_memory(memory));
        watches.values().for_each(|watch| self.watches.remove(watch));
        for (tx, transaction) in transactions {
            self.snapshots.remove(&(transaction.started(), client, tx));
        }
    }

    /// Who asks when this client does.
    ///
    /// # Errors
    /// [`Error::NoClient`].
    pub fn caller(&self, client: ClientId) -> Result<Caller, Error> {
        self.client(client).map(|client| self.domains.caller(client.domain, client.privileged))
    }

    /// Whether the client has this transaction open.
    pub fn has_transaction(&self, client: ClientId, tx: TxId) -> bool {
        self.client(client).is_ok_and(|client| client.transactions.contains_key(&tx))
    }

    /// Reads a node's path as this client writes it.
    ///
    /// # Errors
    /// [`Error::BadPath`].
    pub fn path(&self, client: ClientId, text: &[u8]) -> Result<Path, Error> {
        let domain = self.client(client)?.domain;
        Path::parse(text, domain, self.path_max(domain))
    }

    /// Reads the path of a watch as this client writes it.
    ///
    /// # Errors
    /// [`Error::BadPath`].
    pub fn watched(&self, client: ClientId, text: &[u8]) -> Result<Watched, Error> {
        let domain = self.client(client)?.domain;
        Watched::parse(text, domain, self.path_max(domain))
    }

    pub(super) fn client(&self, client: ClientId) -> Result<&Client, Error> {
        self.clients.get(&client).ok_or(Error::NoClient)
    }

    pub(super) fn client_mut(&mut self, client: ClientId) -> Result<&mut Client, Error> {
        self.clients.get_mut(&client).ok_or(Error::NoClient)
    }

    fn path_max(&self, domain: DomId) -> usize {
        self.domains.quotas(domain).get(Quota::PathMax) as usize
    }
}
