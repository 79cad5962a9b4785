//! Children of a node: a B+ tree in the order of names, of which a change copies only what snapshots still need.
//!
//! Leaves hold nodes, inner branches hold the least name that each of their branches may hold. `Arc::make_mut` decides: what nobody else holds is
//! changed in place, the rest is copied, at most [`MOST`] pointers on each level. So neither a write below a directory of thousands of
//! children nor a snapshot of it costs more than a logarithm. Branches that become empty go away; half empty ones stay as they are.

use std::slice;
use std::sync::Arc;

use crate::bytes::Name;
use crate::tree::Node;

/// Most entries of a branch.
const MOST: usize = 32;

/// Children of a node; never empty.
#[derive(Clone)]
pub struct Dir {
    generation: u64,
    count: usize,
    listed: usize,
    root: Branch,
}

#[derive(Clone)]
enum Branch {
    Leaf(Vec<Arc<Node>>),
    Inner(Vec<(Name, Arc<Branch>)>),
}

impl Dir {
    /// A directory of one child.
    pub fn of(node: Arc<Node>, generation: u64) -> Dir {
        Dir { generation, count: 1, listed: listed(&node), root: Branch::Leaf(vec![node]) }
    }

    /// A number that is another one after each change of the set of names, in the whole store.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// How many children.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Bytes of the list of names with a zero byte after each.
    pub fn listed_bytes(&self) -> usize {
        self.listed
    }

    /// The child with this name.
    pub fn get(&self, name: &[u8]) -> Option<&Arc<Node>> {
        let mut branch = &self.root;
        loop {
            match branch {
                Branch::Leaf(nodes) => return nodes.get(position(nodes, name).ok()?),
                Branch::Inner(parts) => branch = &parts.get(responsible(parts, name))?.1,
            }
        }
    }

    /// The child with this name, to change it; not its name.
    pub fn get_mut(&mut self, name: &[u8]) -> Option<&mut Node> {
        let mut branch = &mut self.root;
        loop {
            match branch {
                Branch::Leaf(nodes) => {
                    let at = position(nodes, name).ok()?;
                    return nodes.get_mut(at).map(Arc::make_mut);
                }
                Branch::Inner(parts) => {
                    let at = responsible(parts, name);
                    branch = Arc::make_mut(&mut parts.get_mut(at)?.1);
                }
            }
        }
    }

    /// Adds a child, whose name must be new here.
    pub fn insert(&mut self, node: Arc<Node>, generation: u64) {
        self.generation = generation;
        self.count += 1;
        self.listed += listed(&node);
        if let Some((least, right)) = self.root.insert(node) {
            let left = std::mem::replace(&mut self.root, Branch::Leaf(Vec::new()));
            self.root = Branch::Inner(vec![(Name::default(), Arc::new(left)), (least, Arc::new(right))]);
        }
    }

    /// Takes a child out, if there is one with this name. Whoever takes the last child drops the directory.
    pub fn remove(&mut self, name: &[u8], generation: u64) -> Option<Arc<Node>> {
        self.get(name)?;
        let node = self.root.remove(name)?;
        self.generation = generation;
        self.count -= 1;
        self.listed -= listed(&node);
        while let Branch::Inner(parts) = &mut self.root
            && parts.len() == 1
            && let Some((_, only)) = parts.pop()
        {
            self.root = Arc::unwrap_or_clone(only);
        }
        Some(node)
    }

    /// The children in the order of their names.
    pub fn iter(&self) -> Iter<'_> {
        let mut iter = Iter { inner: Vec::new(), leaf: [].iter() };
        iter.enter(&self.root);
        iter
    }

    /// Whether both list the same names.
    pub fn same_names(&self, other: &Dir) -> bool {
        let names = |dir: &Dir| (dir.count, dir.listed);
        let equal = |(a, b): (&Arc<Node>, &Arc<Node>)| a.name() == b.name();
        self.generation == other.generation || (names(self) == names(other) && self.iter().zip(other.iter()).all(equal))
    }

    /// Moves those children into `nodes` that nobody else holds.
    pub fn dissolve(self, nodes: &mut Vec<Arc<Node>>) {
        self.root.dissolve(nodes);
    }
}

/// Iterator over children.
pub struct Iter<'a> {
    inner: Vec<slice::Iter<'a, (Name, Arc<Branch>)>>,
    leaf: slice::Iter<'a, Arc<Node>>,
}

impl<'a> Iter<'a> {
    fn enter(&mut self, mut branch: &'a Branch) {
        loop {
            match branch {
                Branch::Leaf(nodes) => {
                    self.leaf = nodes.iter();
                    return;
                }
                Branch::Inner(parts) => {
                    let mut parts = parts.iter();
                    let Some((_, first)) = parts.next() else { return };
                    self.inner.push(parts);
                    branch = first;
                }
            }
        }
    }
}

impl<'a> Iterator for Iter<'a> {
    type Item = &'a Arc<Node>;

    fn next(&mut self) -> Option<&'a Arc<Node>> {
        loop {
            if let Some(node) = self.leaf.next() {
                return Some(node);
            }
            match self.inner.last_mut()?.next() {
                Some((_, branch)) => self.enter(branch),
                None => drop(self.inner.pop()),
            }
        }
    }
}

impl Branch {
    /// Adds a node. Gives back the upper part, and its least name, when there are too many.
    fn insert(&mut self, node: Arc<Node>) -> Option<(Name, Branch)> {
        match self {
            Branch::Leaf(nodes) => {
                let at = position(nodes, node.name().as_bytes()).unwrap_or_else(|at| at);
                nodes.insert(at, node);
                let right = split(nodes, at)?;
                Some((right.first()?.name().clone(), Branch::Leaf(right)))
            }
            Branch::Inner(parts) => {
                let at = responsible(parts, node.name().as_bytes());
                let (least, right) = Arc::make_mut(&mut parts.get_mut(at)?.1).insert(node)?;
                parts.insert(at + 1, (least, Arc::new(right)));
                let right = split(parts, at + 1)?;
                Some((right.first()?.0.clone(), Branch::Inner(right)))
            }
        }
    }

    fn remove(&mut self, name: &[u8]) -> Option<Arc<Node>> {
        match self {
            Branch::Leaf(nodes) => position(nodes, name).ok().map(|at| nodes.remove(at)),
            Branch::Inner(parts) => {
                let at = responsible(parts, name);
                let part = Arc::make_mut(&mut parts.get_mut(at)?.1);
                let node = part.remove(name)?;
                if part.is_empty() {
                    parts.remove(at);
                }
                Some(node)
            }
        }
    }

    fn is_empty(&self) -> bool {
        match self {
            Branch::Leaf(nodes) => nodes.is_empty(),
            Branch::Inner(parts) => parts.is_empty(),
        }
    }

    /// Recursion is as deep as the B+ tree, not as the store.
    fn dissolve(self, into: &mut Vec<Arc<Node>>) {
        match self {
            Branch::Leaf(nodes) => into.extend(nodes),
            Branch::Inner(parts) => parts.into_iter().filter_map(|(_, part)| Arc::into_inner(part)).for_each(|part| part.dissolve(into)),
        }
    }
}

/// Where `name` is in `nodes`, or where it would be.
fn position(nodes: &[Arc<Node>], name: &[u8]) -> Result<usize, usize> {
    nodes.binary_search_by(|node| node.name().as_bytes().cmp(name))
}

/// Which of `parts` has `name` if any has; names below the first part's least are the first's too.
fn responsible(parts: &[(Name, Arc<Branch>)], name: &[u8]) -> usize {
    parts.partition_point(|(least, _)| least.as_bytes() <= name).saturating_sub(1)
}

/// Halves `entries` when they are too many. After an entry was added at the end, as when names come in order, the left part stays full.
fn split<T>(entries: &mut Vec<T>, added: usize) -> Option<Vec<T>> {
    let at = if added + 1 == entries.len() { added } else { entries.len() / 2 };
    (entries.len() > MOST).then(|| entries.split_off(at))
}

/// Bytes that `node` adds to a list of names.
fn listed(node: &Node) -> usize {
    node.name().len() + 1
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::perms::Perms;
    use crate::{DomId, Value};

    fn node(name: &str) -> Arc<Node> {
        Arc::new(Node::new(name.as_bytes().into(), Value::default(), Arc::new(Perms::private(DomId::HOST))))
    }

    fn names(dir: &Dir) -> Vec<String> {
        dir.iter().map(|node| String::from_utf8_lossy(node.name().as_bytes()).into_owned()).collect()
    }

    proptest! {
        /// Two copies of a directory, changed at random, against two ordered sets: a change of one must never show in the other.
        #[test]
        fn directory_is_an_ordered_set_and_copies_are_independent(
            start in 1usize..200,
            steps in prop::collection::vec((any::<bool>(), any::<bool>(), 0u16..300), 0..400),
        ) {
            let name = |number: u16| format!("n{number}");
            let mut first = Dir::of(node("anchor"), 0);
            let mut set = BTreeSet::from(["anchor".to_owned()]);
            for number in 0..start {
                first.insert(node(&format!("s{number}")), 0);
                set.insert(format!("s{number}"));
            }
            let mut dirs = [(first.clone(), set.clone()), (first, set)];
            for (which, add, number) in steps {
                let (dir, set) = &mut dirs[usize::from(which)];
                let name = name(number);
                if add && set.insert(name.clone()) {
                    dir.insert(node(&name), 1);
                } else if !add {
                    prop_assert_eq!(dir.remove(name.as_bytes(), 1).is_some(), set.remove(&name));
                }
                prop_assert_eq!(dir.get(name.as_bytes()).is_some(), set.contains(&name));
                prop_assert_eq!(dir.get_mut(name.as_bytes()).is_some(), set.contains(&name));
            }
            for (dir, set) in &dirs {
                prop_assert_eq!(names(dir), set.iter().cloned().collect::<Vec<_>>());
                prop_assert_eq!(dir.count(), set.len());
                prop_assert_eq!(dir.listed_bytes(), set.iter().map(|name| name.len() + 1).sum::<usize>());
            }
        }
    }

    #[test]
    fn names_that_come_in_order_fill_their_branches() {
        let mut dir = Dir::of(node("n0000"), 0);
        (1..3200).for_each(|number| dir.insert(node(&format!("n{number:04}")), 0));
        let Branch::Inner(parts) = &dir.root else { panic!("one leaf cannot hold 3200 children") };
        let Branch::Inner(leaves) = parts[0].1.as_ref() else { panic!("nor can 32 leaves") };
        assert_eq!(leaves.len(), MOST);
        assert!(leaves.iter().all(|(_, leaf)| matches!(leaf.as_ref(), Branch::Leaf(nodes) if nodes.len() == MOST)));
    }
}
