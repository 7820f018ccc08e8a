//! What every scenario is tried in: the cluster's families, both nodes as the one it starts from (their rules are in
//! different backends of iptables), and every reverse-path filter that a node may have.

use std::fmt;
use std::net::IpAddr;

use anyhow::{Result, bail, ensure};

use crate::cluster::{Cluster, setting};
use crate::guard::Undo;
use crate::stage::{NODE_1, NODE_2};

/// A family of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// Both of them.
const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

/// Those that the cluster's pods and Services have; the first is that of a Service without a wish.
///
/// # Errors
/// If there is no cluster.
pub fn families() -> Result<&'static [Family]> {
    match setting("AMBIT_CLUSTER_FAMILIES")?.as_str() {
        "both" => Ok(&FAMILIES),
        "ipv6" => Ok(&FAMILIES[1..]),
        other => bail!("AMBIT_CLUSTER_FAMILIES is both or ipv6, not {other}"),
    }
}

/// Values of `rp_filter`: none, strict and loose.
pub const RP_FILTERS: [u8; 3] = [0, 1, 2];

/// One combination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Case {
    /// The reverse-path filter of both nodes. It is IPv4's alone, but what Ambit sets because of it is in both.
    pub rp_filter: u8,
    /// The family that is spoken.
    pub family: Family,
    /// The node it starts from.
    pub home: &'static str,
}

impl Case {
    /// The other node.
    #[must_use]
    pub fn away(&self) -> &'static str {
        if self.home == NODE_1 { NODE_2 } else { NODE_1 }
    }
}

impl Family {
    /// Whether this address is of it.
    #[must_use]
    pub fn has(self, ip: IpAddr) -> bool {
        ip.is_ipv4() == (self == Self::V4)
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            rp_filter,
            family,
            home,
        } = self;
        write!(f, "{family}, rp_filter {rp_filter}, from {home}")
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// The combinations to try, those of one reverse-path filter together: all of them or, with `AMBIT_MATRIX=pairs` where
/// time is short, as many as it takes for any two values of different kinds to meet.
///
/// # Errors
/// If `AMBIT_MATRIX` is something else, or there is no cluster.
pub fn cases() -> Result<Vec<Case>> {
    let families = families()?;
    match std::env::var("AMBIT_MATRIX").as_deref() {
        Err(_) | Ok("" | "full") => Ok(all(families).collect()),
        Ok("pairs") => Ok(pairs(families)),
        Ok(other) => bail!("AMBIT_MATRIX is full or pairs, not {other}"),
    }
}

fn all(families: &[Family]) -> impl Iterator<Item = Case> {
    RP_FILTERS.into_iter().flat_map(move |rp_filter| {
        families.iter().flat_map(move |&family| {
            [NODE_1, NODE_2].map(|home| Case {
                rp_filter,
                family,
                home,
            })
        })
    })
}

/// Where there is one family only, it takes all of them.
fn pairs(families: &[Family]) -> Vec<Case> {
    all(families)
        .filter(|case| families.len() == 1 || is_of_pairs(case))
        .collect()
}

/// Every second one of each kind.
fn is_of_pairs(case: &Case) -> bool {
    let family = u8::from(case.family == Family::V6);
    let home = u8::from(case.home == NODE_2);
    (case.rp_filter + family + home).is_multiple_of(2)
}

/// Runs `work` under each reverse-path filter of both nodes, on `all` and `default`, and shows that only it wrote them.
///
/// # Errors
/// All errors of `work`, or if somebody else changed the filter.
pub fn under_every_filter(cluster: &Cluster, mut work: impl FnMut(u8) -> Result<()>) -> Result<()> {
    let nodes = cluster.nodes()?;
    let mut before = Vec::new();
    for node in &nodes {
        before.push((node.clone(), filters(cluster, node)?));
    }
    let also = cluster.clone();
    let undo = Undo::new(move || {
        before
            .iter()
            .try_for_each(|(node, found)| set_filters(&also, node, found))
    });
    for filter in RP_FILTERS {
        let wanted = [filter.to_string(), filter.to_string()];
        for node in &nodes {
            set_filters(cluster, node, &wanted)?;
        }
        work(filter)?;
        for node in &nodes {
            let found = filters(cluster, node)?;
            ensure!(
                found == wanted,
                "somebody changed rp_filter of all or default on {node} from {filter}: {found:?}"
            );
        }
    }
    undo.now()
}

/// The two values that are an administrator's, and never Ambit's.
const FILTERS: [&str; 2] = [
    "net.ipv4.conf.all.rp_filter",
    "net.ipv4.conf.default.rp_filter",
];

fn filters(cluster: &Cluster, node: &str) -> Result<[String; 2]> {
    let [all, default] = FILTERS;
    let printed = cluster.on_node(node, &["sysctl", "-n", all, default])?;
    match printed.split_whitespace().collect::<Vec<_>>()[..] {
        [all, default] => Ok([all.to_owned(), default.to_owned()]),
        _ => bail!("sysctl on {node} printed {printed:?}"),
    }
}

fn set_filters(cluster: &Cluster, node: &str, values: &[String; 2]) -> Result<()> {
    let mut command = vec!["sysctl".to_owned(), "-qw".to_owned()];
    command.extend(
        FILTERS
            .iter()
            .zip(values)
            .map(|(name, value)| format!("{name}={value}")),
    );
    let words: Vec<&str> = command.iter().map(String::as_str).collect();
    cluster.on_node(node, &words).map(drop)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// The pairs of values of different kinds that these cases hold.
    fn met(cases: &[Case]) -> BTreeSet<String> {
        let pair = |case: &Case| {
            let Case {
                rp_filter: filter,
                family,
                home,
            } = case;
            [
                format!("{family} {home}"),
                format!("{family} {filter}"),
                format!("{home} {filter}"),
            ]
        };
        cases.iter().flat_map(pair).collect()
    }

    #[test]
    fn half_of_the_cases_hold_every_pair() {
        let whole: Vec<Case> = all(&FAMILIES).collect();
        let half = pairs(&FAMILIES);
        assert_eq!((whole.len(), half.len()), (12, 6));
        assert_eq!(met(&half), met(&whole));
        assert_eq!(met(&whole).len(), 16);
    }

    #[test]
    fn of_one_family_every_case_is_needed() {
        let whole: Vec<Case> = all(&[Family::V6]).collect();
        assert_eq!(pairs(&[Family::V6]), whole);
        assert_eq!((whole.len(), met(&whole).len()), (6, 11));
    }
}
