//! A network of the host as the cards of the dialects see it, in the card's thread.

use std::io;

use devices::net::{GuestOffloads, NetBackend};
use devices::virtio::worker::Bell;
use dialects::network::{Abilities, NetError, Network, Offloads, Worked};
use rustix::event::PollFlags;

/// A network, as long as there is one.
pub struct Link {
    network: Box<dyn NetBackend>,
    /// Once it is not, it does not come back.
    is_up: bool,
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
        Link { network, is_up: true, offloads: Offloads::default() }
    }

    /// Whether it is there.
    pub fn is_up(&self) -> bool {
        self.is_up
    }

    /// What the network does for a card.
    pub fn abilities(&self) -> Abilities {
        Abilities { offloads: self.network.has_offloads(), long_packets: self.network.takes_long_packets() }
    }

    /// Whether checksums and segmentation can be left to the network.
    pub fn has_offloads(&self) -> bool {
        self.network.has_offloads()
    }

    /// Sleeps until there is something to do after `worked`. `false`: it is time to end.
    pub fn wait(&self, bell: &Bell, worked: Worked) -> bool {
        let mut wanted = PollFlags::empty();
        wanted.set(PollFlags::IN, worked.has_room);
        wanted.set(PollFlags::OUT, worked.blocked || self.network.has_unsent());
        worked.more || bell.wait_or((self.is_up && !wanted.is_empty()).then(|| (self.network.fd(), wanted))).is_some()
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
        let Offloads { checksum, tso4, tso6 } = offloads;
        self.network.set_guest_offloads(GuestOffloads { checksum, tso4, tso6 })
    }

    /// Lets `card` work with the network; without one, what is sent is lost.
    ///
    /// # Errors
    /// The card's: its ring is broken.
    pub fn turn<Broken>(
        &mut self,
        card: impl FnOnce(Option<&mut (dyn Network + '_)>) -> Result<Worked, NetError<Broken>>,
    ) -> Result<Worked, Broken> {
        let unsent = if self.is_up && self.network.has_unsent() { self.network.send_unsent() } else { Ok(()) };
        let worked = match unsent {
            Err(error) if !matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Err(NetError::Network(error)),
            _ if self.is_up => card(Some(&mut Wire(self.network.as_mut()))),
            _ => card(None),
        };
        match worked {
            Ok(worked) => Ok(worked),
            Err(NetError::Ring(error)) => Err(error),
            Err(NetError::Network(error)) => {
                // Once: without a link the network is left alone.
                eprintln!("vmctl: a network is gone: {error}");
                self.is_up = false;
                Ok(Worked { more: true, ..Worked::default() })
            }
        }
    }
}
