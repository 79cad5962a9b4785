//! What the server asks of the machine that it runs on: to serve domains' rings, where there is a Xen, and to be replaced by another program.

use std::sync::Arc;

use xenstore::{Answer, ClientId, DomId, Error, Host, Ring};

use crate::update::Orders;
use crate::xen::Xen;

/// The machine.
pub struct Machine {
    /// Takes orders for a live upgrade.
    pub orders: Orders,
    /// `None` where no Xen is: rings are accepted then and never served.
    pub xen: Option<Arc<Xen>>,
}

impl Host for Machine {
    fn introduce(&mut self, domain: DomId, ring: Ring, client: ClientId) -> Result<(), Error> {
        self.xen.as_ref().map_or(Ok(()), |xen| xen.introduce(domain, ring, client))
    }

    fn release(&mut self, domain: DomId, _: &[ClientId]) {
        if let Some(xen) = &self.xen {
            xen.release(domain);
        }
    }

    fn exists(&self, domain: DomId) -> bool {
        self.xen.as_ref().is_none_or(|xen| xen.exists(domain))
    }

    fn control(&mut self, command: &[u8], arguments: &[&[u8]]) -> Option<Result<Answer, Error>> {
        self.orders.control(command, arguments)
    }
}
