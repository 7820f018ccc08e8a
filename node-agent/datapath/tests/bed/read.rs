//! What other tools print of a namespace, less what differs from run to run: indices, hardware
//! addresses, counters, and what a device says of its driver.

use std::fmt::Write as _;

use datapath::IptablesBackend;

use super::Bed;

/// Route tables that a data path writes.
const TABLES: [u32; 4] = [100, 101, 102, 103];

impl Bed {
    /// What these namespaces hold, as a list that a person can read.
    pub(crate) fn state(&self, names: &[&str]) -> String {
        let mut text = String::new();
        for name in names {
            for (command, lines) in self.readings(name) {
                // Writing to a String cannot fail.
                let _ = writeln!(text, "{name} # {command}");
                for line in lines.iter().filter(|line| !line.is_empty()) {
                    let _ = writeln!(text, "  {line}");
                }
            }
        }
        text
    }

    /// Commands and what they print, normalised.
    fn readings(&self, name: &str) -> Vec<(String, Vec<String>)> {
        let read = |command: &str| -> Vec<String> {
            let printed = self.run(name, command);
            printed.lines().map(|line| line.trim_end().into()).collect()
        };
        let mut readings = vec![
            ("ip -d link".to_owned(), links(&read("ip -d -o link"))),
            ("ip -o addr".to_owned(), addresses(&read("ip -o addr"))),
        ];
        for family in ["", "-6 "] {
            let rule = format!("ip {family}rule");
            readings.push((rule.clone(), read(&rule)));
            for table in TABLES {
                let show = format!("ip {family}route show table {table}");
                // An empty table is one that the kernel does not know.
                let routes = read(&format!("{show} 2>/dev/null || true"));
                readings.push((show, sorted(routes)));
            }
        }
        readings.push(("ipset list".to_owned(), sets(&read("ipset list"))));
        for family in ["iptables", "ip6tables"] {
            let save = match self.backend {
                IptablesBackend::Nft => format!("{family}-nft-save"),
                IptablesBackend::Legacy => format!("{family}-legacy-save"),
            };
            readings.push((format!("{family}-save"), chains(&read(&save))));
        }
        let mut settings =
            "cd /proc/sys/net; grep . ipv4/conf/*/rp_filter ipv4/ip_forward ipv4/ip_local_port_range"
                .to_owned();
        if self.is_dual {
            settings += " ipv6/conf/all/forwarding ipv6/conf/*istio*/addr_gen_mode ipv6/conf/*istio*/disable_ipv6";
        }
        readings.push(("sysctl net".to_owned(), read(&settings)));
        readings.retain(|(_, lines)| lines.iter().any(|line| !line.is_empty()));
        readings
    }
}

fn links(lines: &[String]) -> Vec<String> {
    let link = |line: &String| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let value = |name: &str| {
            let place = words.iter().position(|word| *word == name)?;
            words.get(place + 1).copied()
        };
        let device = words.get(1)?.split(['@', ':']).next()?;
        let up = words.get(2)?.contains("UP");
        let mut shown = format!("{device} mtu {}", value("mtu")?);
        shown += if up { " up" } else { " down" };
        // From the device's kind to what every device has.
        let kind = ["veth", "geneve", "dummy"];
        if let Some(start) = words.iter().position(|word| kind.contains(word)) {
            let own = words[start..]
                .iter()
                .take_while(|word| **word != "addrgenmode");
            for word in own {
                shown = shown + " " + word;
            }
        }
        Some(shown)
    };
    lines.iter().filter_map(link).collect()
}

fn addresses(lines: &[String]) -> Vec<String> {
    let address = |line: &String| {
        let mut words = line.split_whitespace().skip(1);
        let (device, family, address) = (words.next()?, words.next()?, words.next()?);
        // Of a hardware address.
        if address.starts_with("fe80:") && address.contains("ff:fe") {
            return None;
        }
        Some(format!("{device} {family} {address}"))
    };
    sorted(lines.iter().filter_map(address).collect())
}

fn sets(lines: &[String]) -> Vec<String> {
    let others = [
        "Revision:",
        "Size in memory:",
        "References:",
        "Number of entries:",
    ];
    let mut shown: Vec<String> = lines
        .iter()
        .filter(|line| !others.iter().any(|other| line.starts_with(other)))
        // The seed of its hash is a number by chance.
        .map(|line| line.split(" initval").next().unwrap_or_default().to_owned())
        .collect();
    // Members have no order; they come after what else is told of their set.
    let is_member = |line: &String| !line.starts_with(|first: char| first.is_ascii_uppercase());
    for set in shown.chunk_by_mut(|one, next| is_member(one) == is_member(next)) {
        if set.first().is_some_and(is_member) {
            set.sort();
        }
    }
    shown
}

/// Tables by name, each with its chains and rules, without counters.
fn chains(lines: &[String]) -> Vec<String> {
    let mut tables: Vec<Vec<String>> = Vec::new();
    for line in lines {
        if line.starts_with('*') {
            tables.push(Vec::new());
        }
        if let Some(table) = tables.last_mut().filter(|_| !line.starts_with(['#', 'C'])) {
            table.push(line.split(" [").next().unwrap_or_default().to_owned());
        }
    }
    tables.sort_by_key(|table| table.first().cloned());
    tables.concat()
}

fn sorted(mut lines: Vec<String>) -> Vec<String> {
    lines.sort();
    lines
}
