//! In dom0 of a real Xen: the ring of dom0's own kernel, and those of all domains that the toolstack introduces.
//!
//! ```text
//!   dom0's kernel ── page of /proc/xen/xsd_kva ──┐
//!   domain ── page granted to us, /dev/xen/gntdev ┴─ Line ── Introduced ──> the event loop
//!          └─ event channel ──── /dev/xen/evtchn ─┘
//! ```
//!
//! INTRODUCE brings a ring, RELEASE or the death of its domain takes it away. That one has died is told by an event (`VIRQ_DOM_EXC`) that does not say
//! which, so all are looked at then. Source: xen-project/xen `tools/xenstored/domain.c` (before 4.18 `tools/xenstore/xenstored_domain.c`).

mod device;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Context;
use serde::{Deserialize, Serialize};
use xenstore::ring::Page;
use xenstore::{ClientId, DomId, Error, Ring, Server};
use xenstored::ring::{Introduced, Line};

use device::{Domains, EventChannel, Life, SharedPage};

/// Tells the event channel of the kernel's ring, and by its presence that the kernel looks for a store here.
const KERNELS_PORT: &str = "/proc/xen/xsd_port";

/// A domain's page and its event channel.
pub struct DomainLine {
    page: SharedPage,
    channel: EventChannel,
}

impl DomainLine {
    /// The event channel. The program that takes over maps the page again.
    pub fn bound(&self) -> Bound {
        Bound { descriptor: self.channel.as_fd().as_raw_fd(), port: self.channel.port() }
    }
}

impl Line for DomainLine {
    fn bell(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }

    fn hear(&self) {
        self.channel.take();
    }

    fn ring(&self) {
        self.channel.notify();
    }
}

impl Page for DomainLine {
    fn load(&self, at: usize) -> u32 {
        self.page.load(at)
    }

    fn store(&self, at: usize, value: u32) {
        self.page.store(at, value);
    }

    fn read(&self, at: usize, bytes: &mut [u8]) {
        self.page.read(at, bytes);
    }

    fn write(&self, at: usize, bytes: &[u8]) {
        self.page.write(at, bytes);
    }
}

/// The event channel of a ring, as it passes to another program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bound {
    /// Of `/dev/xen/evtchn`.
    pub descriptor: RawFd,
    /// This side's port.
    pub port: u32,
}

/// The hypervisor's domains.
pub struct Xen {
    domains: Domains,
    exceptions: EventChannel,
    lines: Mutex<BTreeMap<DomId, Arc<DomainLine>>>,
    introductions: Sender<Introduced>,
}

impl Xen {
    /// Whether this is where a kernel looks for its store.
    pub fn is_here() -> bool {
        Path::new(KERNELS_PORT).exists()
    }

    /// Begins to hear of domains. Rings come by the other end.
    ///
    /// # Errors
    /// When a device is missing or in use.
    pub fn new() -> anyhow::Result<(Xen, Receiver<Introduced>)> {
        let exceptions = EventChannel::new()?;
        exceptions.bind_exceptions().context("another program serves Xen's domains; -D serves the socket only")?;
        let (introductions, introduced) = channel();
        Ok((Xen { domains: Domains::new()?, exceptions, lines: Mutex::default(), introductions }, introduced))
    }

    /// Serves the kernel's ring.
    ///
    /// # Errors
    /// When it is served by another program.
    pub fn serve_kernel(&self, server: &mut Server) -> anyhow::Result<()> {
        let port = std::fs::read_to_string(KERNELS_PORT).context(KERNELS_PORT)?;
        let port = port.trim().parse().with_context(|| format!("{KERNELS_PORT} is {port:?}"))?;
        let channel = EventChannel::new()?;
        channel.bind(DomId::HOST, port).with_context(|| format!("port {port} of the kernel"))?;
        let client = server.introduce_host();
        self.serve(DomId::HOST, client, channel).context("the kernel's ring")
    }

    /// INTRODUCE. A domain that is introduced again only has its event channel bound anew, as with Xen's own server.
    pub fn introduce(&self, domain: DomId, ring: Ring, client: ClientId) -> Result<(), Error> {
        let refuse = |error: io::Error| {
            tracing::warn!(%error, %domain, "cannot serve a domain's ring");
            Error::BadRequest
        };
        if let Some(line) = self.lines().get(&domain) {
            return line.channel.bind(domain, ring.port).map_err(refuse);
        }
        let channel = EventChannel::new().map_err(refuse)?;
        channel.bind(domain, ring.port).map_err(refuse)?;
        self.serve(domain, client, channel).map_err(refuse)
    }

    /// The domain's ring is not served any more. The loop lets the page go, as soon as it sees that the connection is closed.
    pub fn release(&self, domain: DomId) {
        if let Some(line) = self.lines().remove(&domain) {
            line.channel.unbind();
        }
    }

    /// Goes on with a ring of another program.
    ///
    /// # Errors
    /// When its page cannot be mapped.
    pub fn resume(&self, domain: DomId, client: ClientId, device: OwnedFd, port: u32) -> io::Result<()> {
        self.serve(domain, client, EventChannel::adopt(device, port))
    }

    /// Whether there is such a domain. One that cannot be asked about is believed to be.
    pub fn exists(&self, domain: DomId) -> bool {
        self.domains.life(domain).ok() != Some(Life::Gone)
    }

    /// Looks how the domains are: tells of those that have shut down, and forgets those that are gone.
    pub fn look(&self, server: &mut Server) {
        self.exceptions.take();
        let known: Vec<DomId> = self.lines().keys().copied().filter(|domain| domain.is_machine()).collect();
        for domain in known {
            match self.domains.life(domain) {
                Ok(Life::Running) => {}
                // It is introduced.
                Ok(Life::ShutDown) => drop(server.store().shut_down(domain)),
                Ok(Life::Gone) => {
                    tracing::info!(%domain, "a domain is gone");
                    server.forget(domain);
                }
                Err(error) => tracing::warn!(%error, %domain, "cannot ask about a domain"),
            }
        }
    }

    /// Rings that are served, for the program that takes over: their event channels are to stay open.
    pub fn served(&self) -> Vec<(DomId, Arc<DomainLine>)> {
        self.lines().iter().map(|(domain, line)| (*domain, Arc::clone(line))).collect()
    }

    fn serve(&self, domain: DomId, client: ClientId, channel: EventChannel) -> io::Result<()> {
        let page = if domain == DomId::HOST { SharedPage::of_kernel() } else { SharedPage::of_domain(domain) }?;
        let line = Arc::new(DomainLine { page, channel });
        self.lines().insert(domain, Arc::clone(&line));
        // The loop ends before this does.
        let _ = self.introductions.send(Introduced { domain, client, line });
        Ok(())
    }

    fn lines(&self) -> MutexGuard<'_, BTreeMap<DomId, Arc<DomainLine>>> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsFd for Xen {
    /// Readable when it is time to [`Xen::look`].
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.exceptions.as_fd()
    }
}
