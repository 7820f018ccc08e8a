//! An echo request of ICMP (RFC 792) or ICMPv6 (RFC 4443), from a raw socket.

use std::io::{self, Read};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use socket2::{Domain, Protocol, Socket, Type};

/// What differs between the two.
#[derive(Clone, Copy)]
struct Kind {
    domain: Domain,
    protocol: Protocol,
    request: u8,
    reply: u8,
    /// A raw socket of IPv4 gets packets with their IP header, one of IPv6 without.
    has_header: bool,
}

const ICMP: Kind = Kind {
    domain: Domain::IPV4,
    protocol: Protocol::ICMPV4,
    request: 8,
    reply: 0,
    has_header: true,
};

const ICMPV6: Kind = Kind {
    domain: Domain::IPV6,
    protocol: Protocol::ICMPV6,
    request: 128,
    reply: 129,
    has_header: false,
};

/// Sends one request and waits for its reply.
pub(super) fn send(to: IpAddr, limit: Duration) -> Result<Value> {
    let kind = if to.is_ipv4() { ICMP } else { ICMPV6 };
    let mut socket = Socket::new(kind.domain, Type::RAW, Some(kind.protocol))
        .context("open a raw socket, which needs CAP_NET_RAW")?;
    socket.connect(&SocketAddr::from((to, 0)).into())?;
    let request = kind.request(std::process::id() as u16);
    let start = Instant::now();
    socket
        .send(&request)
        .with_context(|| format!("send to {to}"))?;
    while start.elapsed() < limit {
        socket.set_read_timeout(Some(limit))?;
        let mut packet = [0; 128];
        let length = match socket.read(&mut packet) {
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => return Err(error).with_context(|| format!("the answer of {to}")),
        };
        if kind.is_reply(&packet[..length], &request) {
            return Ok(json!({"ms": start.elapsed().as_millis()}));
        }
    }
    anyhow::bail!("no answer of {to} after {limit:?}")
}

impl Kind {
    /// The kernel writes the checksum of ICMPv6 anew: it covers the addresses too.
    fn request(self, identifier: u16) -> [u8; 8] {
        let [high, low] = identifier.to_be_bytes();
        let mut request = [self.request, 0, 0, 0, high, low, 0, 1];
        let sum: u32 = request
            .chunks(2)
            .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]))
            .sum();
        let folded = (sum & 0xffff) + (sum >> 16);
        [request[2], request[3]] = (!(folded as u16)).to_be_bytes();
        request
    }

    /// A raw socket gets every packet of the protocol.
    fn is_reply(self, packet: &[u8], request: &[u8; 8]) -> bool {
        let header = match packet.first() {
            Some(first) if self.has_header => usize::from(first & 0x0f) * 4,
            _ => 0,
        };
        packet.get(header..).is_some_and(|icmp| {
            icmp.first() == Some(&self.reply) && icmp.get(4..8) == Some(&request[4..])
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_of_a_request_makes_its_sum_all_ones() {
        let request = ICMP.request(0xfffe);
        let sum: u32 = request
            .chunks(2)
            .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]))
            .sum();
        assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff);
    }

    #[test]
    fn only_the_reply_to_this_request_counts() {
        for kind in [ICMP, ICMPV6] {
            let request = kind.request(7);
            let packet = |first: u8, low: u8| {
                let mut packet = vec![0x45; if kind.has_header { 20 } else { 0 }];
                packet.extend([first, 0, 0, 0, 0, low, 0, 1]);
                packet
            };
            assert!(kind.is_reply(&packet(kind.reply, 7), &request));
            assert!(!kind.is_reply(&packet(kind.reply, 8), &request));
            assert!(!kind.is_reply(&packet(kind.request, 7), &request));
            assert!(!kind.is_reply(&[], &request));
        }
    }
}
