//! VMBus against a guest that is none, honest or not, and a device that answers every packet with itself.

mod channels;
mod connection;
mod gpadls;
mod rings;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use abi::hyperv::vmbus::{Guid, USER_BYTES, guid};

use super::testing::{Guest, GuestChannel};
use super::*;
use crate::network::Worked;

/// Pages of a ring in these tests, the control page among them.
const PAGES: u32 = 3;

/// Completes each packet with its payload, and keeps the buffers that packets name by the number in their first bytes.
#[derive(Default)]
struct Echo {
    instance: u8,
    sub_channels: u16,
    channels: BTreeMap<u16, Channel>,
    buffers: Vec<Buffer>,
    buf: PacketBuf,
    /// Payloads and the bytes of ranges so far.
    seen: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Device for Echo {
    type Error = BrokenRing;

    fn offer(&self) -> Offer {
        let instance = Guid([self.instance; 16]);
        Offer { class: guid::SCSI, instance, flags: 0, user_defined: [0; USER_BYTES], sub_channels: self.sub_channels }
    }

    fn opened(&mut self, channel: Channel) {
        self.channels.insert(channel.index(), channel);
    }

    fn closed(&mut self, index: u16) {
        self.channels.remove(&index);
        self.buffers.clear();
    }

    fn work(&mut self) -> Result<Worked, BrokenRing> {
        for channel in self.channels.values_mut() {
            let memory = channel.memory().clone();
            while let Some(packet) = channel.receive(&mut self.buf)? {
                let mut data = Vec::new();
                if let Kind::GpaDirect(ranges) = packet.kind {
                    for range in ranges.iter() {
                        let mut bytes = vec![0; range.len() as usize];
                        match range.read(&memory, &mut bytes) {
                            Ok(()) => data.extend(bytes),
                            Err(NotMemory) => data.extend(b"wild"),
                        }
                    }
                }
                let payload = packet.payload.to_vec();
                if packet.wants_completion {
                    let transaction = packet.transaction;
                    assert!(channel.send(&Outgoing::completion(transaction, &payload))?);
                }
                self.seen.push((payload, data));
            }
        }
        Ok(Worked::default())
    }
}

/// A guest with an echo on its bus, and how often the echo's bell rang.
struct Bench {
    guest: Guest,
    echo: Attached<Echo>,
    rings: Arc<AtomicUsize>,
}

impl Bench {
    fn new(sub_channels: u16) -> Bench {
        let guest = Guest::new();
        let (echo, rings) = attach(&guest, Echo { sub_channels, ..Echo::default() });
        Bench { guest, echo, rings }
    }

    /// A connected guest with the echo's channel open.
    fn open() -> (Bench, GuestChannel) {
        let mut bench = Bench::new(0);
        let relid = bench.guest.connect()[0].relid.get();
        let channel = bench.guest.open(relid, PAGES);
        bench.echo.work();
        (bench, channel)
    }

    fn rings(&self) -> usize {
        self.rings.swap(0, Ordering::SeqCst)
    }

    /// The guest signals a channel, and the device works.
    fn signal(&mut self, relid: u32) {
        assert_eq!(self.guest.bus.signal_event(CHANNEL_CONNECTIONS + relid, 0), Status::SUCCESS);
        assert_ne!(self.rings(), 0);
        self.echo.work();
    }
}

fn attach(guest: &Guest, echo: Echo) -> (Attached<Echo>, Arc<AtomicUsize>) {
    let rings = Arc::new(AtomicUsize::new(0));
    let bell = Arc::clone(&rings);
    let echo = guest.bus.attach(
        echo,
        Arc::new(move || {
            bell.fetch_add(1, Ordering::SeqCst);
        }),
    );
    (echo, rings)
}
