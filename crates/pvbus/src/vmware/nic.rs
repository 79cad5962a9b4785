//! Network cards as the host wants them: "NIC info" version 3 in XDR, layout in [`abi::vmware::rpc::nic_info`].
//!
//! Cards without an address, loopback addresses and IPv6 addresses that are good on one link only are left out, as OpenBSD does. The parts
//! about name servers, DHCP and routes are empty.

use alloc::vec::Vec;
use core::net::IpAddr;

use abi::vmware::rpc::nic_info::{IPV4, IPV6, MAX_ADDRESSES, MAX_NICS, V3};

use crate::net::{Address, Nic};

/// Optional parts that are absent: of a card and of the whole.
const ABSENT: [u32; 4] = [0; 4];

/// The cards in XDR.
pub(super) fn encode(nics: &[Nic]) -> Vec<u8> {
    let cards: Vec<(&Nic, Vec<&Address>)> = nics
        .iter()
        .map(|nic| (nic, nic.addresses.iter().filter(|address| is_told(&address.ip)).take(MAX_ADDRESSES).collect::<Vec<_>>()))
        .filter(|(_, addresses)| !addresses.is_empty())
        .take(MAX_NICS)
        .collect();
    let mut xdr = Xdr(Vec::new());
    xdr.words(&[V3, 1]);
    xdr.count(cards.len());
    for (nic, addresses) in &cards {
        xdr.opaque(nic.mac_text().as_bytes());
        xdr.count(addresses.len());
        for address in addresses {
            match address.ip {
                IpAddr::V4(ip) => {
                    xdr.words(&[IPV4]);
                    xdr.opaque(&ip.octets());
                }
                IpAddr::V6(ip) => {
                    xdr.words(&[IPV6]);
                    xdr.opaque(&ip.octets());
                }
            }
            // Without origin and status.
            xdr.words(&[u32::from(address.prefix), 0, 0]);
        }
        xdr.words(&ABSENT);
    }
    xdr.count(0);
    xdr.words(&ABSENT);
    xdr.0
}

fn is_told(ip: &IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => !ip.is_loopback(),
        IpAddr::V6(ip) => !ip.is_loopback() && !ip.is_unicast_link_local() && !ip.is_multicast(),
    }
}

/// RFC 4506: big-endian words, and bytes padded to words.
struct Xdr(Vec<u8>);

impl Xdr {
    fn words(&mut self, words: &[u32]) {
        self.0.extend(words.iter().flat_map(|word| word.to_be_bytes()));
    }

    fn count(&mut self, count: usize) {
        self.words(&[u32::try_from(count).unwrap_or(u32::MAX)]);
    }

    fn opaque(&mut self, bytes: &[u8]) {
        self.count(bytes.len());
        self.0.extend_from_slice(bytes);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn card_with_two_addresses_is_as_the_host_reads_it() {
        let nic = Nic {
            mac: [0, 0x0c, 0x29, 1, 2, 0xff],
            addresses: alloc::vec![
                Address { ip: "192.0.2.7".parse().unwrap(), prefix: 24 },
                Address { ip: "fe80::1".parse().unwrap(), prefix: 64 },
                Address { ip: "2001:db8::7".parse().unwrap(), prefix: 64 },
            ],
        };
        let bare = Nic { mac: [1; 6], addresses: alloc::vec![Address { ip: "127.0.0.1".parse().unwrap(), prefix: 8 }] };
        let mut expected = Vec::new();
        let words = |expected: &mut Vec<u8>, words: &[u32]| expected.extend(words.iter().flat_map(|word| word.to_be_bytes()));
        words(&mut expected, &[3, 1, 1, 17]);
        expected.extend(b"00:0c:29:01:02:ff\0\0\0");
        words(&mut expected, &[2, 1, 4, 0xc000_0207, 24, 0, 0, 2, 16, 0x2001_0db8, 0, 0, 7, 64, 0, 0]);
        words(&mut expected, &[0, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(encode(&[bare, nic]), expected);
    }
}
