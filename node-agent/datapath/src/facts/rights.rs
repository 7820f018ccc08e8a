//! The capabilities that this process needs.

use std::{fs, io};

/// Names and numbers (linux/capability.h) of what the data path takes.
const NEEDED: [(&str, u32); 3] = [
    // Links, routes, rules, sets, chains.
    ("NET_ADMIN", 12),
    // The sockets of iptables-legacy.
    ("NET_RAW", 13),
    // Entering the proxy's network namespace.
    ("SYS_ADMIN", 21),
];

/// Those that it lacks.
pub(super) fn missing() -> io::Result<Vec<&'static str>> {
    let status = fs::read_to_string("/proc/thread-self/status")?;
    missing_in(&status).ok_or_else(|| io::Error::other("there is no CapEff in the status"))
}

fn missing_in(status: &str) -> Option<Vec<&'static str>> {
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))?;
    let effective = u64::from_str_radix(effective.trim(), 16).ok()?;
    let missing = NEEDED
        .iter()
        .filter(|(_, number)| effective >> number & 1 == 0)
        .map(|(name, _)| *name);
    Some(missing.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_missing_capabilities_are_named() {
        let status = |effective: &str| {
            format!("Name:\tagent\nCapPrm:\t0000000000000000\nCapEff:\t{effective}\n")
        };
        assert_eq!(
            missing_in(&status("0000000000203000")),
            Some(Vec::new()),
            "what config/node-agent gives is enough"
        );
        assert_eq!(
            missing_in(&status("0000000000002000")),
            Some(vec!["NET_ADMIN", "SYS_ADMIN"])
        );
        assert_eq!(missing_in("Name:\tagent\n"), None);
    }
}
