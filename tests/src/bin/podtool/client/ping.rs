//! An echo request of ICMP (RFC 792), from a raw socket.

use std::io::{self, Read};
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use socket2::{Domain, Protocol, Socket, Type};

const REQUEST: u8 = 8;
const REPLY: u8 = 0;

/// Sends one request and waits for its reply.
pub(super) fn send(to: Ipv4Addr, limit: Duration) -> Result<Value> {
    let mut socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4))
        .context("open a raw socket, which needs CAP_NET_RAW")?;
    socket.connect(&SocketAddr::from((to, 0)).into())?;
    let request = request(std::process::id() as u16);
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
        if is_reply(&packet[..length], &request) {
            return Ok(json!({"ms": start.elapsed().as_millis()}));
        }
    }
    anyhow::bail!("no answer of {to} after {limit:?}")
}

fn request(identifier: u16) -> [u8; 8] {
    let [high, low] = identifier.to_be_bytes();
    let mut request = [REQUEST, 0, 0, 0, high, low, 0, 1];
    let sum: u32 = request
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]))
        .sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    [request[2], request[3]] = (!(folded as u16)).to_be_bytes();
    request
}

/// A raw socket gets every ICMP packet, with its IP header.
fn is_reply(packet: &[u8], request: &[u8; 8]) -> bool {
    let header = packet
        .first()
        .map_or(0, |first| usize::from(first & 0x0f) * 4);
    packet
        .get(header..)
        .is_some_and(|icmp| icmp.first() == Some(&REPLY) && icmp.get(4..8) == Some(&request[4..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_of_a_request_makes_its_sum_all_ones() {
        let request = request(0xfffe);
        let sum: u32 = request
            .chunks(2)
            .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]))
            .sum();
        assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff);
    }

    #[test]
    fn only_the_reply_to_this_request_counts() {
        let request = request(7);
        let packet = |kind: u8, low: u8| {
            let mut packet = vec![0x45; 20];
            packet.extend([kind, 0, 0, 0, 0, low, 0, 1]);
            packet
        };
        assert!(is_reply(&packet(REPLY, 7), &request));
        assert!(!is_reply(&packet(REPLY, 8), &request));
        assert!(!is_reply(&packet(REQUEST, 7), &request));
        assert!(!is_reply(&[], &request));
    }
}
