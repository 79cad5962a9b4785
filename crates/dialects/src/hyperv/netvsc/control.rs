//! What a card and its driver tell each other by RNDIS besides packets: objects queried and set.
//!
//! Pure: a message in, its answer out. What the guest has set decides what is done with packets: [`Adapter::accepts`], [`Adapter::queue`].

use abi::hyperv::rndis::{
    CONNECTIONLESS, ChecksumOffload, Complete, ENCAPSULATION_ETHERNET, FILTER_ALL_MULTICAST, FILTER_BROADCAST, FILTER_DIRECTED,
    FILTER_MULTICAST, FILTER_PROMISCUOUS, HEADER_SIZE, Header, IndicateStatus, Initialize, InitializeComplete, LSO_IPV6_ALL, LsoV2,
    MAJOR_VERSION, OFFLOAD_SIZES, ObjectHeader, Offload, OffloadParameters, Query, QueryComplete, RSC_DISABLED, RSC_ENABLED,
    RSC_PARAMETERS, RSS_CAPABILITIES_SIZE, ResetComplete, RssCapabilities, RssParameters, checksum_offload, message, object,
    offload_parameter, oid, rss, status,
};
use frames::MAX_FRAME;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Most messages in one NVSP packet, and the power of two that they are aligned to; as Hyper-V says.
pub(super) const MAX_PACKETS: u32 = 8;
const ALIGNMENT_EXPONENT: u32 = 3;
/// Most bytes of what the guest sends at once.
pub(super) const MAX_TRANSFER: usize = 128 << 10;
/// 10 Gbit/s, in units of 100 bit/s.
const LINK_SPEED: u32 = 100_000_000;
/// Largest packet to be cut, or to be taken whole: the MTU of the largest network, passt's.
const MAX_LSO: u32 = 65520;
/// No vendor's number (`OID_GEN_VENDOR_ID`): all ones for who has none.
const VENDOR_ID: u32 = 0x00ff_ffff;
const VENDOR: &[u8] = b"pvbus\0";
/// Group addresses that a guest may list; all groups are received anyway.
const MAX_GROUPS: u32 = 64;
/// The parameter by which Linux and Windows change a card's address.
const ADDRESS_PARAMETER: &str = "NetworkAddress";
/// Objects that are there (`OID_GEN_SUPPORTED_LIST`).
const OBJECTS: [u32; 20] = [
    oid::SUPPORTED_LIST,
    oid::HARDWARE_STATUS,
    oid::MEDIA_SUPPORTED,
    oid::MEDIA_IN_USE,
    oid::MAXIMUM_FRAME_SIZE,
    oid::LINK_SPEED,
    oid::VENDOR_ID,
    oid::VENDOR_DESCRIPTION,
    oid::CURRENT_PACKET_FILTER,
    oid::MAXIMUM_TOTAL_SIZE,
    oid::MEDIA_CONNECT_STATUS,
    oid::RSS_CAPABILITIES,
    oid::RSS_PARAMETERS,
    oid::CONFIG_PARAMETER,
    oid::PERMANENT_ADDRESS,
    oid::CURRENT_ADDRESS,
    oid::MULTICAST_LIST,
    oid::MAXIMUM_LIST_SIZE,
    oid::OFFLOAD_PARAMETERS,
    oid::OFFLOAD_CAPABILITIES,
];

/// A value, or an RNDIS status that says why there is none.
type Value<T> = Result<T, u32>;

/// A card as its driver sees it.
pub(super) struct Adapter {
    permanent_address: [u8; 6],
    address: [u8; 6],
    /// Most channels.
    max_queues: u32,
    /// Longest frame without a VLAN's tag.
    pub mtu: u32,
    pub has_link: bool,
    filter: u32,
    /// Whether the guest wants to know which checksums are right.
    pub trusts_checksums: bool,
    /// Whether it takes segments that were put together, over IPv4 and over IPv6.
    pub coalesces: [bool; 2],
    /// Which channel takes which packets; empty when all go to the first.
    table: Vec<u8>,
}

impl Adapter {
    pub fn new(address: [u8; 6], max_queues: u32, mtu: u32) -> Adapter {
        Adapter {
            permanent_address: address,
            address,
            max_queues,
            mtu,
            has_link: true,
            filter: 0,
            trusts_checksums: false,
            coalesces: [false; 2],
            table: Vec::new(),
        }
    }

    /// Forgets what the guest has set.
    pub fn reset(&mut self) {
        self.address = self.permanent_address;
        self.filter = 0;
        self.trusts_checksums = false;
        self.coalesces = [false; 2];
        self.table.clear();
    }

    /// The answer to a message; `None` where none is due.
    pub fn answer(&mut self, bytes: &[u8]) -> Option<Vec<u8>> {
        let (header, body) = Header::read_from_prefix(bytes).ok()?;
        let kind = header.kind.get();
        match kind {
            message::INITIALIZE => {
                let (request, _) = Initialize::read_from_prefix(body).ok()?;
                Some(complete(kind, &initialize(&request), &[]))
            }
            message::HALT => {
                self.reset();
                None
            }
            message::QUERY => {
                let (request, _) = Query::read_from_prefix(body).ok()?;
                let value = input(body, &request).and_then(|input| self.query(request.oid.get(), input));
                let (status, value) = value.map_or_else(|status| (status, Vec::new()), |value| (status::SUCCESS, value));
                let offset = if value.is_empty() { 0 } else { size_of::<QueryComplete>() as u32 };
                let answer = QueryComplete {
                    request_id: request.request_id,
                    status: status.into(),
                    length: (value.len() as u32).into(),
                    offset: offset.into(),
                };
                Some(complete(kind, &answer, &value))
            }
            message::SET => {
                let (request, _) = Query::read_from_prefix(body).ok()?;
                let done = input(body, &request).and_then(|input| self.set(request.oid.get(), input));
                let status = done.err().unwrap_or(status::SUCCESS);
                Some(complete(kind, &Complete { request_id: request.request_id, status: status.into() }, &[]))
            }
            message::RESET => {
                self.reset();
                Some(complete(kind, &ResetComplete { status: status::SUCCESS.into(), addressing_reset: 1.into() }, &[]))
            }
            message::KEEPALIVE => {
                let request_id = *body.first_chunk()?;
                Some(complete(kind, &Complete { request_id: request_id.into(), status: status::SUCCESS.into() }, &[]))
            }
            _ => None,
        }
    }

    /// The message that tells whether there is a link.
    pub fn link_status(&self) -> Vec<u8> {
        let status = if self.has_link { status::MEDIA_CONNECT } else { status::MEDIA_DISCONNECT };
        build(message::INDICATE_STATUS, &IndicateStatus { status: status.into(), length: 0.into(), offset: 0.into() }, &[])
    }

    /// Whether the guest wants `frame`.
    pub fn accepts(&self, frame: &[u8]) -> bool {
        let wanted = match frame.first_chunk::<6>() {
            Some([0xff, 0xff, 0xff, 0xff, 0xff, 0xff]) => FILTER_BROADCAST,
            Some([first, ..]) if first & 1 != 0 => FILTER_MULTICAST | FILTER_ALL_MULTICAST,
            // The network has chosen by address.
            Some(_) => FILTER_DIRECTED,
            None => 0,
        };
        self.filter & (wanted | FILTER_PROMISCUOUS) != 0
    }

    /// On which channel packets of a flow are received.
    pub fn queue(&self, flow: usize) -> usize {
        let place = flow % self.table.len().max(1);
        self.table.get(place).copied().map_or(0, usize::from)
    }

    fn query(&self, oid: u32, input: &[u8]) -> Value<Vec<u8>> {
        let number = |value: u32| Ok(value.to_le_bytes().to_vec());
        match oid {
            oid::SUPPORTED_LIST => Ok(OBJECTS.iter().flat_map(|oid| oid.to_le_bytes()).collect()),
            // Ready, Ethernet, Ethernet.
            oid::HARDWARE_STATUS | oid::MEDIA_SUPPORTED | oid::MEDIA_IN_USE => number(0),
            oid::MAXIMUM_FRAME_SIZE => number(self.mtu.saturating_sub(14)),
            oid::MAXIMUM_TOTAL_SIZE => number(self.mtu),
            oid::LINK_SPEED => number(LINK_SPEED),
            oid::VENDOR_ID => number(VENDOR_ID),
            oid::VENDOR_DESCRIPTION => Ok(VENDOR.to_vec()),
            oid::CURRENT_PACKET_FILTER => number(self.filter),
            oid::MEDIA_CONNECT_STATUS => number(u32::from(!self.has_link)),
            oid::PERMANENT_ADDRESS => Ok(self.permanent_address.to_vec()),
            oid::CURRENT_ADDRESS => Ok(self.address.to_vec()),
            oid::MAXIMUM_LIST_SIZE => number(MAX_GROUPS),
            oid::OFFLOAD_CAPABILITIES => Ok(offload(input)),
            oid::RSS_CAPABILITIES => {
                let header = ObjectHeader { kind: object::RSS_CAPABILITIES, revision: 2, size: (RSS_CAPABILITIES_SIZE as u16).into() };
                let capabilities = RssCapabilities {
                    header,
                    flags: (rss::CAP_TCP_IPV4 | rss::CAP_TCP_IPV6).into(),
                    interrupts: self.max_queues.into(),
                    queues: self.max_queues.into(),
                    table_entries: (rss::TABLE_ENTRIES as u16).into(),
                };
                Ok(capabilities.as_bytes().to_vec())
            }
            _ => Err(status::NOT_SUPPORTED),
        }
    }

    fn set(&mut self, oid: u32, input: &[u8]) -> Value<()> {
        match oid {
            oid::CURRENT_PACKET_FILTER => {
                self.filter = u32::from_le_bytes(*input.first_chunk().ok_or(status::INVALID_DATA)?);
                Ok(())
            }
            oid::MULTICAST_LIST => Ok(()),
            oid::OFFLOAD_PARAMETERS => self.set_offloads(input),
            oid::RSS_PARAMETERS => self.set_rss(input),
            oid::CONFIG_PARAMETER => {
                self.address = address_parameter(input).ok_or(status::NOT_SUPPORTED)?;
                Ok(())
            }
            _ => Err(status::NOT_SUPPORTED),
        }
    }

    /// Whatever is sent says for itself what is to be done with it; what is received depends on this.
    fn set_offloads(&mut self, input: &[u8]) -> Value<()> {
        let (parameters, _) = OffloadParameters::read_from_prefix(input).map_err(|_| status::INVALID_DATA)?;
        for (coalesces, value) in self.coalesces.iter_mut().zip(input.get(RSC_PARAMETERS).unwrap_or_default()) {
            match *value {
                offload_parameter::NO_CHANGE => {}
                RSC_DISABLED => *coalesces = false,
                RSC_ENABLED => *coalesces = true,
                _ => return Err(status::INVALID_DATA),
            }
        }
        for value in [parameters.tcp4_checksum, parameters.udp4_checksum, parameters.tcp6_checksum, parameters.udp6_checksum] {
            match value {
                offload_parameter::NO_CHANGE => {}
                offload_parameter::DISABLED | offload_parameter::TX_ONLY => self.trusts_checksums = false,
                offload_parameter::RX_ONLY | offload_parameter::ENABLED => {
                    self.trusts_checksums = true;
                    return Ok(());
                }
                _ => return Err(status::INVALID_DATA),
            }
        }
        Ok(())
    }

    fn set_rss(&mut self, input: &[u8]) -> Value<()> {
        let (parameters, _) = RssParameters::read_from_prefix(input).map_err(|_| status::INVALID_DATA)?;
        if parameters.flags.get() & rss::DISABLE != 0 {
            self.table.clear();
            return Ok(());
        }
        let (offset, size) = (parameters.table_offset.get() as usize, usize::from(parameters.table_size.get()));
        let table = input.get(offset..).and_then(|rest| rest.get(..size)).filter(|table| table.len() <= 4 * rss::TABLE_ENTRIES);
        let entries = table.ok_or(status::INVALID_DATA)?.chunks_exact(4).map(|entry| match *entry {
            [queue, 0, 0, 0] if u32::from(queue) < self.max_queues => Ok(queue),
            _ => Err(status::INVALID_DATA),
        });
        self.table = entries.collect::<Value<_>>()?;
        Ok(())
    }
}

fn initialize(request: &Initialize) -> InitializeComplete {
    let known = request.major_version.get() == MAJOR_VERSION;
    InitializeComplete {
        request_id: request.request_id,
        status: (if known { status::SUCCESS } else { status::BAD_VERSION }).into(),
        major_version: MAJOR_VERSION.into(),
        minor_version: 0.into(),
        device_flags: CONNECTIONLESS.into(),
        medium: 0.into(),
        max_packets: MAX_PACKETS.into(),
        max_transfer_size: (MAX_TRANSFER as u32).into(),
        alignment_exponent: ALIGNMENT_EXPONENT.into(),
        reserved: [0.into(); 2],
    }
}

/// What the card can do for the guest, in the revision that the guest asks for.
fn offload(input: &[u8]) -> Vec<u8> {
    let asked = ObjectHeader::read_from_prefix(input).map_or(1, |(header, _)| header.revision);
    let revision = usize::from(asked).clamp(1, OFFLOAD_SIZES.len());
    let size = OFFLOAD_SIZES.get(revision - 1).copied().unwrap_or(size_of::<Offload>());
    let segments = checksum_offload::TCP | checksum_offload::TCP_OPTIONS | checksum_offload::UDP;
    let encapsulated = |flags: u32| [ENCAPSULATION_ETHERNET.into(), flags.into()];
    let (ipv4, ipv6) = (segments | checksum_offload::IPV4, segments | checksum_offload::IPV6_EXTENSIONS);
    let offload = Offload {
        header: ObjectHeader { kind: object::OFFLOAD, revision: revision as u8, size: (size as u16).into() },
        checksum: ChecksumOffload {
            ipv4_tx: encapsulated(ipv4),
            ipv4_rx: encapsulated(segments),
            ipv6_tx: encapsulated(ipv6),
            ipv6_rx: encapsulated(segments),
        },
        lso_v2: LsoV2 {
            ipv4_encapsulation: ENCAPSULATION_ETHERNET.into(),
            ipv4_max_size: MAX_LSO.into(),
            ipv4_min_segments: 2.into(),
            ipv6_encapsulation: ENCAPSULATION_ETHERNET.into(),
            ipv6_max_size: MAX_LSO.into(),
            ipv6_min_segments: 2.into(),
            ipv6_options: LSO_IPV6_ALL.into(),
        },
        rsc: [1; 2],
        ..Offload::default()
    };
    offload.as_bytes().get(..size).unwrap_or_default().to_vec()
}

/// The value that comes with a request.
fn input<'a>(body: &'a [u8], request: &Query) -> Value<&'a [u8]> {
    let (offset, length) = (request.offset.get() as usize, request.length.get() as usize);
    // Where nothing is given, some say where that would be.
    if length == 0 { Ok(&[]) } else { body.get(offset..).and_then(|rest| rest.get(..length)).ok_or(status::INVALID_DATA) }
}

/// The address in a parameter: offset and length of its name, its type, offset and length of its value; both are UTF-16
/// (`struct rndis_config_parameter_info`).
fn address_parameter(input: &[u8]) -> Option<[u8; 6]> {
    let text = |at: usize| {
        let field = |at: usize| Some(u32::from_le_bytes(*input.get(at..)?.first_chunk()?) as usize);
        let (offset, length) = (field(at)?, field(at + 4)?);
        let bytes = input.get(offset..)?.get(..length)?;
        let letters: Vec<u16> = bytes.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]])).collect();
        String::from_utf16(&letters).ok()
    };
    let value = text(12).filter(|value| value.len() == 12 && value.is_ascii() && text(0).as_deref() == Some(ADDRESS_PARAMETER))?;
    let mut address = [0; 6];
    for (byte, at) in address.iter_mut().zip((0..).step_by(2)) {
        *byte = u8::from_str_radix(value.get(at..at + 2)?, 16).ok()?;
    }
    // Not a group's.
    (address[0] & 1 == 0).then_some(address)
}

/// The answer to a message of type `kind`.
fn complete(kind: u32, body: &(impl IntoBytes + Immutable), value: &[u8]) -> Vec<u8> {
    build(kind | message::COMPLETION, body, value)
}

fn build(kind: u32, body: &(impl IntoBytes + Immutable), value: &[u8]) -> Vec<u8> {
    let length = (HEADER_SIZE + body.as_bytes().len() + value.len()) as u32;
    let header = Header { kind: kind.into(), length: length.into() };
    [header.as_bytes(), body.as_bytes(), value].concat()
}

const _: () = assert!(MAX_TRANSFER > MAX_FRAME);
