//! What of ours can be deleted on a side, and the command for each.

use super::{Held, Kind, Piece, Section, Side};

/// What every chain of ours is called, before the built-in chain that leads to it.
const PREFIX: &str = "ztunnel-";

/// Ports of the proxy's listeners.
const PORTS: [&str; 3] = ["15001", "15006", "15008"];

/// Everything of ours that a side holds.
#[must_use]
pub fn pieces(side: &Side, held: &Held) -> Vec<Piece> {
    let text = |section: Section| held.get(&section).map_or("", String::as_str);
    let mut all = Vec::new();
    let mut add = |kind: Kind, sections: &'static [Section], delete: String| {
        all.push(Piece {
            kind,
            side: side.clone(),
            sections,
            delete,
        });
    };
    for line in text(Section::Links).lines() {
        if let Some(device) = ours(line) {
            let shows = &[Section::Links, Section::Addresses, Section::Routes];
            add(Kind::Link, shows, format!("ip link del {device}"));
            add(Kind::Up, shows, format!("ip link set {device} down"));
        }
    }
    for line in text(Section::Addresses).lines() {
        if let (Some(device), Some(address)) = (ours(line), line.split(' ').nth(2)) {
            let delete = format!("ip addr del {address} dev {device}");
            add(
                Kind::Address,
                &[Section::Addresses, Section::Routes],
                delete,
            );
        }
    }
    for line in of_protocol(text(Section::Rules)) {
        add(Kind::Rule, &[Section::Rules], delete_rule(line));
    }
    for line in of_protocol(text(Section::Routes)) {
        let (family, route) = line.split_at(2);
        add(
            Kind::Route,
            &[Section::Routes],
            format!("ip {family} route del{route}"),
        );
    }
    for (kind, delete) in sets(text(Section::Sets)) {
        add(kind, &[Section::Sets, Section::Chains], delete);
    }
    for (kind, delete) in chains(text(Section::Chains)) {
        add(kind, &[Section::Chains], delete);
    }
    for delete in text(Section::Settings)
        .lines()
        .filter_map(|line| setting(line, side.of_proxy))
    {
        let shows = &[Section::Settings, Section::Addresses, Section::Routes];
        add(Kind::Setting, shows, delete);
    }
    for port in PORTS.into_iter().filter(|_| side.of_proxy) {
        for family in ["-4", "-6"] {
            let delete =
                format!("ss {family} -K -H state listening 'sport = :{port}' | grep -q :{port}");
            add(Kind::Socket, &[Section::Listeners], delete);
        }
    }
    all
}

/// The device that a line begins with, if it is ours.
fn ours(line: &str) -> Option<&str> {
    line.split(' ')
        .next()
        .filter(|device| device.contains("istio"))
}

fn of_protocol(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter(|line| line.contains("proto 90"))
}

/// `-4 102: from all fwmark 0x40/0x40 lookup 102 proto 90`: two may have one priority, not one mark.
fn delete_rule(line: &str) -> String {
    let (family, rule) = line.split_at(2);
    let priority = rule.split(':').next().unwrap_or_default();
    let mut words = rule.split_whitespace();
    let mark = words
        .find(|word| *word == "fwmark")
        .and_then(|_| words.next())
        .map(|mark| format!(" fwmark {mark}"))
        .unwrap_or_default();
    format!("ip {family} rule del priority{priority}{mark}")
}

fn sets(text: &str) -> Vec<(Kind, String)> {
    let mut all = Vec::new();
    for name in text.lines().filter_map(|line| line.strip_prefix("Name: ")) {
        let program = if name.ends_with('6') {
            "ip6tables"
        } else {
            "iptables"
        };
        let hook = if name.contains("guard") {
            "FORWARD"
        } else {
            "PREROUTING"
        };
        all.push((
            Kind::Set,
            format!("{program} -w 5 -t mangle -F {PREFIX}{hook}; ipset destroy {name}"),
        ));
        all.push((Kind::Members, format!("ipset flush {name}")));
        let members = text
            .lines()
            .filter_map(|line| line.strip_prefix(name)?.strip_prefix(' '))
            .filter(|rest| rest.parse::<std::net::IpAddr>().is_ok());
        all.extend(members.map(|member| (Kind::Member, format!("ipset del {name} {member}"))));
    }
    all
}

fn chains(text: &str) -> Vec<(Kind, String)> {
    let mut all = Vec::new();
    let mut number = 0;
    for line in text.lines() {
        let words: Vec<&str> = line.splitn(5, ' ').collect();
        let (Some(family), Some(table)) = (words.first(), words.get(1)) else {
            continue;
        };
        let program = if *family == "-6" {
            "ip6tables"
        } else {
            "iptables"
        };
        let table = format!("{program} -w 5 -t {table}");
        match words[2..] {
            [name, ..] if name.starts_with(':') => {
                number = 0;
                if let Some(hook) = name
                    .strip_prefix(':')
                    .and_then(|name| name.strip_prefix(PREFIX))
                {
                    let chain = format!("{PREFIX}{hook}");
                    let jump = format!("{table} -D {hook} -j {chain}");
                    let delete = format!("{jump}; {table} -F {chain}; {table} -X {chain}");
                    all.extend([(Kind::Jump, jump), (Kind::Chain, delete)]);
                }
            }
            ["-A", chain, rule] if chain.starts_with(PREFIX) => {
                number += 1;
                let kind = if rule.contains("-j TPROXY") {
                    Kind::Tproxy
                } else {
                    Kind::ChainRule
                };
                all.push((kind, format!("{table} -D {chain} {number}")));
            }
            _ => {}
        }
    }
    all
}

/// `ipv4/conf/istioin/rp_filter:2`: what gives it another value, if it is one of ours.
fn setting(line: &str, of_proxy: bool) -> Option<String> {
    let (path, value) = line.split_once(':')?;
    let name = path.rsplit('/').next()?;
    let is_ours =
        path.contains("istio") || of_proxy && !path.contains("/lo/") && !path.contains("/default/");
    let other = match (name, value) {
        // On the host, nobody but us sets this value.
        ("rp_filter", "2") => "0",
        ("rp_filter", "0") if of_proxy && is_ours => "1",
        ("disable_ipv6", "0") if is_ours => "1",
        ("addr_gen_mode", "1") if is_ours => "0",
        ("ip_forward" | "forwarding", "0") if of_proxy => "1",
        ("ip_local_port_range", _) if of_proxy => "40000 50000",
        _ => return None,
    };
    Some(format!("echo {other} >/proc/sys/net/{path}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_deleted_by_priority_and_mark() {
        let line = "-4 102:\tfrom all fwmark 0x40/0x40 lookup 102 proto 90";
        assert_eq!(
            delete_rule(line),
            "ip -4 rule del priority 102 fwmark 0x40/0x40"
        );
        assert_eq!(
            delete_rule("-6 105:\tfrom all nop proto 90"),
            "ip -6 rule del priority 105"
        );
    }

    #[test]
    fn rules_of_a_chain_are_deleted_by_their_place() {
        let text = "-6 mangle :ztunnel-PREROUTING -\n-6 mangle -A ztunnel-PREROUTING -i a -j RETURN\n\
                    -6 mangle -A ztunnel-PREROUTING -i b -j TPROXY --on-port 1";
        let found = chains(text);
        assert_eq!(found.len(), 4);
        assert_eq!(
            found[3],
            (
                Kind::Tproxy,
                "ip6tables -w 5 -t mangle -D ztunnel-PREROUTING 2".to_owned()
            )
        );
    }

    #[test]
    fn settings_of_others_are_left_alone() {
        assert_eq!(setting("ipv4/conf/eth0/rp_filter:1", false), None);
        assert!(setting("ipv4/conf/veth1/rp_filter:2", false).is_some());
        assert_eq!(setting("ipv4/ip_forward:1", false), None);
        assert!(setting("ipv4/ip_forward:0", true).is_some());
    }
}
