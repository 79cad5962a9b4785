//! The whole server as plain data, for a snapshot of a machine or for a new process that takes over without a client noticing.
//!
//! Connections are told apart by their client's number, which stays. Bytes that wait on them are kept, whole messages or not. Transactions
//! keep their numbers but not their snapshots: the commit of each answers EAGAIN, which every client must expect. Sessions of this process are not in it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::bytes::Value;
use crate::domain::Domains;
use crate::domid::DomId;
use crate::path::{Path, Special, Watched};
use crate::perms::Perms;
use crate::server::{Connection, Host, Output, Server};
use crate::store::{Client, ClientId, Config, Store, TxId};
use crate::transaction::Transaction;
use crate::tree::{Node, Tree, Visit};
use crate::watch::Watch;

/// Version of [`State`]'s shape.
pub const VERSION: u32 = 1;

/// Everything that a server knows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// [`VERSION`] of whoever wrote it.
    pub version: u32,
    /// All nodes, parents first.
    pub nodes: Vec<NodeState>,
    /// Domains with their rings, targets and quotas.
    domains: Domains,
    /// Who may watch special paths, where that was changed.
    special_perms: BTreeMap<String, Perms>,
    /// Number of the last client.
    last_client: u64,
    /// Connections in the order of their clients' numbers.
    pub connections: Vec<ConnectionState>,
}

/// A node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NodeState {
    /// Absolute path.
    pub path: String,
    /// Value.
    pub value: Blob,
    /// Permissions.
    pub perms: Perms,
}

/// A connection.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ConnectionState {
    /// Its client.
    pub client: ClientId,
    /// Its domain.
    pub domain: DomId,
    /// Whether it may do everything.
    pub privileged: bool,
    /// Whether it is served through its domain's ring.
    pub ring: bool,
    watches: Vec<WatchState>,
    transactions: Vec<TxId>,
    last_transaction: TxId,
    input: Blob,
    output: Blob,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct WatchState {
    path: String,
    token: Blob,
    hidden: usize,
    depth: Option<u32>,
}

/// Bytes, written as text where they are text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Blob {
    /// UTF-8.
    Text(String),
    /// Anything else.
    Bytes(Vec<u8>),
}

impl Blob {
    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        match self {
            Blob::Text(text) => text.as_bytes(),
            Blob::Bytes(bytes) => bytes,
        }
    }
}

impl From<&[u8]> for Blob {
    fn from(bytes: &[u8]) -> Blob {
        std::str::from_utf8(bytes).map_or_else(|_| Blob::Bytes(bytes.into()), |text| Blob::Text(text.into()))
    }
}

/// Why a state was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum StateError {
    /// It is another version's.
    #[error("store state has version {0}, this program knows {VERSION}")]
    Version(u32),
    /// No server can be in this state.
    #[error("store state is impossible: {what} {at:?}")]
    Impossible {
        /// What is wrong.
        what: &'static str,
        /// Where.
        at: String,
    },
}

fn impossible(what: &'static str, at: &str) -> StateError {
    StateError::Impossible { what, at: at.into() }
}

impl Server {
    /// The server as it is.
    pub fn state(&self) -> State {
        let store = &self.store;
        let mut nodes = Vec::new();
        store.tree.visit(|path, node| {
            nodes.push(NodeState::of(path, node));
            Visit::Below
        });
        let special = store.special_perms.iter();
        let connections = store.clients.iter().filter_map(|(id, client)| Some((*id, client, self.connections.get(id)?)));
        State {
            version: VERSION,
            nodes,
            domains: store.domains.clone(),
            special_perms: special.map(|(special, perms)| (special.path().to_string(), Perms::clone(perms))).collect(),
            last_client: store.last_client,
            connections: connections.map(|(id, client, connection)| self.connection_state(id, client, connection)).collect(),
        }
    }

    /// A server that begins with `nodes`, parents first, which an earlier server left behind. The domains that it knew are gone, and what was theirs
    /// with them.
    ///
    /// # Errors
    /// [`StateError::Impossible`].
    pub fn with_nodes(nodes: &[NodeState], config: Config, host: Box<dyn Host>) -> Result<Server, StateError> {
        let tree = if nodes.is_empty() { Tree::new() } else { Tree::of_nodes(nodes)? };
        let mut server = Server::new(Store::with_tree(tree, config), host);
        let named: BTreeSet<DomId> = nodes.iter().flat_map(|node| node.perms.entries()).map(|entry| entry.domain).collect();
        named.into_iter().filter(|domain| domain.is_machine()).for_each(|domain| server.forget(domain));
        Ok(server)
    }

    /// A server that goes on from `state`. Rings are not introduced to `host` again; [`State::connections`] tells which there are.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn restored(state: State, config: Config, host: Box<dyn Host>) -> Result<Server, StateError> {
        if state.version != VERSION {
            return Err(StateError::Version(state.version));
        }
        let mut store = Store::with_tree(Tree::of_nodes(&state.nodes)?, config);
        store.domains = state.domains;
        for (text, perms) in state.special_perms {
            let special = Special::of(text.as_bytes()).ok_or_else(|| impossible("no special path", &text))?;
            store.special_perms.insert(special, Arc::new(perms));
        }
        // Half of the numbers are more than any server gives away, and the other half is enough for all that follow.
        if state.last_client > u64::MAX / 2 {
            return Err(impossible("number of clients", &state.last_client.to_string()));
        }
        store.last_client = state.last_client;
        let mut server = Server::new(store, host);
        let clients: Vec<ClientId> = state.connections.iter().map(|connection| connection.client).collect();
        state.connections.into_iter().try_for_each(|connection| server.restore_connection(connection))?;
        clients.into_iter().for_each(|client| server.proceed(client));
        Ok(server)
    }

    fn connection_state(&self, id: ClientId, client: &Client, connection: &Connection) -> ConnectionState {
        let mut watches: Vec<&Arc<Watch>> = client.watches.values().collect();
        watches.sort_by_key(|watch| watch.id);
        let watch = |watch: &Arc<Watch>| WatchState {
            path: watch.path.to_string(),
            token: (*watch.token).into(),
            hidden: watch.hidden,
            depth: watch.depth,
        };
        ConnectionState {
            client: id,
            domain: client.domain,
            privileged: client.privileged,
            ring: self.ring(client.domain) == Some(id),
            watches: watches.into_iter().map(watch).collect(),
            transactions: client.transactions.keys().copied().collect(),
            last_transaction: client.last_transaction,
            input: connection.input.as_slice().into(),
            output: connection.output.all().as_slice().into(),
        }
    }

    fn restore_connection(&mut self, state: ConnectionState) -> Result<(), StateError> {
        let id = state.client;
        if id.0 > self.store.last_client || self.store.clients.contains_key(&id) {
            return Err(impossible("client", &id.0.to_string()));
        }
        let mut client = Client::new(state.domain, state.privileged);
        client.last_transaction = state.last_transaction;
        client.transactions = state.transactions.into_iter().map(|tx| (tx, Transaction::lost())).collect();
        self.store.clients.insert(id, client);
        for watch in state.watches {
            let known = Watched::parse(watch.path.as_bytes(), DomId::HOST, 0).ok().filter(|known| **known.text() == *watch.path);
            let path = known.ok_or_else(|| impossible("watch", &watch.path))?.text().clone();
            if self.store.has_watch(id, &path, watch.token.as_bytes()) {
                return Err(impossible("watch twice", &path));
            }
            let watch = Watch {
                id: self.store.next_watch(),
                client: id,
                path,
                token: watch.token.as_bytes().into(),
                hidden: watch.hidden,
                depth: watch.depth,
            };
            self.store.add_watch(watch).map_err(|_| impossible("watch", &id.0.to_string()))?;
        }
        let ring = state.ring.then_some(state.domain);
        self.restore(id, state.privileged, ring, state.input.as_bytes(), Output::resumed(state.output.as_bytes().to_vec()));
        Ok(())
    }
}

impl Tree {
    /// Builds a tree. Nodes on the way to another must be there already.
    pub(crate) fn of_nodes(nodes: &[NodeState]) -> Result<Tree, StateError> {
        let mut nodes = nodes.iter();
        let root = nodes.next().filter(|root| root.path == "/").ok_or_else(|| impossible("no root before", "/"))?;
        let mut last_perms = Arc::new(root.perms.clone());
        let mut tree = Tree::with_root(Node::new(Default::default(), root.value.as_bytes().into(), last_perms.clone()));
        for node in nodes {
            let path = Path::parse(node.path.as_bytes(), DomId::HOST, 0).map_err(|_| impossible("path", &node.path))?;
            if path.as_str() != node.path || !tree.root().nearest(path.as_str()).1.is_last_name() {
                return Err(impossible("parent missing, or node twice", &node.path));
            }
            // Neighbours mostly have equal permissions, which they then share.
            if *last_perms != node.perms {
                last_perms = Arc::new(node.perms.clone());
            }
            tree.create(&path, Value::from(node.value.as_bytes()), &last_perms);
        }
        Ok(tree)
    }
}

impl NodeState {
    /// What `node` at `path` is.
    pub(crate) fn of(path: &str, node: &Node) -> NodeState {
        NodeState { path: path.into(), value: node.value().as_bytes().into(), perms: Perms::clone(node.perms()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{NoHost, Op, Ring};

    fn server() -> Server {
        let mut server = Server::new(Store::new(Config::default()), Box::new(NoHost));
        let host = server.connect(DomId::HOST, true);
        for (path, value) in [("/a", &b"text"[..]), ("/a/b/c", b"\xff\0"), ("/z", b"")] {
            let path = Path::parse(path.as_bytes(), DomId::HOST, 0).unwrap();
            server.store().apply(host, 0, Op::Write(path, value.into())).unwrap();
        }
        let guest = server.introduce(DomId(3), Ring { gfn: 7, port: 9 }).unwrap();
        let watched = server.store.watched(guest, b"data").unwrap();
        server.store().watch(guest, &watched, b"token", Some(2)).unwrap();
        server.store().begin(guest).unwrap();
        server.receive(guest, &[2, 0, 0, 0, 9]);
        server
    }

    #[test]
    fn state_survives_the_way_through_json() {
        let state = server().state();
        let text = serde_json::to_string(&state).unwrap();
        let restored = Server::restored(serde_json::from_str(&text).unwrap(), Config::default(), Box::new(NoHost)).unwrap();
        assert_eq!(restored.state(), state);
        assert!(restored.store.is_consistent());
    }

    #[test]
    fn open_transaction_conflicts_in_the_new_process() {
        let mut server = Server::restored(server().state(), Config::default(), Box::new(NoHost)).unwrap();
        let guest = server.ring(DomId(3)).unwrap();
        assert_eq!(server.store().commit(guest, 1), Err(crate::Error::Conflict));
        assert_eq!(server.store().begin(guest), Ok(2));
    }

    #[test]
    fn impossible_states_are_refused() {
        let refused = |change: &dyn Fn(&mut State)| {
            let mut state = server().state();
            change(&mut state);
            Server::restored(state, Config::default(), Box::new(NoHost)).err().expect("an impossible state")
        };
        assert_eq!(refused(&|state| state.version = 2), StateError::Version(2));
        refused(&|state| drop(state.nodes.remove(0)));
        refused(&|state| drop(state.nodes.remove(1)));
        refused(&|state| state.nodes.clear());
        refused(&|state| state.nodes[2].path = "/a//b".into());
        refused(&|state| state.connections[0].client = ClientId(99));
        refused(&|state| state.connections.push(state.connections[0].clone()));
        refused(&|state| state.last_client = u64::MAX);
        let guest = 1;
        refused(&|state| state.connections[guest].watches.extend_from_within(..));
        refused(&|state| state.connections[guest].watches[0].path = "relative".into());
        refused(&|state| state.connections[guest].watches[0].path = "/a//b".into());
        refused(&|state| drop(state.special_perms.insert("@x".into(), Perms::private(DomId::HOST))));
    }
}
