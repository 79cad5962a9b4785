//! The store: one tree, its clients with their watches and transactions, domains, and what all of them use.
//!
//! Everything is a method call that ends at once. Changes leave [`Event`]s behind, which whoever owns the store takes with
//! [`Store::take_events`] and delivers: [`Server`](crate::Server) into its connections' queues, [`SharedStore`](crate::SharedStore) by callbacks.
//! What a client may do is decided here; what it may write on the wire is decided in [`wire`](crate::wire).

mod clients;
mod life;
mod watching;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use abi::xen::xenstore::NO_TRANSACTION;

use crate::bytes::Value;
use crate::domain::Domains;
use crate::domid::DomId;
use crate::edit::{self, Edit, Names, Op};
use crate::error::Error;
use crate::journal::Journal;
use crate::path::{Path, Special};
use crate::perms::Perms;
use crate::quota::{Quota, Quotas, Usage, Usages};
use crate::transaction::Transaction;
use crate::tree::{Tree, Visit};
use crate::watch::{Event, Watches};

pub(crate) use clients::Client;
pub use clients::ClientId;

/// What a change adds to what snapshots hold, beside its value: copies of the nodes and directories on the way.
const CHANGE_BYTES: usize = 1024;

/// Number of a transaction, its client's own.
pub type TxId = u32;

/// What can be chosen.
#[derive(Debug, Clone)]
pub struct Config {
    /// Longest value that anybody may store. Clients on the wire read no more than a message holds.
    pub value_max: usize,
    /// Bytes of memory that snapshots of domains' transactions may hold on to; beyond that the oldest of them conflict.
    pub pinned_max: usize,
    /// Limits of domains.
    pub quotas: Quotas,
}

impl Default for Config {
    fn default() -> Config {
        Config { value_max: 1 << 20, pinned_max: 256 << 20, quotas: Quotas::default() }
    }
}

/// The store.
pub struct Store {
    pub(crate) tree: Tree,
    pub(crate) usages: Usages,
    charges: Usages,
    pub(crate) domains: Domains,
    pub(crate) clients: BTreeMap<ClientId, Client>,
    pub(crate) last_client: u64,
    watches: Watches,
    last_watch: u64,
    events: Vec<Event>,
    /// Who may watch special paths.
    pub(crate) special_perms: BTreeMap<Special, Arc<Perms>>,
    config: Config,
    /// Bytes that all changes so far have made a snapshot hold on to, at most.
    replaced: u64,
    /// Snapshots of domains' transactions, by the value of `replaced` when they were taken.
    snapshots: BTreeSet<(u64, ClientId, TxId)>,
    quota_hits: BTreeMap<(DomId, Quota), u64>,
    /// What is written down of the tree, if anything is.
    pub(crate) journal: Option<Journal>,
}

impl Store {
    /// An empty store.
    pub fn new(config: Config) -> Store {
        Store::with_tree(Tree::new(), config)
    }

    pub(crate) fn with_tree(tree: Tree, config: Config) -> Store {
        let mut usages = Usages::default();
        tree.root().each(|node| usages.charge(node.perms().owner.domain, Usage::of_node(node)));
        Store {
            tree,
            usages,
            charges: Usages::default(),
            domains: Domains::new(config.quotas.clone()),
            clients: BTreeMap::new(),
            last_client: 0,
            watches: Watches::default(),
            last_watch: 0,
            events: Vec::new(),
            special_perms: BTreeMap::new(),
            config,
            replaced: 0,
            snapshots: BTreeSet::new(),
            quota_hits: BTreeMap::new(),
            journal: None,
        }
    }

    /// READ. `tx` is [`NO_TRANSACTION`] or a transaction of the client, here and below.
    ///
    /// # Errors
    /// [`Error::Denied`], [`Error::NoNode`].
    pub fn read(&mut self, client: ClientId, tx: TxId, path: &Path) -> Result<Value, Error> {
        let caller = self.caller(client)?;
        match tx {
            NO_TRANSACTION => edit::read(&self.tree, &caller, path),
            _ => self.step(client, tx, |transaction, _, _| transaction.read(&caller, path)),
        }
    }

    /// DIRECTORY, and what DIRECTORY_PART is cut from.
    ///
    /// # Errors
    /// [`Error::Denied`], [`Error::NoNode`].
    pub fn list(&mut self, client: ClientId, tx: TxId, path: &Path) -> Result<Names, Error> {
        let caller = self.caller(client)?;
        match tx {
            NO_TRANSACTION => edit::list(&self.tree, &caller, path),
            _ => self.step(client, tx, |transaction, _, _| transaction.list(&caller, path)),
        }
    }

    /// GET_PERMS.
    ///
    /// # Errors
    /// [`Error::Denied`], [`Error::NoNode`].
    pub fn perms(&mut self, client: ClientId, tx: TxId, path: &Path) -> Result<Arc<Perms>, Error> {
        let caller = self.caller(client)?;
        match tx {
            NO_TRANSACTION => edit::perms(&self.tree, &caller, path),
            _ => self.step(client, tx, |transaction, _, _| transaction.perms(&caller, path)),
        }
    }

    /// WRITE, MKDIR, RM, SET_PERMS.
    ///
    /// # Errors
    /// As the operation and the client's quotas say. Nothing is changed then.
    pub fn apply(&mut self, client: ClientId, tx: TxId, op: Op) -> Result<(), Error> {
        let caller = self.caller(client)?;
        let value_max = self.config.value_max;
        if tx != NO_TRANSACTION {
            return self.step(client, tx, |transaction, settled, domains| transaction.apply(op, caller, settled, domains, value_max));
        }
        self.may_change(op.path())?;
        let (settled, domains) = (&self.usages, &self.domains);
        let mut edit = Edit { tree: &mut self.tree, settled, charges: &mut self.charges, domains, caller, value_max };
        let change = edit.apply(&op).inspect_err(|error| self.note_quota(caller.domain, *error))?;
        self.usages.settle(&mut self.charges);
        self.count_replaced(CHANGE_BYTES + op.size());
        self.fire_change(op.path(), &change);
        Ok(())
    }

    /// TRANSACTION_START.
    ///
    /// # Errors
    /// [`Error::Quota`].
    pub fn begin(&mut self, client: ClientId) -> Result<TxId, Error> {
        let (caller, open) = (self.caller(client)?, self.client(client)?.transactions.len());
        self.allow(caller.domain, caller.privileged, Quota::Transactions, open + 1)?;
        let transaction = Transaction::new(&self.tree, caller, self.replaced);
        let id = self.client_mut(client)?.add_transaction(transaction);
        if !caller.privileged {
            self.snapshots.insert((self.replaced, client, id));
        }
        Ok(id)
    }

    /// TRANSACTION_END with F.
    ///
    /// # Errors
    /// [`Error::NoTransaction`].
    pub fn abort(&mut self, client: ClientId, tx: TxId) -> Result<(), Error> {
        self.take_transaction(client, tx).map(drop)
    }

    /// TRANSACTION_END with T. The transaction is over in any case.
    ///
    /// # Errors
    /// [`Error::NoTransaction`], [`Error::Conflict`], [`Error::TransactionFailed`], [`Error::ReadOnly`].
    pub fn commit(&mut self, client: ClientId, tx: TxId) -> Result<(), Error> {
        let transaction = self.take_transaction(client, tx)?;
        let caller = self.caller(client)?;
        let mut committed = transaction.commit(&self.tree, caller, &self.usages, &self.domains, self.config.value_max)?;
        committed.changed.iter().try_for_each(|(path, _)| self.may_change(path))?;
        let before = std::mem::replace(&mut self.tree, committed.tree);
        self.usages.settle(&mut committed.charges);
        for (path, removed) in &committed.changed {
            self.count_replaced(CHANGE_BYTES + self.tree.get(path).map_or(0, |node| node.value().len()));
            self.fire_commit(&before, path, *removed);
        }
        Ok(())
    }

    /// Whether any client has a transaction open.
    pub fn has_transactions(&self) -> bool {
        self.clients.values().any(|client| !client.transactions.is_empty())
    }

    /// Events since the last call, in order.
    pub fn take_events(&mut self) -> impl Iterator<Item = Event> {
        self.events.drain(..)
    }

    /// Whether the accounts agree with what is there (CONTROL check).
    pub fn is_consistent(&self) -> bool {
        let mut usages = Usages::default();
        self.tree.visit(|_, node| {
            usages.charge(node.perms().owner.domain, Usage::of_node(node));
            Visit::Below
        });
        for client in self.clients.values() {
            usages.charge(client.domain, Usage::of_memory(client.memory()));
        }
        usages == self.usages
    }

    /// How many nodes, clients and bytes there are (CONTROL memreport).
    pub fn totals(&self) -> (i64, usize, i64) {
        let (nodes, memory) = self.usages.iter().fold((0, 0), |(nodes, memory), (_, usage)| (nodes + usage.nodes, memory + usage.memory));
        (nodes, self.clients.len(), memory)
    }

    /// How often `domain` ran into `quota`.
    pub fn quota_hits(&self, domain: DomId, quota: Quota) -> u64 {
        self.quota_hits.get(&(domain, quota)).copied().unwrap_or(0)
    }

    /// Does a step of a transaction if its client may do one more.
    fn step<T>(
        &mut self,
        client: ClientId,
        tx: TxId,
        step: impl FnOnce(&mut Transaction, &Usages, &Domains) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let known = self.clients.get_mut(&client).ok_or(Error::NoClient)?;
        let (domain, privileged) = (known.domain, known.privileged);
        let transaction = known.transactions.get_mut(&tx).ok_or(Error::NoTransaction)?;
        let quotas = self.domains.quotas(domain);
        let steps = i64::try_from(transaction.steps()).unwrap_or(i64::MAX);
        let result = if !privileged && quotas.exceeded(Quota::TransactionNodes, steps + 1) {
            Err(transaction.fail(Quota::TransactionNodes))
        } else if !privileged && quotas.exceeded(Quota::Memory, self.usages.of(domain).memory) {
            Err(transaction.fail(Quota::Memory))
        } else {
            let before = transaction.memory();
            let result = step(transaction, &self.usages, &self.domains);
            self.usages.charge(domain, Usage::of_memory(transaction.memory() - before));
            result
        };
        result.inspect_err(|error| self.note_quota(domain, *error))
    }

    fn take_transaction(&mut self, client: ClientId, tx: TxId) -> Result<Transaction, Error> {
        let known = self.client_mut(client)?;
        let domain = known.domain;
        let transaction = known.transactions.remove(&tx).ok_or(Error::NoTransaction)?;
        self.snapshots.remove(&(transaction.started(), client, tx));
        self.usages.refund(domain, Usage::of_memory(transaction.memory()));
        Ok(transaction)
    }

    /// Holds a limit for a client's `amount`.
    fn allow(&mut self, domain: DomId, privileged: bool, quota: Quota, amount: usize) -> Result<(), Error> {
        let amount = i64::try_from(amount).unwrap_or(i64::MAX);
        if privileged || !self.domains.quotas(domain).exceeded(quota, amount) {
            return Ok(());
        }
        self.note_quota(domain, Error::Quota(quota));
        Err(Error::Quota(quota))
    }

    /// Tells the log which domain hit which quota; less and less often, as a domain can do that all day.
    fn note_quota(&mut self, domain: DomId, error: Error) {
        let Error::Quota(quota) = error else { return };
        let hits = self.quota_hits.entry((domain, quota)).or_default();
        *hits += 1;
        if hits.is_power_of_two() {
            let limit = self.domains.quotas(domain).get(quota);
            tracing::warn!(domain = domain.0, quota = quota.name(), limit, hits = *hits, "quota is used up");
        }
    }

    /// All snapshots together hold at most what was replaced since the oldest was taken: when that is too much, the oldest go.
    fn count_replaced(&mut self, bytes: usize) {
        self.replaced = self.replaced.saturating_add(bytes as u64);
        while let Some(&(started, client, tx)) = self.snapshots.first()
            && self.replaced - started > self.config.pinned_max as u64
        {
            self.snapshots.pop_first();
            if let Some(transaction) = self.clients.get_mut(&client).and_then(|client| client.transactions.get_mut(&tx)) {
                transaction.lose();
                tracing::warn!(client = client.0, tx, "transaction open for too long, it will conflict");
            }
        }
    }
}
