//! What the store knows of domains: which are introduced, who may act for whom, and what each may use.

use std::collections::BTreeMap;

use abi::xen::xenstore::feature;
use serde::{Deserialize, Serialize};

use crate::domid::DomId;
use crate::error::Error;
use crate::perms::Caller;
use crate::quota::Quotas;

/// Ring features of this server (`docs/misc/xenstore-ring.txt`).
pub const FEATURES: u32 = feature::RECONNECTION | feature::ERROR | feature::WATCH_DEPTH | feature::DOMID_ANY;

/// Where a domain's ring is, as INTRODUCE said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ring {
    /// Guest frame of the ring page.
    pub gfn: u64,
    /// Event channel, the guest's end.
    pub port: u32,
}

/// A domain that somebody said something about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Domain {
    /// Set by INTRODUCE.
    pub ring: Option<Ring>,
    /// Its shutdown was reported and RESUME has not followed.
    pub shut_down: bool,
    /// Domain that it acts for (SET_TARGET).
    pub target: Option<DomId>,
    /// Ring features that it is shown.
    pub features: u32,
    /// What it may use.
    pub quotas: Quotas,
}

/// All domains.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Domains {
    /// Limits of domains that nothing else was said about.
    pub default_quotas: Quotas,
    known: BTreeMap<DomId, Domain>,
}

impl Domains {
    /// Nobody but the host. `default_quotas` are the limits of domains that nothing else was said about.
    pub fn new(default_quotas: Quotas) -> Domains {
        Domains { default_quotas, known: BTreeMap::new() }
    }

    /// The domain's record, made if there is none.
    pub fn known(&mut self, domain: DomId) -> &mut Domain {
        let quotas = &self.default_quotas;
        self.known.entry(domain).or_insert_with(|| Domain {
            ring: None,
            shut_down: false,
            target: None,
            features: FEATURES,
            quotas: quotas.clone(),
        })
    }

    /// An introduced domain.
    ///
    /// # Errors
    /// [`Error::NoDomain`].
    pub fn introduced(&mut self, domain: DomId) -> Result<&mut Domain, Error> {
        self.known.get_mut(&domain).filter(|known| known.ring.is_some()).ok_or(Error::NoDomain)
    }

    /// The domain's record.
    pub fn get(&self, domain: DomId) -> Option<&Domain> {
        self.known.get(&domain)
    }

    /// Whether the domain is introduced; the host always is.
    pub fn is_introduced(&self, domain: DomId) -> bool {
        domain == DomId::HOST || self.get(domain).is_some_and(|known| known.ring.is_some())
    }

    /// What the domain may use.
    pub fn quotas(&self, domain: DomId) -> &Quotas {
        self.get(domain).map_or(&self.default_quotas, |known| &known.quotas)
    }

    /// Who asks when a client of `domain` does.
    pub fn caller(&self, domain: DomId, privileged: bool) -> Caller {
        let target = if privileged { None } else { self.get(domain).and_then(|known| known.target) };
        Caller { domain, privileged, target }
    }

    /// Forgets a domain, also as a target.
    pub fn forget(&mut self, domain: DomId) {
        self.known.remove(&domain);
        self.known.values_mut().filter(|other| other.target == Some(domain)).for_each(|other| other.target = None);
    }
}
