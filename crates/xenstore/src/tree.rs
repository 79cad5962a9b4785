//! The tree of nodes. Copying it is one reference count: that is what a transaction's snapshot is.
//!
//! A change walks from the root to its node and makes each node on the way its own: in place when no snapshot holds it, else as a copy
//! ([`Dir`] does the same inside a directory). Paths may be a thousand names deep, so everything here loops and nothing recurses, dropping included.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::bytes::{Name, Value};
use crate::dir::Dir;
use crate::domid::DomId;
use crate::path::{Path, names};
use crate::perms::Perms;

/// What a node costs beside its name and value: itself, its place in the directory, and what the allocator adds.
const NODE_BYTES: usize = 128;

/// A node: a value, permissions, children.
#[derive(Clone)]
pub struct Node {
    name: Name,
    value: Value,
    perms: Arc<Perms>,
    dir: Option<Arc<Dir>>,
}
const _: () = assert!(size_of::<Node>() == 56);

impl Node {
    /// A node without children.
    pub fn new(name: Name, value: Value, perms: Arc<Perms>) -> Node {
        Node { name, value, perms, dir: None }
    }

    /// Its name in its directory; the root's is empty.
    pub fn name(&self) -> &Name {
        &self.name
    }

    /// Its value.
    pub fn value(&self) -> &Value {
        &self.value
    }

    /// Its permissions.
    pub fn perms(&self) -> &Arc<Perms> {
        &self.perms
    }

    /// Its children, if it has any.
    pub fn dir(&self) -> Option<&Arc<Dir>> {
        self.dir.as_ref()
    }

    /// Bytes of memory that it is charged with.
    pub fn memory(&self) -> usize {
        NODE_BYTES + self.name.len() + self.value.len()
    }

    /// The node below this one at `path`, and what of `path` does not exist. The node found is the nearest that does.
    pub fn nearest<'a>(&self, path: &'a str) -> (&Node, Missing<'a>) {
        let mut node = self;
        let mut rest = path.strip_prefix('/').unwrap_or(path);
        while !rest.is_empty() {
            let (name, below) = rest.split_once('/').unwrap_or((rest, ""));
            match node.dir.as_ref().and_then(|dir| dir.get(name.as_bytes())) {
                Some(child) => node = child,
                None => break,
            }
            rest = below;
        }
        (node, Missing(rest))
    }

    /// The node below this one at `path`.
    pub fn get(&self, path: &str) -> Option<&Node> {
        let (node, missing) = self.nearest(path);
        missing.is_nothing().then_some(node)
    }

    /// This node and all below it, in no particular order.
    pub fn each(&self, mut f: impl FnMut(&Node)) {
        let mut nodes = vec![self];
        while let Some(node) = nodes.pop() {
            f(node);
            nodes.extend(node.dir.iter().flat_map(|dir| dir.iter()).map(Arc::as_ref));
        }
    }

    fn child_mut(&mut self, name: &str) -> Option<&mut Node> {
        Arc::make_mut(self.dir.as_mut()?).get_mut(name.as_bytes())
    }
}

impl Drop for Node {
    /// Takes the subtree apart level by level: nested drops would overflow the stack in a deep tree.
    fn drop(&mut self) {
        let Some(dir) = self.dir.take() else { return };
        let (mut dirs, mut nodes) = (vec![dir], Vec::new());
        while let Some(dir) = dirs.pop() {
            if let Some(dir) = Arc::into_inner(dir) {
                dir.dissolve(&mut nodes);
            }
            dirs.extend(nodes.drain(..).filter_map(Arc::into_inner).filter_map(|mut node| node.dir.take()));
        }
    }
}

/// The part of a path that does not exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Missing<'a>(&'a str);

impl<'a> Missing<'a> {
    /// Whether the whole path exists.
    pub fn is_nothing(self) -> bool {
        self.0.is_empty()
    }

    /// Whether only the last name does not exist.
    pub fn is_last_name(self) -> bool {
        !self.0.is_empty() && !self.0.contains('/')
    }

    /// The names that do not exist.
    pub fn names(self) -> impl DoubleEndedIterator<Item = &'a str> {
        self.0.split('/').filter(|name| !name.is_empty())
    }
}

/// Where a visitor goes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Visit {
    /// To the children.
    Below,
    /// Not to the children.
    Past,
}

/// All nodes.
#[derive(Clone)]
pub struct Tree {
    root: Arc<Node>,
    /// One counter for all copies, so that a generation never means two things.
    generations: Arc<AtomicU64>,
}

impl Tree {
    /// Nothing but the root, the host's, which nobody else may change.
    pub fn new() -> Tree {
        Tree::with_root(Node::new(Name::default(), Value::default(), Arc::new(Perms::private(DomId::HOST))))
    }

    /// Nothing but `root`.
    pub fn with_root(root: Node) -> Tree {
        Tree { root: Arc::new(root), generations: Arc::default() }
    }

    /// The root.
    pub fn root(&self) -> &Node {
        &self.root
    }

    /// Whether nothing has changed between the two.
    pub fn is_same(&self, other: &Tree) -> bool {
        Arc::ptr_eq(&self.root, &other.root)
    }

    /// The node at `path`.
    pub fn get(&self, path: &Path) -> Option<&Node> {
        self.root.get(path.as_str())
    }

    /// Changes the value of an existing node.
    pub fn set_value(&mut self, path: &Path, value: Value) {
        if let Some(node) = self.node_mut(path.names()) {
            node.value = value;
        }
    }

    /// Changes the permissions of an existing node.
    pub fn set_perms(&mut self, path: &Path, perms: Arc<Perms>) {
        if let Some(node) = self.node_mut(path.names()) {
            node.perms = perms;
        }
    }

    /// Creates the missing nodes of `path`, all with `perms`, the last one with `value`.
    pub fn create(&mut self, path: &Path, value: Value, perms: &Arc<Perms>) {
        let (_, missing) = self.root.nearest(path.as_str());
        let mut names = missing.names().rev();
        let Some(last) = names.next() else { return };
        let mut top = Node::new(last.as_bytes().into(), value, perms.clone());
        for name in names {
            let mut parent = Node::new(name.as_bytes().into(), Value::default(), perms.clone());
            parent.dir = Some(Arc::new(Dir::of(Arc::new(top), self.next_generation())));
            top = parent;
        }
        let generation = self.next_generation();
        let existing = path.names().count() - missing.names().count();
        if let Some(node) = self.node_mut(path.names().take(existing)) {
            match &mut node.dir {
                Some(dir) => Arc::make_mut(dir).insert(Arc::new(top), generation),
                empty => *empty = Some(Arc::new(Dir::of(Arc::new(top), generation))),
            }
        }
    }

    /// Takes out the node at `path` with all below it. The root stays.
    pub fn remove(&mut self, path: &Path) -> Option<Arc<Node>> {
        let (parent, name) = path.as_str().rsplit_once('/')?;
        let (parent, name) = (parent.to_owned(), name.to_owned());
        self.get(path)?;
        let generation = self.next_generation();
        let node = self.node_mut(names(&parent))?;
        let dir = node.dir.as_mut()?;
        if dir.count() == 1 {
            let only = dir.get(name.as_bytes()).cloned();
            node.dir = None;
            return only;
        }
        Arc::make_mut(dir).remove(name.as_bytes(), generation)
    }

    /// Calls `f` with each node and its path, parents first, children in the order of their names; below a node only as `f` wants.
    pub fn visit(&self, mut f: impl FnMut(&str, &Node) -> Visit) {
        let mut path = String::new();
        let mut open = Vec::new();
        if f("/", &self.root) == Visit::Below {
            open.extend(self.root.dir().map(|dir| (dir.iter(), 0)));
        }
        while let Some((children, length)) = open.last_mut() {
            path.truncate(*length);
            let Some(node) = children.next() else {
                open.pop();
                continue;
            };
            path.push('/');
            path.extend(node.name().as_bytes().iter().copied().map(char::from));
            if f(&path, node) == Visit::Below {
                open.extend(node.dir().map(|dir| (dir.iter(), path.len())));
            }
        }
    }

    fn node_mut<'p>(&mut self, names: impl Iterator<Item = &'p str>) -> Option<&mut Node> {
        let mut node = Arc::make_mut(&mut self.root);
        for name in names {
            node = node.child_mut(name)?;
        }
        Some(node)
    }

    fn next_generation(&self) -> u64 {
        self.generations.fetch_add(1, Ordering::Relaxed) + 1
    }
}

impl Default for Tree {
    fn default() -> Tree {
        Tree::new()
    }
}
