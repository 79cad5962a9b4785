//! Domains as they come and go, and what each is allowed.

use std::sync::Arc;

use super::{ClientId, Store};
use crate::domain::{FEATURES, Ring};
use crate::domid::DomId;
use crate::edit::Change;
use crate::error::Error;
use crate::path::{Path, Special};
use crate::perms::Perms;
use crate::quota::{Quota, Quotas, Usage};
use crate::tree::Visit;

impl Store {
    /// INTRODUCE, the first time and again. The toolstack creates the domain's nodes, not the store.
    ///
    /// # Errors
    /// [`Error::BadRequest`] for the host, a reserved number, or port 0.
    pub fn introduce(&mut self, domain: DomId, ring: Ring) -> Result<(), Error> {
        if !domain.is_machine() || ring.port == 0 {
            return Err(Error::BadRequest);
        }
        self.domains.known(domain).ring = Some(ring);
        self.fire_special(Special::IntroduceDomain, domain);
        Ok(())
    }

    /// RELEASE: [`forget`](Store::forget)s an introduced domain.
    ///
    /// # Errors
    /// [`Error::Refused`] for the host, [`Error::NoDomain`].
    pub fn release(&mut self, domain: DomId) -> Result<Vec<ClientId>, Error> {
        if domain == DomId::HOST {
            return Err(Error::Refused);
        }
        self.domains.introduced(domain)?;
        Ok(self.forget(domain))
    }

    /// A domain is gone, introduced or not: its nodes are removed with all below them, rights given to it are taken back everywhere, so that the
    /// next domain of that number inherits nothing, and its clients are closed. Those are returned.
    pub fn forget(&mut self, domain: DomId) -> Vec<ClientId> {
        if domain == DomId::HOST {
            return Vec::new();
        }
        let clients: Vec<ClientId> = self.clients.iter().filter(|(_, client)| client.domain == domain).map(|(id, _)| *id).collect();
        clients.iter().for_each(|client| self.close(*client));
        self.lose_transactions_that_grant(domain);
        self.remove_nodes_of(domain);
        self.special_perms.remove(&Special::ReleaseOne(domain));
        for perms in self.special_perms.values_mut() {
            if let Some(stripped) = perms.without(domain) {
                *perms = Arc::new(stripped);
            }
        }
        let was_introduced = self.domains.is_introduced(domain);
        self.domains.forget(domain);
        self.quota_hits.retain(|(hit, _), _| *hit != domain);
        if was_introduced {
            self.fire_release(domain);
        }
        clients
    }

    /// A domain has shut down but still exists: tells watchers once, until it is resumed.
    ///
    /// # Errors
    /// [`Error::NoDomain`].
    pub fn shut_down(&mut self, domain: DomId) -> Result<(), Error> {
        let known = self.domains.introduced(domain)?;
        if !std::mem::replace(&mut known.shut_down, true) {
            self.fire_release(domain);
        }
        Ok(())
    }

    /// RESUME: another shutdown will be told again.
    ///
    /// # Errors
    /// [`Error::NoDomain`].
    pub fn resume(&mut self, domain: DomId) -> Result<(), Error> {
        self.domains.introduced(domain).map(|known| known.shut_down = false)
    }

    /// SET_TARGET: `domain` gets the rights of `target` too.
    ///
    /// # Errors
    /// [`Error::NoDomain`] unless both are introduced.
    pub fn set_target(&mut self, domain: DomId, target: DomId) -> Result<(), Error> {
        self.domains.introduced(target)?;
        self.domains.introduced(domain).map(|known| known.target = Some(target))
    }

    /// IS_DOMAIN_INTRODUCED.
    pub fn is_introduced(&self, domain: DomId) -> bool {
        self.domains.is_introduced(domain)
    }

    /// GET_FEATURE: the ring features that a domain is shown.
    pub fn features(&self, domain: DomId) -> u32 {
        self.domains.get(domain).map_or(FEATURES, |known| known.features)
    }

    /// SET_FEATURE, before the domain is introduced.
    ///
    /// # Errors
    /// [`Error::BadRequest`] for features that this server does not have, [`Error::Introduced`].
    pub fn set_features(&mut self, domain: DomId, features: u32) -> Result<(), Error> {
        if features & !FEATURES != 0 || !domain.is_machine() && domain != DomId::HOST {
            return Err(Error::BadRequest);
        }
        if self.domains.is_introduced(domain) {
            return Err(Error::Introduced);
        }
        self.domains.known(domain).features = features;
        Ok(())
    }

    /// GET_QUOTA: limits of a domain, or those that new domains begin with.
    pub fn quotas(&self, domain: Option<DomId>) -> &Quotas {
        domain.map_or(&self.domains.default_quotas, |domain| self.domains.quotas(domain))
    }

    /// SET_QUOTA: changes a limit of a domain, or one that new domains begin with.
    pub fn set_quota(&mut self, domain: Option<DomId>, quota: Quota, limit: u32) {
        match domain {
            Some(domain) => self.domains.known(domain).quotas.set(quota, limit),
            None => self.domains.default_quotas.set(quota, limit),
        }
    }

    /// What a domain uses.
    pub fn usage(&self, domain: DomId) -> Usage {
        self.usages.of(domain)
    }

    /// Watches and transactions that a domain's clients have open.
    pub fn open_counts(&self, domain: DomId) -> (usize, usize) {
        let clients = self.clients.values().filter(|client| client.domain == domain);
        clients.fold((0, 0), |(watches, open), client| (watches + client.watches.len(), open + client.transactions.len()))
    }

    fn fire_release(&mut self, domain: DomId) {
        self.fire_special(Special::ReleaseDomain, domain);
        self.fire_special(Special::ReleaseOne(domain), domain);
    }

    /// A commit must not bring rights of a domain back that is gone.
    fn lose_transactions_that_grant(&mut self, domain: DomId) {
        let open = self.clients.values_mut().flat_map(|client| client.transactions.values_mut());
        open.filter(|transaction| transaction.grants(domain)).for_each(|transaction| transaction.lose());
    }

    fn remove_nodes_of(&mut self, domain: DomId) {
        let (mut owned, mut granted): (Vec<Path>, Vec<(Path, Perms)>) = (Vec::new(), Vec::new());
        self.tree.visit(|path, node| {
            if node.perms().owner.domain == domain {
                owned.push(Path::of_node(path));
                return Visit::Past;
            }
            if let Some(perms) = node.perms().without(domain) {
                granted.push((Path::of_node(path), perms));
            }
            Visit::Below
        });
        for (path, perms) in granted {
            self.tree.set_perms(&path, Arc::new(perms));
            self.note_change(&path);
        }
        for path in owned {
            let Some(node) = self.tree.remove(&path) else { continue };
            node.each(|node| self.usages.refund(node.perms().owner.domain, Usage::of_node(node)));
            self.fire_change(&path, &Change::Removed(node));
        }
    }
}
