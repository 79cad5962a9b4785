//! A network of the host as the cards of the dialects see it, in the card's thread.

use std::io;

use devices::net::NetBackend;
use devices::virtio::worker::Bell;
use dialects::network::{NetError, Network, Worked};
use frames::Offloads;
use rustix::event::PollFlags;

/// A network, as long as there is one.
pub struct Link {
    /// Once it is gone, it does not come back.
    network: Option<Box<dyn NetBackend>>,
    offloads: Offloads,
}

/// The network as a [`Network`].
struct Wire<'a>(&'a mut dyn NetBackend);

impl Network for Wire<'_> {
    fn send(&mut self, packet: &[u8]) -> io::Result<()> {
        self.0.send(packet)
    }

    fn receive(&mut self, packet: &mut [u8]) -> io::Result<Option<usize>> {
        self.0.receive(packet)
    }
}

impl Link {
    /// A link with `network`.
    pub fn new(network: Box<dyn NetBackend>) -> Link {
        Link { network: Some(network), offloads: Offloads::default() }
    }

    /// Whether it is there.
    pub fn is_up(&self) -> bool {
        self.network.is_some()
    }

    /// Lets go of the network.
    pub fn cut(&mut self) {
        self.network = None;
    }

    /// Sleeps until there is something to do after `worked`. `false`: it is time to end.
    pub fn wait(&self, bell: &Bell, worked: Worked) -> bool {
        let Some(network) = &self.network else { return worked.more || bell.wait() };
        let mut wanted = PollFlags::empty();
        wanted.set(PollFlags::IN, worked.has_room);
        wanted.set(PollFlags::OUT, worked.blocked || network.has_unsent());
        worked.more || bell.wait_or((!wanted.is_empty()).then(|| (network.fd(), wanted))).is_some()
    }

    /// What the guest can do itself with a received packet.
    ///
    /// # Errors
    /// When the network cannot do what is left.
    pub fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        if offloads == self.offloads {
            return Ok(());
        }
        self.offloads = offloads;
        self.network.as_mut().map_or(Ok(()), |network| network.set_guest_offloads(offloads))
    }

    /// Lets `card` work with the network; without one, what is sent is lost.
    ///
    /// # Errors
    /// The card's: its ring is broken.
    pub fn turn<Broken>(
        &mut self,
        card: impl FnOnce(Option<&mut (dyn Network + '_)>) -> Result<Worked, NetError<Broken>>,
    ) -> Result<Worked, Broken> {
        let worked = match &mut self.network {
            None => card(None),
            Some(network) => send_rest(network.as_mut()).map_err(NetError::Network).and_then(|()| card(Some(&mut Wire(network.as_mut())))),
        };
        match worked {
            Ok(worked) => Ok(worked),
            Err(NetError::Ring(error)) => Err(error),
            Err(NetError::Network(error)) => {
                eprintln!("vmctl: a network is gone: {error}");
                self.network = None;
                Ok(Worked { more: true, ..Worked::default() })
            }
        }
    }
}

/// Sends what an earlier turn left, as far as the network takes it now.
///
/// # Errors
/// When the network is gone.
fn send_rest(network: &mut dyn NetBackend) -> io::Result<()> {
    let sent = if network.has_unsent() { network.send_unsent() } else { Ok(()) };
    sent.or_else(|error| match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(()),
        _ => Err(error),
    })
}
