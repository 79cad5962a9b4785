//! Transactions: a snapshot, a view with the client's own changes, and a log of all that it saw and did.
//!
//! A commit is right when it could have happened all at once: when the same requests, made now one after the other, would have got the same
//! answers. So a commit repeats the log on the current tree and compares. If nothing has changed since the start, the view is the result
//! already; if the client changed nothing, it has read the state of one moment and is done. Everything else is a conflict, and only a
//! conflict: writing a node blindly, creating a sibling of what another created, or reading a value that was rewritten the same, is none.
//! C xenstored sees conflicts there, oxenstored overlooks real ones.

use std::collections::HashSet;
use std::sync::Arc;

use crate::bytes::Value;
use crate::domain::Domains;
use crate::domid::DomId;
use crate::edit::{self, Change, Edit, Names, Op};
use crate::error::Error;
use crate::path::Path;
use crate::perms::{Caller, Perms};
use crate::quota::{Quota, Usages};
use crate::tree::Tree;

/// What a step costs beside its path.
const STEP_BYTES: usize = 160;

/// An open transaction.
pub struct Transaction {
    base: Tree,
    view: Tree,
    charges: Usages,
    log: Vec<Step>,
    seen: HashSet<(Path, Question)>,
    changed: Changed,
    memory: usize,
    condition: Condition,
    started: u64,
    /// Who began it, and whether it went on with other rights (SET_TARGET).
    caller: Caller,
    rights_changed: bool,
}

/// What a commit leaves.
pub struct Committed {
    /// The tree from now on.
    pub tree: Tree,
    /// What domains use more than before.
    pub charges: Usages,
    /// Where something changed, in the order of the first change, and whether it was removed at some time.
    pub changed: Vec<(Path, bool)>,
}

enum Condition {
    Open,
    /// A quota ran out in it.
    Failed,
    /// Its snapshot was taken away; it can only conflict.
    Lost,
}

enum Step {
    Saw(Path, Answer),
    Did(Op, Result<(), Error>),
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Question {
    Value,
    Names,
    Perms,
}

#[derive(PartialEq)]
enum Answer {
    Value(Result<Value, Error>),
    Names(Result<Names, Error>),
    Perms(Result<Arc<Perms>, Error>),
}

impl Answer {
    fn question(&self) -> Question {
        match self {
            Answer::Value(_) => Question::Value,
            Answer::Names(_) => Question::Names,
            Answer::Perms(_) => Question::Perms,
        }
    }

    fn again(&self, tree: &Tree, caller: &Caller, path: &Path) -> Answer {
        match self {
            Answer::Value(_) => Answer::Value(edit::read(tree, caller, path)),
            Answer::Names(_) => Answer::Names(edit::list(tree, caller, path)),
            Answer::Perms(_) => Answer::Perms(edit::perms(tree, caller, path)),
        }
    }
}

/// Changed paths, each once.
#[derive(Default)]
struct Changed(Vec<(Path, bool)>);

impl Changed {
    fn note(&mut self, path: &Path, change: &Change) {
        match change {
            Change::None => {}
            Change::Removed(_) => self.0.push((path.clone(), true)),
            _ => self.0.push((path.clone(), false)),
        }
    }

    fn once(self) -> Vec<(Path, bool)> {
        let removed: HashSet<Path> = self.0.iter().filter(|(_, removed)| *removed).map(|(path, _)| path.clone()).collect();
        let mut seen = HashSet::new();
        let firsts = self.0.into_iter().filter(|(path, _)| seen.insert(path.clone()));
        firsts.map(|(path, _)| (removed.contains(&path), path)).map(|(removed, path)| (path, removed)).collect()
    }
}

impl Transaction {
    /// Begins with `tree` as it is now, at `started` on the clock that the store measures snapshots by.
    pub fn new(tree: &Tree, caller: Caller, started: u64) -> Transaction {
        Transaction {
            base: tree.clone(),
            view: tree.clone(),
            charges: Usages::default(),
            log: Vec::new(),
            seen: HashSet::new(),
            changed: Changed::default(),
            memory: 0,
            condition: Condition::Open,
            started,
            caller,
            rights_changed: false,
        }
    }

    /// One that can only conflict: what an open transaction becomes when the store moves to another process.
    pub fn lost() -> Transaction {
        Transaction { condition: Condition::Lost, ..Transaction::new(&Tree::new(), Caller::HOST, 0) }
    }

    /// READ.
    pub fn read(&mut self, caller: &Caller, path: &Path) -> Result<Value, Error> {
        self.go_on(caller)?;
        let answer = edit::read(&self.view, caller, path);
        self.saw(path, Answer::Value(answer.clone()));
        answer
    }

    /// DIRECTORY.
    pub fn list(&mut self, caller: &Caller, path: &Path) -> Result<Names, Error> {
        self.go_on(caller)?;
        let answer = edit::list(&self.view, caller, path);
        self.saw(path, Answer::Names(answer.clone()));
        answer
    }

    /// GET_PERMS.
    pub fn perms(&mut self, caller: &Caller, path: &Path) -> Result<Arc<Perms>, Error> {
        self.go_on(caller)?;
        let answer = edit::perms(&self.view, caller, path);
        self.saw(path, Answer::Perms(answer.clone()));
        answer
    }

    /// A change.
    pub fn apply(&mut self, op: Op, caller: Caller, settled: &Usages, domains: &Domains, value_max: usize) -> Result<(), Error> {
        self.go_on(&caller)?;
        let mut edit = Edit { tree: &mut self.view, settled, charges: &mut self.charges, domains, caller, value_max };
        let outcome = edit.apply(&op);
        if let Ok(change) = &outcome {
            self.changed.note(op.path(), change);
        }
        if matches!(outcome, Err(Error::Quota(_))) {
            self.condition = Condition::Failed;
        }
        let outcome = outcome.map(drop);
        self.memory += STEP_BYTES + op.path().as_str().len() + op.size();
        self.seen.clear();
        self.log.push(Step::Did(op, outcome));
        outcome
    }

    /// Ends it on `current`, the store's tree now.
    ///
    /// # Errors
    /// [`Error::Conflict`], or [`Error::TransactionFailed`] after a quota ran out in it.
    pub fn commit(self, current: &Tree, caller: Caller, settled: &Usages, domains: &Domains, value_max: usize) -> Result<Committed, Error> {
        match self.condition {
            Condition::Open => {}
            Condition::Failed => return Err(Error::TransactionFailed),
            Condition::Lost => return Err(Error::Conflict),
        }
        if self.changed.0.is_empty() {
            return Ok(Committed { tree: current.clone(), charges: Usages::default(), changed: Vec::new() });
        }
        if self.base.is_same(current) && !self.rights_changed && caller == self.caller {
            return Ok(Committed { tree: self.view, charges: self.charges, changed: self.changed.once() });
        }
        let (mut tree, mut charges, mut changed) = (current.clone(), Usages::default(), Changed::default());
        for step in self.log {
            match step {
                Step::Saw(path, answer) if answer.again(&tree, &caller, &path) == answer => {}
                Step::Saw(..) => return Err(Error::Conflict),
                Step::Did(op, before) => {
                    let mut edit = Edit { tree: &mut tree, settled, charges: &mut charges, domains, caller, value_max };
                    let now = edit.apply(&op);
                    if let Ok(change) = &now {
                        changed.note(op.path(), change);
                    }
                    if now.map(drop) != before {
                        return Err(Error::Conflict);
                    }
                }
            }
        }
        Ok(Committed { tree, charges, changed: changed.once() })
    }

    /// Marks that a quota ran out.
    pub fn fail(&mut self, quota: Quota) -> Error {
        self.condition = Condition::Failed;
        Error::Quota(quota)
    }

    /// Takes the snapshot away.
    pub fn lose(&mut self) {
        *self = Transaction { memory: self.memory, started: self.started, ..Transaction::lost() };
    }

    /// When it began.
    pub fn started(&self) -> u64 {
        self.started
    }

    /// How many steps.
    pub fn steps(&self) -> usize {
        self.log.len()
    }

    /// Bytes of the log.
    pub fn memory(&self) -> usize {
        self.memory
    }

    /// Whether it gives `domain` rights.
    pub fn grants(&self, domain: DomId) -> bool {
        self.log
            .iter()
            .any(|step| matches!(step, Step::Did(Op::SetPerms(_, perms), _) if perms.entries().any(|entry| entry.domain == domain)))
    }

    fn go_on(&mut self, caller: &Caller) -> Result<(), Error> {
        self.rights_changed |= *caller != self.caller;
        if matches!(self.condition, Condition::Lost) { Err(Error::Conflict) } else { Ok(()) }
    }

    /// Notes an answer. The same question again, with no change in between, says nothing new.
    fn saw(&mut self, path: &Path, answer: Answer) {
        if self.seen.insert((path.clone(), answer.question())) {
            self.memory += STEP_BYTES + path.as_str().len();
            self.log.push(Step::Saw(path.clone(), answer));
        }
    }
}
