//! Rules of iptables: read from the text that is handed to the kernel, and what they do to a packet.
//! A word that is not known here makes the test fail.

use std::net::IpAddr;

use datapath::Family;
use ipnet::IpNet;

use super::node::Side;
use super::{Connection, Packet, Protocol};

/// A rule.
#[derive(Clone, Debug, Default)]
pub(crate) struct Rule {
    matches: Vec<(Sense, Match)>,
    target: Option<Target>,
}

/// Whether a match is turned round by a `!`.
type Sense = bool;

#[derive(Clone, Debug)]
enum Match {
    Device(String),
    Out(String),
    Source(IpNet),
    Destination(IpNet),
    Protocol(Protocol),
    Port(u16),
    Mark(u32, u32),
    ConnectionMark(u32, u32),
    Established,
    Assured,
    Syn,
    SourceIn(String),
    DestinationIn(String),
    /// Types of ICMPv6 that are errors; the model's ICMP is one.
    Error,
}

#[derive(Clone, Debug)]
enum Target {
    Mark { value: u32, mask: u32 },
    SaveMark { packet: u32, connection: u32 },
    ConnectionMark { value: u32, mask: u32 },
    Return,
    Accept,
    Drop,
    Tproxy { port: u16, value: u32, mask: u32 },
}

/// What becomes of a packet after a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// On to the next chain.
    GoOn,
    /// On, past the rest of this table's chain.
    Accept,
    /// No further.
    Drop,
    /// On, to this port of this namespace if it is delivered here.
    ToPort(u16),
}

/// Runs a chain.
pub(crate) fn run(
    rules: &[Rule],
    side: &Side,
    (device, out): (&str, &str),
    packet: &mut Packet,
    connection: &mut Connection,
) -> Verdict {
    for rule in rules {
        let applies = rule.matches.iter().all(|(sense, wanted)| {
            *sense == is_met(wanted, side, (device, out), packet, *connection)
        });
        if !applies {
            continue;
        }
        match rule.target {
            None => {}
            Some(Target::Mark { value, mask }) => packet.mark = packet.mark & !mask ^ value,
            Some(Target::SaveMark {
                packet: taken,
                connection: written,
            }) => connection.mark = connection.mark & !written ^ packet.mark & taken,
            Some(Target::ConnectionMark { value, mask }) => {
                connection.mark = connection.mark & !mask ^ value;
            }
            Some(Target::Return) => return Verdict::GoOn,
            Some(Target::Accept) => return Verdict::Accept,
            Some(Target::Drop) => return Verdict::Drop,
            Some(Target::Tproxy { port, value, mask }) => {
                packet.mark = packet.mark & !mask ^ value;
                return Verdict::ToPort(port);
            }
        }
    }
    Verdict::GoOn
}

fn is_met(
    wanted: &Match,
    side: &Side,
    (device, out): (&str, &str),
    packet: &Packet,
    connection: Connection,
) -> bool {
    match wanted {
        Match::Device(name) => name == device,
        Match::Out(name) => name == out,
        Match::Source(network) => network.contains(&packet.source),
        Match::Destination(network) => network.contains(&packet.destination),
        Match::Protocol(protocol) => packet.protocol == *protocol,
        Match::Port(port) => packet.port == *port,
        Match::Mark(value, mask) => packet.mark & mask == *value,
        Match::ConnectionMark(value, mask) => connection.mark & mask == *value,
        Match::Established => connection.is_established(),
        Match::Assured => connection.is_assured(),
        Match::Syn => packet.protocol == Protocol::Tcp && connection.is_opened(),
        Match::SourceIn(set) => side.has_member(set, packet.source),
        Match::DestinationIn(set) => side.has_member(set, packet.destination),
        Match::Error => packet.protocol == Protocol::Icmp,
    }
}

/// Reads a rule as `iptables-save` prints it.
pub(crate) fn parse(text: &str) -> Rule {
    let mut rule = Rule::default();
    let mut words = text.split(' ');
    let mut sense = true;
    while let Some(word) = words.next() {
        let mut next = || words.next().unwrap();
        let wanted = match word {
            "!" => {
                sense = false;
                continue;
            }
            // The option that follows says it all.
            "-m" => {
                next();
                continue;
            }
            "-i" => Match::Device(next().to_owned()),
            "-o" => Match::Out(next().to_owned()),
            "-s" => Match::Source(next().parse().unwrap()),
            "-d" => Match::Destination(next().parse().unwrap()),
            "-p" => Match::Protocol(protocol(next())),
            "--dport" => Match::Port(next().parse().unwrap()),
            "--mark" if text.contains("-m connmark") => {
                let (value, mask) = mark(next());
                Match::ConnectionMark(value, mask)
            }
            "--mark" => {
                let (value, mask) = mark(next());
                Match::Mark(value, mask)
            }
            "--ctstate" => {
                assert_eq!(next(), "ESTABLISHED", "{text}");
                Match::Established
            }
            "--ctstatus" => {
                assert_eq!(next(), "ASSURED", "{text}");
                Match::Assured
            }
            "--tcp-flags" => {
                assert_eq!([next(), next()], ["FIN,SYN,RST,ACK", "SYN"], "{text}");
                Match::Syn
            }
            "--match-set" => {
                let set = next().to_owned();
                match next() {
                    "src" => Match::SourceIn(set),
                    "dst" => Match::DestinationIn(set),
                    other => panic!("the model does not know {other:?} of the rule {text:?}"),
                }
            }
            "--icmpv6-type" => {
                assert!(next().parse::<u8>().unwrap() < 128, "{text}");
                Match::Error
            }
            "-j" => {
                rule.target = Some(target(text, &words.collect::<Vec<_>>()));
                return rule;
            }
            other => panic!("the model does not know {other:?} of the rule {text:?}"),
        };
        rule.matches
            .push((std::mem::replace(&mut sense, true), wanted));
    }
    rule
}

fn target(text: &str, words: &[&str]) -> Target {
    match *words {
        ["MARK", "--set-xmark", written] => {
            let (value, mask) = mark(written);
            Target::Mark { value, mask }
        }
        [
            "CONNMARK",
            "--save-mark",
            "--nfmask",
            packet,
            "--ctmask",
            connection,
        ] => Target::SaveMark {
            packet: number(packet),
            connection: number(connection),
        },
        ["CONNMARK", "--set-xmark", written] => {
            let (value, mask) = mark(written);
            Target::ConnectionMark { value, mask }
        }
        ["RETURN"] => Target::Return,
        ["ACCEPT"] => Target::Accept,
        ["DROP"] => Target::Drop,
        [
            "TPROXY",
            "--on-port",
            port,
            "--on-ip",
            ip,
            "--tproxy-mark",
            written,
        ] => {
            let ip: IpAddr = ip.parse().unwrap();
            assert_eq!(ip, Family::of(ip).loopback(), "{text}");
            let (value, mask) = mark(written);
            let port = port.parse().unwrap();
            Target::Tproxy { port, value, mask }
        }
        _ => panic!("the model does not know the target of {text:?}"),
    }
}

fn protocol(word: &str) -> Protocol {
    match word {
        "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        "icmp" | "ipv6-icmp" => Protocol::Icmp,
        other => panic!("the model does not know the protocol {other:?}"),
    }
}

fn mark(text: &str) -> (u32, u32) {
    let (value, mask) = text.split_once('/').unwrap();
    (number(value), number(mask))
}

fn number(text: &str) -> u32 {
    u32::from_str_radix(text.strip_prefix("0x").unwrap(), 16).unwrap()
}
