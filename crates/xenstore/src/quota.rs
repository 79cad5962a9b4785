//! Quotas: what one domain may use of the store, and what it does use.
//!
//! Names and defaults are C xenstored's (xen-project/xen `tools/xenstored/domain.c`), 0 means no limit, and privileged clients have none. Nodes
//! are charged to their owner, whoever creates them. `node-size` is the size of a value alone: C counts permissions and the names of children
//! too, which only makes a directory with many children impossible.

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};

use crate::domid::DomId;
use crate::tree::Node;

/// What is limited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Quota {
    /// Nodes owned.
    Nodes,
    /// Watches of a client.
    Watches,
    /// Open transactions of a client.
    Transactions,
    /// Requests whose replies the client has not read.
    Outstanding,
    /// Steps of one transaction: changes, and reads of what was not read since the last change.
    TransactionNodes,
    /// Permission entries of a node, the owner's included.
    NodePermissions,
    /// Bytes of a value.
    NodeSize,
    /// Bytes of a path below `/local/domain/<n>/`.
    PathMax,
    /// Bytes of memory for nodes, watches and open transactions.
    Memory,
}

impl Quota {
    /// All, in the order that GET_QUOTA lists them in.
    pub const ALL: [Quota; 9] = [
        Quota::Nodes,
        Quota::Watches,
        Quota::Transactions,
        Quota::Outstanding,
        Quota::TransactionNodes,
        Quota::NodePermissions,
        Quota::NodeSize,
        Quota::PathMax,
        Quota::Memory,
    ];

    /// Its name in GET_QUOTA and SET_QUOTA.
    pub fn name(self) -> &'static str {
        match self {
            Quota::Nodes => "nodes",
            Quota::Watches => "watches",
            Quota::Transactions => "transactions",
            Quota::Outstanding => "outstanding",
            Quota::TransactionNodes => "transaction-nodes",
            Quota::NodePermissions => "node-permissions",
            Quota::NodeSize => "node-size",
            Quota::PathMax => "path-max",
            Quota::Memory => "memory",
        }
    }

    /// The quota with this name.
    pub fn of_name(name: &[u8]) -> Option<Quota> {
        Quota::ALL.into_iter().find(|quota| quota.name().as_bytes() == name)
    }

    fn default_limit(self) -> u32 {
        match self {
            Quota::Nodes => 1000,
            Quota::Watches => 128,
            Quota::Transactions => 10,
            Quota::Outstanding => 20,
            Quota::TransactionNodes => 1024,
            Quota::NodePermissions => 5,
            Quota::NodeSize => 2048,
            Quota::PathMax => 2048,
            Quota::Memory => 2560 << 10,
        }
    }
}

/// The limits of one domain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "BTreeMap<String, u32>", try_from = "BTreeMap<String, u32>")]
pub struct Quotas(BTreeMap<Quota, u32>);

impl Quotas {
    /// The limit as GET_QUOTA says it, 0 for none.
    pub fn get(&self, quota: Quota) -> u32 {
        self.0.get(&quota).copied().unwrap_or(0)
    }

    /// Changes a limit; 0 is none.
    pub fn set(&mut self, quota: Quota, limit: u32) {
        self.0.insert(quota, limit);
    }

    /// Whether `amount` is more than the limit.
    pub fn exceeded(&self, quota: Quota, amount: i64) -> bool {
        let limit = self.get(quota);
        limit != 0 && amount > i64::from(limit)
    }
}

impl Default for Quotas {
    fn default() -> Quotas {
        Quotas(Quota::ALL.into_iter().map(|quota| (quota, quota.default_limit())).collect())
    }
}

impl From<Quotas> for BTreeMap<String, u32> {
    fn from(quotas: Quotas) -> Self {
        quotas.0.into_iter().map(|(quota, limit)| (quota.name().to_owned(), limit)).collect()
    }
}

impl TryFrom<BTreeMap<String, u32>> for Quotas {
    type Error = String;

    fn try_from(limits: BTreeMap<String, u32>) -> Result<Self, String> {
        let mut quotas = Quotas::default();
        for (name, limit) in limits {
            let quota = Quota::of_name(name.as_bytes()).ok_or_else(|| format!("unknown quota {name:?}"))?;
            quotas.set(quota, limit);
        }
        Ok(quotas)
    }
}

/// What a domain uses, or by how much that changes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Nodes owned.
    pub nodes: i64,
    /// Bytes of memory.
    pub memory: i64,
}

impl Usage {
    /// Nothing but memory.
    pub fn of_memory(bytes: usize) -> Usage {
        Usage { nodes: 0, memory: i64::try_from(bytes).unwrap_or(i64::MAX) }
    }

    /// What `node` costs its owner.
    pub fn of_node(node: &Node) -> Usage {
        Usage { nodes: 1, ..Usage::of_memory(node.memory()) }
    }

    fn add(&mut self, other: Usage, sign: i64) {
        self.nodes += sign * other.nodes;
        self.memory += sign * other.memory;
    }
}

/// What domains use. Who uses nothing is not listed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Usages(HashMap<DomId, Usage>);

impl Usages {
    /// What `domain` uses.
    pub fn of(&self, domain: DomId) -> Usage {
        self.0.get(&domain).copied().unwrap_or_default()
    }

    /// Charges `domain`.
    pub fn charge(&mut self, domain: DomId, usage: Usage) {
        self.change(domain, usage, 1);
    }

    /// Takes a charge back.
    pub fn refund(&mut self, domain: DomId, usage: Usage) {
        self.change(domain, usage, -1);
    }

    /// Takes over all of `changes`, which is empty afterwards.
    pub fn settle(&mut self, changes: &mut Usages) {
        for (domain, usage) in changes.0.drain() {
            self.change(domain, usage, 1);
        }
    }

    /// Everybody who uses something.
    pub fn iter(&self) -> impl Iterator<Item = (DomId, Usage)> {
        self.0.iter().map(|(domain, usage)| (*domain, *usage))
    }

    fn change(&mut self, domain: DomId, usage: Usage, sign: i64) {
        let entry = self.0.entry(domain).or_default();
        entry.add(usage, sign);
        if *entry == Usage::default() {
            self.0.remove(&domain);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_quota_is_found_by_its_name() {
        for quota in Quota::ALL {
            assert_eq!(Quota::of_name(quota.name().as_bytes()), Some(quota));
        }
        assert_eq!(Quota::of_name(b"maxsize"), None);
    }

    #[test]
    fn zero_is_no_limit() {
        let mut quotas = Quotas::default();
        assert!(quotas.exceeded(Quota::Nodes, 1001) && !quotas.exceeded(Quota::Nodes, 1000));
        quotas.set(Quota::Nodes, 0);
        assert!(!quotas.exceeded(Quota::Nodes, i64::MAX));
    }
}
