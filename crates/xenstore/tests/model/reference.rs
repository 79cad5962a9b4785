//! The reference model: as simple as can be, as slow as it likes.

use std::collections::BTreeMap;

use xenstore::Perms;

/// Nodes of a domain.
pub const NODES_MAX: usize = 7;
/// Bytes of a guest's value.
pub const SIZE_MAX: usize = 8;
/// Entries of a guest's permissions.
pub const PERMS_MAX: usize = 3;

/// Client, path, token.
pub type Event = (usize, String, String);

type Answer = Result<Vec<u8>, &'static str>;
type Nodes = BTreeMap<String, Node>;

/// A request on a node. Permissions are joined by zero bytes.
#[derive(Debug, Clone, PartialEq)]
pub enum Request {
    Read(&'static str),
    List(&'static str),
    GetPerms(&'static str),
    Write(&'static str, &'static str),
    Mkdir(&'static str),
    Remove(&'static str),
    SetPerms(&'static str, &'static str),
}

#[derive(Debug, Clone, PartialEq)]
struct Node {
    value: Vec<u8>,
    perms: Vec<(char, u16)>,
}

#[derive(Clone)]
struct Transaction {
    base: Nodes,
    view: Nodes,
    log: Vec<(Request, Answer)>,
    changed: bool,
    failed: bool,
    lost: bool,
}

struct Watch {
    path: String,
    written: String,
    token: String,
    depth: Option<u32>,
}

struct Client {
    domain: u16,
    watches: Vec<Watch>,
    transactions: BTreeMap<u32, Transaction>,
    last: u32,
}

#[derive(Clone, Copy)]
struct Caller {
    domain: u16,
    target: Option<u16>,
}

/// What a request changed: the node's path, and whether it was removed.
type Change = Option<(String, bool)>;

pub struct Model {
    nodes: Nodes,
    clients: Vec<Client>,
    targets: BTreeMap<u16, u16>,
    events: Vec<Event>,
}

fn parse_perms(text: &str) -> Vec<(char, u16)> {
    text.split('\0').map(|entry| (entry.chars().next().unwrap(), entry[1..].parse().unwrap())).collect()
}

fn parent(path: &str) -> String {
    match path.rsplit_once('/').unwrap().0 {
        "" => "/".into(),
        parent => parent.into(),
    }
}

/// Whether `path` is below `above`.
fn is_below(path: &str, above: &str) -> bool {
    path != above && (above == "/" || path.starts_with(&format!("{above}/")))
}

fn nearest(nodes: &Nodes, path: &str) -> String {
    let mut path = path.to_owned();
    while !nodes.contains_key(&path) {
        path = parent(&path);
    }
    path
}

impl Caller {
    fn is(self, domain: u16) -> bool {
        self.domain == domain || self.target == Some(domain)
    }

    fn owns(self, node: &Node) -> bool {
        self.domain == 0 || self.is(node.perms[0].1)
    }

    fn may(self, node: &Node, letter: char) -> bool {
        let named = node.perms[1..].iter().find(|(_, domain)| self.is(*domain)).unwrap_or(&node.perms[0]);
        self.owns(node) || named.0 == letter || named.0 == 'b'
    }
}

impl Model {
    pub fn new(domains: &[u16]) -> Model {
        let root = Node { value: vec![], perms: vec![('n', 0)] };
        let client = |domain: &u16| Client { domain: *domain, watches: vec![], transactions: BTreeMap::new(), last: 0 };
        Model {
            nodes: Nodes::from([("/".to_owned(), root)]),
            clients: domains.iter().map(client).collect(),
            targets: BTreeMap::new(),
            events: vec![],
        }
    }

    pub fn ask(&mut self, client: usize, tx: u32, request: &Request) -> Answer {
        let caller = self.caller(client);
        if tx == 0 {
            let before = self.nodes.clone();
            let (answer, change) = execute(&mut self.nodes, &[], caller, request);
            self.fire(&before, change);
            return answer;
        }
        let current = &self.nodes;
        let transaction = self.clients[client].transactions.get_mut(&tx).ok_or("ENOENT")?;
        if transaction.lost {
            return Err("EAGAIN");
        }
        // What others have added since the start counts too.
        let owned = |nodes: &Nodes| nodes.values().filter(|node| node.perms[0].1 == caller.domain).count() as i64;
        let added = owned(current) - owned(&transaction.base);
        let (answer, change) = execute(&mut transaction.view, &[added], caller, request);
        transaction.changed |= change.is_some();
        transaction.failed |= answer == Err("ENOSPC");
        transaction.log.push((request.clone(), answer.clone()));
        answer
    }

    pub fn start(&mut self, client: usize) -> Answer {
        let (nodes, client) = (&self.nodes, &mut self.clients[client]);
        if client.domain != 0 && client.transactions.len() >= 10 {
            return Err("ENOSPC");
        }
        client.last += 1;
        let transaction = Transaction { base: nodes.clone(), view: nodes.clone(), log: vec![], changed: false, failed: false, lost: false };
        client.transactions.insert(client.last, transaction);
        Ok(format!("{}\0", client.last).into())
    }

    pub fn end(&mut self, client: usize, tx: u32, commit: bool) -> Result<(), &'static str> {
        let transaction = self.clients[client].transactions.remove(&tx).ok_or("ENOENT")?;
        if !commit {
            return Ok(());
        }
        if transaction.lost {
            return Err("EAGAIN");
        }
        if transaction.failed {
            return Err("ENOMEM");
        }
        let caller = self.caller(client);
        if !transaction.changed {
            return Ok(());
        }
        let (mut now, mut changed) = (self.nodes.clone(), vec![]);
        for (request, answer) in transaction.log {
            let (again, change) = execute(&mut now, &[], caller, &request);
            changed.extend(change);
            if again != answer {
                return Err("EAGAIN");
            }
        }
        let before = std::mem::replace(&mut self.nodes, now);
        for (path, _) in &changed {
            let removed = changed.contains(&(path.clone(), true));
            self.fire(&before, Some((path.clone(), removed)));
        }
        Ok(())
    }

    pub fn watch(&mut self, client: usize, path: &str, token: &str, depth: Option<u32>) -> Result<(), &'static str> {
        let absolute = self.absolute(client, path);
        if path.starts_with('@') && depth.is_some_and(|depth| depth != 1) {
            return Err("EINVAL");
        }
        let watches = &mut self.clients[client].watches;
        if watches.iter().any(|watch| watch.path == absolute && watch.token == token) {
            return Err("EEXIST");
        }
        watches.push(Watch { path: absolute, written: path.into(), token: token.into(), depth });
        self.events.push((client, path.into(), token.into()));
        Ok(())
    }

    pub fn unwatch(&mut self, client: usize, path: &str, token: &str) -> Result<(), &'static str> {
        let absolute = self.absolute(client, path);
        let watches = &mut self.clients[client].watches;
        let found = watches.iter().position(|watch| watch.path == absolute && watch.token == token).ok_or("ENOENT")?;
        watches.remove(found);
        Ok(())
    }

    pub fn reset(&mut self, client: usize) {
        self.clients[client].watches.clear();
        self.clients[client].transactions.clear();
    }

    pub fn crash(&mut self, client: usize, counts_anew: bool) {
        self.reset(client);
        if counts_anew {
            self.clients[client].last = 0;
        }
    }

    pub fn die(&mut self, domain: u16) {
        for client in 0..self.clients.len() {
            if self.clients[client].domain == domain {
                self.crash(client, true);
            }
            for transaction in self.clients[client].transactions.values_mut() {
                let grants = |(request, _): &(Request, Answer)| matches!(request, Request::SetPerms(_, perms) if parse_perms(perms).iter().any(|(_, other)| *other == domain));
                transaction.lost |= transaction.log.iter().any(grants);
            }
        }
        for node in self.nodes.values_mut() {
            let owner = node.perms[0];
            node.perms.retain(|(_, other)| *other != domain);
            if owner.1 == domain {
                node.perms.insert(0, owner);
            }
        }
        let owned: Vec<String> = self.nodes.iter().filter(|(_, node)| node.perms[0].1 == domain).map(|(path, _)| path.clone()).collect();
        for path in owned {
            let before = self.nodes.clone();
            self.nodes.retain(|other, _| *other != path && !is_below(other, &path));
            if before.contains_key(&path) {
                self.fire(&before, Some((path, true)));
            }
        }
        self.targets.remove(&domain);
        self.targets.retain(|_, target| *target != domain);
        for (number, client) in self.clients.iter().enumerate() {
            for watch in client.watches.iter().filter(|watch| watch.path == "@releaseDomain") {
                let path = if watch.depth.is_some() { format!("@releaseDomain/{domain}") } else { watch.path.clone() };
                self.events.push((number, path, watch.token.clone()));
            }
        }
    }

    pub fn set_target(&mut self, domain: u16, target: u16) {
        self.targets.insert(domain, target);
    }

    /// All open transactions have lost their snapshots.
    pub fn restart(&mut self) {
        let open = self.clients.iter_mut().flat_map(|client| client.transactions.values_mut());
        open.for_each(|transaction| transaction.lost = true);
    }

    pub fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    /// All nodes in the order that a walk through the tree meets them in.
    pub fn tree(&self) -> Vec<(String, Vec<u8>, Perms)> {
        let mut nodes: Vec<_> = self.nodes.iter().collect();
        nodes.sort_by_key(|(path, _)| path.split('/').filter(|name| !name.is_empty()).map(str::to_owned).collect::<Vec<_>>());
        let perms = |node: &Node| {
            let entries: Vec<String> = node.perms.iter().map(|(letter, domain)| format!("{letter}{domain}")).collect();
            Perms::parse(entries.iter().map(|entry| entry.as_bytes())).unwrap()
        };
        nodes.into_iter().map(|(path, node)| (path.clone(), node.value.clone(), perms(node))).collect()
    }

    fn caller(&self, client: usize) -> Caller {
        let domain = self.clients[client].domain;
        Caller { domain, target: self.targets.get(&domain).copied() }
    }

    fn absolute(&self, client: usize, path: &str) -> String {
        absolute(self.clients[client].domain, path)
    }

    /// Events of a change that has been made, given all nodes before it.
    fn fire(&mut self, before: &Nodes, change: Change) {
        let Some((path, removed)) = change else { return };
        let (was, is) = (before.get(&path), self.nodes.get(&path));
        if was.is_none() && is.is_none() {
            return;
        }
        let above = if is.is_none() { self.nodes.get(&nearest(&self.nodes, &path)) } else { None };
        for number in 0..self.clients.len() {
            let (client, caller) = (&self.clients[number], self.caller(number));
            for watch in &client.watches {
                let levels = path.split('/').filter(|name| !name.is_empty()).count()
                    - watch
                        .path
                        .split('/')
                        .filter(|name| !name.is_empty())
                        .count()
                        .min(path.split('/').filter(|name| !name.is_empty()).count());
                let covers = (path == watch.path || is_below(&path, &watch.path)) && watch.depth.is_none_or(|depth| levels as u32 <= depth);
                let visible = [was, is, above].into_iter().flatten().any(|node| caller.may(node, 'r'));
                let hidden = watch.path.len() - watch.written.len();
                if covers && visible {
                    self.events.push((number, path[hidden..].to_owned(), watch.token.clone()));
                }
                let gone = removed && was.is_some() && is_below(&watch.path, &path) && !self.nodes.contains_key(&watch.path);
                if gone && before.get(&watch.path).is_some_and(|node| caller.may(node, 'r')) {
                    self.events.push((number, watch.written.clone(), watch.token.clone()));
                }
            }
        }
    }
}

fn absolute(domain: u16, path: &str) -> String {
    if path.starts_with(['/', '@']) { path.into() } else { format!("/local/domain/{domain}/{path}") }
}

/// Does a request. `elsewhere` is what the caller owns beside `nodes`.
fn execute(nodes: &mut Nodes, elsewhere: &[i64], caller: Caller, request: &Request) -> (Answer, Change) {
    let mut change = None;
    let answer = try_execute(nodes, elsewhere, caller, request, &mut change);
    (answer, change)
}

fn try_execute(nodes: &mut Nodes, elsewhere: &[i64], caller: Caller, request: &Request, change: &mut Change) -> Answer {
    let (Request::Read(path)
    | Request::List(path)
    | Request::GetPerms(path)
    | Request::Write(path, _)
    | Request::Mkdir(path)
    | Request::Remove(path)
    | Request::SetPerms(path, _)) = request;
    let path = absolute(caller.domain, path);
    let near = nearest(nodes, &path);
    let (exists, guest) = (near == path, caller.domain != 0);
    let readable = caller.may(&nodes[&near], 'r');
    let writable = caller.may(&nodes[&near], 'w');
    let ok = Ok(b"OK\0".to_vec());
    match request {
        Request::Read(_) | Request::List(_) | Request::GetPerms(_) if !readable => Err("EACCES"),
        Request::Read(_) | Request::List(_) | Request::GetPerms(_) if !exists => Err("ENOENT"),
        Request::Read(_) => Ok(nodes[&path].value.clone()),
        Request::List(_) => {
            let children = nodes.keys().filter(|other| *other != "/" && parent(other) == path);
            Ok(children.map(|child| format!("{}\0", child.rsplit_once('/').unwrap().1)).collect::<String>().into())
        }
        Request::GetPerms(_) => {
            Ok(nodes[&path].perms.iter().map(|(letter, domain)| format!("{letter}{domain}\0")).collect::<String>().into())
        }
        Request::Write(_, value) if guest && value.len() > SIZE_MAX => Err("ENOSPC"),
        Request::Write(..) | Request::Mkdir(_) if !writable => Err("EACCES"),
        Request::Write(..) | Request::Mkdir(_) => {
            let value = if let Request::Write(_, value) = request { Some(value.as_bytes().to_vec()) } else { None };
            if exists {
                if let Some(value) = value {
                    nodes.get_mut(&path).unwrap().value = value;
                    *change = Some((path, false));
                }
                return ok;
            }
            let mut perms = nodes[&near].perms.clone();
            if guest {
                perms[0].1 = caller.domain;
            }
            let missing: Vec<String> =
                std::iter::successors(Some(path.clone()), |path| Some(parent(path))).take_while(|path| *path != near).collect();
            let owned = nodes.values().filter(|node| node.perms[0].1 == caller.domain).count() + missing.len();
            if guest && owned as i64 + elsewhere.iter().sum::<i64>() > NODES_MAX as i64 {
                return Err("ENOSPC");
            }
            for path in missing {
                nodes.insert(path, Node { value: vec![], perms: perms.clone() });
            }
            nodes.get_mut(&path).unwrap().value = value.unwrap_or_default();
            *change = Some((path, false));
            ok
        }
        Request::Remove(_) if path == "/" => Err("EINVAL"),
        Request::Remove(_) if exists && !writable => Err("EACCES"),
        Request::Remove(_) if !exists && !readable => Err("EACCES"),
        Request::Remove(_) if !exists && parent(&path) != near => Err("ENOENT"),
        Request::Remove(_) => {
            if exists {
                nodes.retain(|other, _| *other != path && !is_below(other, &path));
                *change = Some((path, true));
            }
            ok
        }
        Request::SetPerms(..) if path == "/" => Err("EINVAL"),
        Request::SetPerms(_, perms) if guest && parse_perms(perms).len() > PERMS_MAX => Err("ENOSPC"),
        Request::SetPerms(..) if !exists => Err(if readable { "ENOENT" } else { "EACCES" }),
        Request::SetPerms(..) if !caller.owns(&nodes[&path]) => Err("EACCES"),
        Request::SetPerms(_, perms) => {
            let (perms, node) = (parse_perms(perms), nodes.get_mut(&path).unwrap());
            if guest && perms[0].1 != node.perms[0].1 {
                return Err("EPERM");
            }
            node.perms = perms;
            *change = Some((path, false));
            ok
        }
    }
}
