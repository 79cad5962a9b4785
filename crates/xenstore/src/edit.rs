//! What one request does to one tree: rights, quotas, the change itself. The tree is the store's or a transaction's view; the rules are the same.
//!
//! A request fails before it changes anything or charges anybody, or it succeeds.

use std::sync::Arc;

use crate::bytes::Value;
use crate::dir::Dir;
use crate::domain::Domains;
use crate::domid::DomId;
use crate::error::Error;
use crate::path::Path;
use crate::perms::{Caller, Perms};
use crate::quota::{Quota, Usage, Usages};
use crate::tree::{Node, Tree};

/// The children of a node, as listed.
#[derive(Clone, Default)]
pub struct Names(Option<Arc<Dir>>);

impl Names {
    /// A number that is another one after each change of the list; 0 while it is empty.
    pub fn generation(&self) -> u64 {
        self.0.as_ref().map_or(0, |dir| dir.generation())
    }

    /// Bytes of all names with a zero byte after each.
    pub fn listed_bytes(&self) -> usize {
        self.0.as_ref().map_or(0, |dir| dir.listed_bytes())
    }

    /// The names in order.
    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        self.0.iter().flat_map(|dir| dir.iter()).map(|node| node.name().as_bytes())
    }
}

impl PartialEq for Names {
    fn eq(&self, other: &Names) -> bool {
        match (&self.0, &other.0) {
            (Some(a), Some(b)) => a.same_names(b),
            (None, None) => true,
            _ => false,
        }
    }
}

/// READ.
pub fn read(tree: &Tree, caller: &Caller, path: &Path) -> Result<Value, Error> {
    readable(tree, caller, path).map(|node| node.value().clone())
}

/// DIRECTORY.
pub fn list(tree: &Tree, caller: &Caller, path: &Path) -> Result<Names, Error> {
    readable(tree, caller, path).map(|node| Names(node.dir().cloned()))
}

/// GET_PERMS.
pub fn perms(tree: &Tree, caller: &Caller, path: &Path) -> Result<Arc<Perms>, Error> {
    readable(tree, caller, path).map(|node| node.perms().clone())
}

/// The node at `path`, or what the caller may know of its absence: who may not read the nearest existing ancestor learns nothing.
fn readable<'t>(tree: &'t Tree, caller: &Caller, path: &Path) -> Result<&'t Node, Error> {
    let (node, missing) = tree.root().nearest(path.as_str());
    match (node.perms().access(caller).read(), missing.is_nothing()) {
        (false, _) => Err(Error::Denied),
        (true, false) => Err(Error::NoNode),
        (true, true) => Ok(node),
    }
}

/// A change of a tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// WRITE: sets a value, creates what is missing.
    Write(Path, Value),
    /// MKDIR: creates what is missing.
    Mkdir(Path),
    /// RM: removes a node and all below it.
    Remove(Path),
    /// SET_PERMS.
    SetPerms(Path, Arc<Perms>),
}

impl Op {
    /// The node that it is about.
    pub fn path(&self) -> &Path {
        match self {
            Op::Write(path, _) | Op::Mkdir(path) | Op::Remove(path) | Op::SetPerms(path, _) => path,
        }
    }

    /// Bytes that it carries beside the path, as far as they matter.
    pub fn size(&self) -> usize {
        if let Op::Write(_, value) = self { value.len() } else { 0 }
    }
}

/// What an [`Op`] did, as watchers need to know it.
pub enum Change {
    /// Nothing: there was nothing to do.
    None,
    /// A node was created.
    Created(Arc<Perms>),
    /// A value was set.
    Written(Arc<Perms>),
    /// Permissions were changed, from the first to the second.
    Permitted(Arc<Perms>, Arc<Perms>),
    /// A node was removed, with all that it holds.
    Removed(Arc<Node>),
}

/// Everything that an [`Op`] works on.
pub struct Edit<'a> {
    /// The tree to change.
    pub tree: &'a mut Tree,
    /// What domains use outside this edit.
    pub settled: &'a Usages,
    /// By how much this edit changes that.
    pub charges: &'a mut Usages,
    /// Limits.
    pub domains: &'a Domains,
    /// Who asks.
    pub caller: Caller,
    /// Longest value that this store takes from anybody.
    pub value_max: usize,
}

impl Edit<'_> {
    /// Does it.
    ///
    /// # Errors
    /// As the operation says; nothing is changed then.
    pub fn apply(&mut self, op: &Op) -> Result<Change, Error> {
        match op {
            Op::Write(path, value) => self.write(path, value),
            Op::Mkdir(path) => self.mkdir(path),
            Op::Remove(path) => self.remove(path),
            Op::SetPerms(path, perms) => self.set_perms(path, perms),
        }
    }

    fn write(&mut self, path: &Path, value: &Value) -> Result<Change, Error> {
        if value.len() > self.value_max {
            return Err(Error::TooLong);
        }
        self.within(Quota::NodeSize, value.len())?;
        let Some((owner, old)) = self.writable(path)?.map(|node| (node.perms().clone(), node.value().len())) else {
            return self.create(path, value.clone());
        };
        let growth = Usage { nodes: 0, memory: Usage::of_memory(value.len()).memory - Usage::of_memory(old).memory };
        self.charge(owner.owner.domain, growth)?;
        self.tree.set_value(path, value.clone());
        Ok(Change::Written(owner))
    }

    fn mkdir(&mut self, path: &Path) -> Result<Change, Error> {
        match self.writable(path)? {
            Some(_) => Ok(Change::None),
            None => self.create(path, Value::default()),
        }
    }

    fn remove(&mut self, path: &Path) -> Result<Change, Error> {
        if path.is_root() {
            return Err(Error::Refused);
        }
        let (node, missing) = self.tree.root().nearest(path.as_str());
        let access = node.perms().access(&self.caller);
        match (missing.is_nothing(), missing.is_last_name()) {
            (true, _) if !access.write() => return Err(Error::Denied),
            (true, _) => {}
            (false, _) if !access.read() => return Err(Error::Denied),
            (false, true) => return Ok(Change::None),
            (false, false) => return Err(Error::NoNode),
        }
        let removed = self.tree.remove(path).ok_or(Error::NoNode)?;
        removed.each(|node| self.charges.refund(node.perms().owner.domain, Usage::of_node(node)));
        Ok(Change::Removed(removed))
    }

    fn set_perms(&mut self, path: &Path, perms: &Arc<Perms>) -> Result<Change, Error> {
        if path.is_root() {
            return Err(Error::Refused);
        }
        self.within(Quota::NodePermissions, perms.count())?;
        let (node, missing) = self.tree.root().nearest(path.as_str());
        if !missing.is_nothing() {
            return Err(if node.perms().access(&self.caller).read() { Error::NoNode } else { Error::Denied });
        }
        if !node.perms().owned_by(&self.caller) {
            return Err(Error::Denied);
        }
        let (from, to) = (node.perms().owner.domain, perms.owner.domain);
        if !self.caller.privileged && from != to {
            return Err(Error::OwnerFixed);
        }
        let (old, usage) = (node.perms().clone(), Usage::of_node(node));
        self.charges.refund(from, usage);
        self.charges.charge(to, usage);
        self.tree.set_perms(path, perms.clone());
        Ok(Change::Permitted(old, perms.clone()))
    }

    /// Creates the missing nodes of `path`. The right to write the nearest ancestor has been checked.
    fn create(&mut self, path: &Path, value: Value) -> Result<Change, Error> {
        let (parent, missing) = self.tree.root().nearest(path.as_str());
        let perms = parent.perms().passed_on_to(&self.caller).map_or_else(|| parent.perms().clone(), Arc::new);
        let mut usage = Usage::of_memory(value.len());
        for name in missing.names() {
            let node = Usage::of_node(&Node::new(name.as_bytes().into(), Value::default(), perms.clone()));
            usage = Usage { nodes: usage.nodes + node.nodes, memory: usage.memory + node.memory };
        }
        self.charge(perms.owner.domain, usage)?;
        self.tree.create(path, value, &perms);
        Ok(Change::Created(perms))
    }

    /// The node at `path` if it exists. It, or else its nearest existing ancestor, may be written by the caller.
    fn writable(&self, path: &Path) -> Result<Option<&Node>, Error> {
        let (node, missing) = self.tree.root().nearest(path.as_str());
        if !node.perms().access(&self.caller).write() {
            return Err(Error::Denied);
        }
        Ok(missing.is_nothing().then_some(node))
    }

    /// Charges `owner` if that is within its quotas, or the caller is above them. What is given back is always within.
    fn charge(&mut self, owner: DomId, usage: Usage) -> Result<(), Error> {
        if !self.caller.privileged {
            let (settled, here, quotas) = (self.settled.of(owner), self.charges.of(owner), self.domains.quotas(owner));
            let exceeded = |quota, more, now| more > 0 && quotas.exceeded(quota, now + more);
            if exceeded(Quota::Nodes, usage.nodes, settled.nodes + here.nodes) {
                return Err(Error::Quota(Quota::Nodes));
            }
            if owner != DomId::HOST && exceeded(Quota::Memory, usage.memory, settled.memory + here.memory) {
                return Err(Error::Quota(Quota::Memory));
            }
        }
        self.charges.charge(owner, usage);
        Ok(())
    }

    fn within(&self, quota: Quota, amount: usize) -> Result<(), Error> {
        let amount = i64::try_from(amount).unwrap_or(i64::MAX);
        let exceeded = !self.caller.privileged && self.domains.quotas(self.caller.domain).exceeded(quota, amount);
        if exceeded { Err(Error::Quota(quota)) } else { Ok(()) }
    }
}
