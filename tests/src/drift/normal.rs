//! What the kernel's tools print, without what differs each time: indices, hardware addresses, counters, orders that
//! mean nothing.

use std::collections::BTreeMap;

use super::Section;

/// Kinds of devices, as `ip -d link` prints them.
const DEVICES: [&str; 4] = ["veth", "geneve", "bridge", "dummy"];

pub(super) fn of(section: Section, printed: &str) -> String {
    let lines = printed.lines().map(str::trim_end);
    let lines: Vec<String> = match section {
        Section::Links => lines.filter_map(link).collect(),
        Section::Addresses => lines.filter_map(address).collect(),
        Section::Sets => return sets(lines),
        Section::Chains => return chains(lines),
        Section::Listeners => lines.filter_map(listener).collect(),
        Section::Rules | Section::Routes | Section::Settings => lines.map(str::to_owned).collect(),
    };
    sorted(lines)
}

fn link(line: &str) -> Option<String> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let name = words.get(1)?.split(['@', ':']).next()?;
    let hardware = words.iter().position(|word| word.starts_with("link/"))?;
    let kind = words.iter().position(|word| DEVICES.contains(word));
    let own = words[kind.unwrap_or(words.len())..].join(" ");
    Some(format!("{name} {} {own}", words[2..hardware].join(" ")))
}

fn address(line: &str) -> Option<String> {
    let words: Vec<&str> = line.split_whitespace().collect();
    Some(words.get(1..4)?.join(" "))
}

fn listener(line: &str) -> Option<String> {
    line.split_whitespace().nth(3).map(str::to_owned)
}

fn sets<'a>(lines: impl Iterator<Item = &'a str>) -> String {
    let others = [
        "Revision:",
        "Size in memory:",
        "References:",
        "Number of entries:",
    ];
    let mut sets: Vec<Vec<String>> = Vec::new();
    for line in lines.filter(|line| !others.iter().any(|other| line.starts_with(other))) {
        // The seed of its hash is a number by chance.
        let line = line.split(" initval").next().unwrap_or_default();
        if line.starts_with("Name: ") {
            sets.push(vec![line.to_owned()]);
        } else if let Some(set) = sets.last_mut().filter(|_| !line.is_empty()) {
            let name = set[0].trim_start_matches("Name: ").to_owned();
            set.push(format!("{name} {line}"));
        }
    }
    sorted(sets.concat())
}

/// Every line with its family and table; chains have no order, the rules of one have.
fn chains<'a>(lines: impl Iterator<Item = &'a str>) -> String {
    let mut table = "";
    let mut chains: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for line in lines {
        let Some((family, rest)) = line.split_once(' ') else {
            continue;
        };
        if let Some(name) = rest.strip_prefix('*') {
            table = name;
        } else if let Some(chain) = rest.strip_prefix(':') {
            let name = chain.split(' ').next().unwrap_or_default();
            let policy = chain.split(" [").next().unwrap_or_default();
            let key = format!("{family} {table} {name}");
            let head = format!("{family} {table} :{policy}");
            chains.entry(key).or_default().insert(0, head);
        } else if let Some(rule) = rest.strip_prefix("-A ") {
            let name = rule.split(' ').next().unwrap_or_default();
            let key = format!("{family} {table} {name}");
            let rule = format!("{family} {table} -A {rule}");
            chains.entry(key).or_default().push(rule);
        }
    }
    chains
        .into_values()
        .flatten()
        .collect::<Vec<_>>()
        .join("\n")
}

fn sorted(mut lines: Vec<String>) -> String {
    lines.sort();
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_made_anew_looks_as_before() {
        let line = |index: u8, peer: u8, hardware: &str| {
            format!(
                "{index}: istioin@if{peer}: <BROADCAST,UP,LOWER_UP> mtu 1500 qdisc noqueue state UP \\    \
                 link/ether {hardware} brd ff:ff:ff:ff:ff:ff link-netnsid 1 promiscuity 0 \\    veth addrgenmode none"
            )
        };
        let (one, other) = (
            line(5, 3, "aa:00:00:00:00:01"),
            line(9, 4, "aa:00:00:00:00:02"),
        );
        assert_eq!(of(Section::Links, &one), of(Section::Links, &other));
        assert!(of(Section::Links, &one).ends_with("state UP \\ veth addrgenmode none"));
        let down = one.replace(",UP,LOWER_UP", "");
        assert_ne!(of(Section::Links, &one), of(Section::Links, &down));
    }

    #[test]
    fn rules_keep_their_order_and_chains_have_none() {
        let dump = |chains: &[&str]| format!("-4 *mangle\n{}\n-4 COMMIT\n", chains.join("\n"));
        let (a, b) = ("-4 :ztunnel-A - [0:0]", "-4 :B ACCEPT [3:120]");
        let (first, second) = ("-4 -A ztunnel-A -j RETURN", "-4 -A ztunnel-A -j ACCEPT");
        let whole = of(Section::Chains, &dump(&[a, b, first, second]));
        assert_eq!(whole, of(Section::Chains, &dump(&[b, a, first, second])));
        assert_ne!(whole, of(Section::Chains, &dump(&[a, b, second, first])));
        assert!(whole.contains("-4 mangle -A ztunnel-A -j RETURN"));
    }

    #[test]
    fn members_have_no_order() {
        let list = |members: &str| {
            format!(
                "Name: pods\nType: hash:ip\nHeader: family inet initval 0x1\nReferences: 2\nMembers:\n{members}\n"
            )
        };
        let one = of(Section::Sets, &list("10.0.0.1\n10.0.0.2"));
        assert_eq!(one, of(Section::Sets, &list("10.0.0.2\n10.0.0.1")));
        assert!(one.contains("pods 10.0.0.1"));
    }
}
