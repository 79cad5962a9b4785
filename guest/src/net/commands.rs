//! The commands of the network: `net`, `ping`, `http`.

use alloc::string::{String, ToString};
use alloc::vec;
use core::fmt;

use logic::http::{Answer, Url};
use logic::words::Options;
use pvbus::Nanos;
use pvbus::hal::{MILLISECOND, SECOND};
use smoltcp::iface::SocketHandle;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::socket::{icmp, tcp};
use smoltcp::wire::{Icmpv4Packet, Icmpv4Repr, IpAddress, Ipv4Address};

use super::{Lease, Network};
use crate::bus::Bus;
use crate::commands::{Failure as CommandFailure, Safe};
use crate::{println, time};

/// How long an address is waited for, an answer to a ping, and the next bytes of a page.
const PATIENCE: Nanos = 5 * SECOND;
/// What the way out of this network is called in a URL.
const GATEWAY: &str = "gateway";
/// Bytes that a TCP connection may have on the way.
const WINDOW: usize = 64 << 10;
/// First of the ports for connections that we begin (RFC 6335).
const FIRST_PORT: u16 = 49152;
/// Bytes of data in a ping, as everywhere.
const PING_BYTES: usize = 56;
/// Identifier of our pings.
const PING_IDENT: u16 = 0x7076;
/// Most pings of one command.
const PINGS: u16 = 1000;

/// Why the network did not do it.
pub enum Failure {
    /// There is no network card, or not any more.
    NoCard,
    /// No address in time.
    NoAddress,
    /// Nobody answers.
    NoAnswer,
    /// The connection was refused, or broke off.
    Refused,
    /// The answer is none of HTTP's, or not of success.
    NotHttp(String),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::NoCard => f.write_str("there is no network card"),
            Failure::NoAddress => f.write_str("the network has told no address yet"),
            Failure::NoAnswer => f.write_str("there is no answer"),
            Failure::Refused => f.write_str("the connection was refused or broke off"),
            Failure::NotHttp(said) => write!(f, "the answer is «{said}»"),
        }
    }
}

type Done = Result<(), CommandFailure>;

/// `net`: the cards and their addresses, or another address for the first.
pub fn net(bus: &mut Bus, arguments: &[String]) -> Done {
    let (address, router) = match arguments {
        [] => {
            show(bus);
            return Ok(());
        }
        [address] => (address, None),
        [address, router] => (address, Some(router.parse().map_err(|_| CommandFailure::Usage)?)),
        _ => return Err(CommandFailure::Usage),
    };
    let address = address.parse().map_err(|()| CommandFailure::Usage)?;
    bus.network().ok_or(Failure::NoCard)?.set(Lease { address, router });
    Ok(())
}

fn show(bus: &mut Bus) {
    for card in bus.tree.cards() {
        let [a, b, c, d, e, f] = card.mac();
        println!("{}: {a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}, MTU {}", card.name(), card.mtu());
        if let Some(lease) = bus.networks().iter().find(|network| network.name() == card.name()).and_then(|network| network.lease) {
            println!("    {lease}");
        }
    }
}

/// `ping`: asks a host whether it is there.
pub fn ping(bus: &mut Bus, arguments: &[String]) -> Done {
    let (host, count) = match arguments {
        [host] => (host, 1),
        [host, count] => (host, count.parse().ok().filter(|count| *count <= PINGS).ok_or(CommandFailure::Usage)?),
        _ => return Err(CommandFailure::Usage),
    };
    let address = find(bus, host)?;
    let network = bus.network().ok_or(Failure::NoCard)?;
    let buffer = || icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; 4], vec![0; 1024]);
    let mut socket = icmp::Socket::new(buffer(), buffer());
    // It is new.
    let _ = socket.bind(icmp::Endpoint::Ident(PING_IDENT));
    let handle = network.sockets.add(socket);
    let result = (0..count).try_for_each(|seq_no| {
        let start = time::now();
        let bytes = exchange(bus, handle, address, seq_no)?;
        let micros = (time::now() - start) / 1000;
        println!("{bytes} bytes from {address}: seq {seq_no}, {}.{:03} ms", micros / 1000, micros % 1000);
        Ok::<(), Failure>(())
    });
    if let Some(network) = bus.network() {
        network.sockets.remove(handle);
    }
    Ok(result?)
}

/// One ping; the bytes of the answer.
fn exchange(bus: &mut Bus, handle: SocketHandle, address: Ipv4Address, seq_no: u16) -> Result<usize, Failure> {
    let checksums = ChecksumCapabilities::default();
    let request = Icmpv4Repr::EchoRequest { ident: PING_IDENT, seq_no, data: &[b'x'; PING_BYTES] };
    let network = bus.network().ok_or(Failure::NoCard)?;
    let socket = network.sockets.get_mut::<icmp::Socket>(handle);
    let room = socket.send(request.buffer_len(), IpAddress::Ipv4(address)).map_err(|_| Failure::NoAnswer)?;
    request.emit(&mut Icmpv4Packet::new_unchecked(room), &checksums);
    bus.wait_for_network(time::now() + PATIENCE, |network| {
        let socket = network.sockets.get_mut::<icmp::Socket>(handle);
        while let Ok((bytes, _)) = socket.recv() {
            let packet = Icmpv4Packet::new_checked(bytes).ok();
            let answer = packet.and_then(|packet| Icmpv4Repr::parse(&packet, &checksums).ok());
            if matches!(answer, Some(Icmpv4Repr::EchoReply { seq_no: answered, .. }) if answered == seq_no) {
                return Some(Ok(bytes.len()));
            }
        }
        None
    })?
}

/// `http`: fetches a page.
pub fn http(bus: &mut Bus, arguments: &[String]) -> Done {
    let options = Options::parse(arguments, "q", "").map_err(|_| CommandFailure::Usage)?;
    let [url] = options.operands else { return Err(CommandFailure::Usage) };
    let url = Url::parse(url).ok_or(CommandFailure::Usage)?;
    let address = find(bus, url.host)?;
    let network = bus.network().ok_or(Failure::NoCard)?;
    let buffer = || tcp::SocketBuffer::new(vec![0; WINDOW]);
    let mut socket = tcp::Socket::new(buffer(), buffer());
    let start = time::now();
    // Ports differ from those of connections that the other end may not have forgotten yet.
    let port = FIRST_PORT + (start / MILLISECOND % u64::from(u16::MAX - FIRST_PORT)) as u16;
    // Neither port is zero, and the socket is new.
    let _ = socket.connect(network.interface.context(), (address, url.port), port);
    let handle = network.sockets.add(socket);
    let mut answer = Answer::default();
    let fetched = fetch(bus, handle, &url.request(), &mut answer);
    if let Some(network) = bus.network() {
        // The other end hears of it.
        network.sockets.get_mut::<tcp::Socket>(handle).abort();
        network.poll();
        network.sockets.remove(handle);
    }
    fetched?;
    let status = answer.status().ok_or_else(|| Failure::NotHttp(String::new()))?;
    if !options.has('q') {
        println!("{}", Safe(answer.body()));
    }
    let micros = (time::now() - start) / 1000;
    println!("{status}, {} bytes in {}.{:03} ms", answer.length(), micros / 1000, micros % 1000);
    if status.starts_with('2') { Ok(()) } else { Err(Failure::NotHttp(status.to_string()).into()) }
}

/// Asks, and takes what comes until the other end has said all.
fn fetch(bus: &mut Bus, handle: SocketHandle, request: &str, answer: &mut Answer) -> Result<(), Failure> {
    let mut unsent = request.as_bytes();
    loop {
        let is_over = bus.wait_for_network(time::now() + PATIENCE, |network| {
            let socket = network.sockets.get_mut::<tcp::Socket>(handle);
            if socket.may_send() && !unsent.is_empty() {
                let count = socket.send_slice(unsent).unwrap_or(0);
                unsent = &unsent[count..];
            }
            let mut has_come = false;
            while socket.can_recv() {
                has_come = true;
                let is_answer = socket.recv(|bytes| (bytes.len(), answer.take(bytes))).unwrap_or(false);
                if !is_answer {
                    return Some(Err(Failure::NotHttp(String::new())));
                }
            }
            match socket.state() {
                tcp::State::Closed => Some(Err(Failure::Refused)),
                tcp::State::CloseWait => Some(Ok(true)),
                _ => has_come.then_some(Ok(false)),
            }
        })??;
        if is_over {
            return Ok(());
        }
    }
}

/// The address of a host, when we have one ourselves.
fn find(bus: &mut Bus, host: &str) -> Result<Ipv4Address, CommandFailure> {
    let address = host.parse().ok();
    if address.is_none() && host != GATEWAY {
        return Err(CommandFailure::Usage);
    }
    let lease = bus.wait_for_network(time::now() + PATIENCE, |network: &mut Network| network.lease);
    let lease = lease.map_err(|failure| if matches!(failure, Failure::NoAnswer) { Failure::NoAddress } else { failure })?;
    Ok(address.or(lease.router).ok_or(Failure::NoAddress)?)
}
