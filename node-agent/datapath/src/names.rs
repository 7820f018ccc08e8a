//! Every name and number of the data path, with the network namespace it belongs to.
//!
//! By default they are those of the first Istio Ambient, so that its documents apply.

mod numbers;

use std::collections::BTreeSet;
use std::net::Ipv6Addr;
use std::ops::RangeInclusive;

use crate::family::Family;
use crate::set::{AddressSet, Role};
use crate::slot::Slot;

/// Room of each set in addresses: more than the pods of any node.
pub const SET_SIZE: u32 = 65536;

/// Route table of local delivery (proxy).
pub const TABLE_LOCAL: u32 = 100;

/// Rule priorities that are always the same.
pub mod priority {
    /// The kernel's own rule for the main table (host).
    pub const MAIN: u32 = 32766;
    /// TPROXY's mark is delivered locally (proxy).
    pub const TPROXY: u32 = 20000;
    /// Answers to transparent sockets are delivered locally (proxy).
    pub const PROXY_RETURN: u32 = 20003;
}

/// The setting that lets a namespace hand on what is not its own, by family (host: needed, proxy: off).
#[must_use]
pub fn forwarding(family: Family) -> &'static str {
    match family {
        Family::V4 => "ipv4/ip_forward",
        Family::V6 => "ipv6/conf/all/forwarding",
    }
}

/// Route protocol of every route and rule of ours (rtnetlink(7); unassigned by iproute2).
pub const PROTOCOL: u8 = 0x5a;

/// Metric that IPv6 gives a route without one.
pub const METRIC_IPV6: u32 = 1024;

/// Metric of the routes that say no when nothing else is left: the highest there is, so that every
/// other route of the table comes first.
pub const METRIC_LAST: u32 = u32::MAX;

/// Source ports of a proxy's own sockets: below the pods' ephemeral range (32768 and up), so that a
/// dial from a pod's address never meets the pod's own ports in the host's conntrack, nor those of
/// the node's other proxy.
#[must_use]
pub fn proxy_port_range(slot: Slot) -> &'static str {
    match slot {
        Slot::First => "16384\t29999",
        Slot::Second => "2048\t14999",
    }
}

/// Link-local addresses of a tunnel's ends, host and proxy. Fixed ones need no duplicate address
/// detection, which would hold traffic back while it runs.
pub const LINK_LOCAL: [Ipv6Addr; 2] = [
    Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1),
    Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2),
];

/// Longest name of a device in bytes (`IFNAMSIZ` less its end).
const LONGEST_DEVICE: usize = 15;
/// What the names of sets that guard have more than those that redirect.
const GUARD: &str = "-guard";
/// Longest name of a set in bytes (`IPSET_MAXNAMELEN` less its end).
const LONGEST_SET: usize = 31;
/// Longest name of a chain in bytes (`XT_EXTENSION_MAXNAMELEN` less its end).
const LONGEST_CHAIN: usize = 28;
/// The built-in chains that lead to ours.
const HOOKS: [&str; 5] = ["PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"];
/// Starts of the names of chains that belong to others.
const FOREIGN_PREFIXES: [&str; 8] = [
    "KUBE-", "cali-", "CILIUM_", "CNI-", "FLANNEL-", "WEAVE-", "DOCKER", "LIBVIRT",
];
/// Tables of the kernel's own: default, main, local (ip-route(8)).
const KERNELS_TABLES: RangeInclusive<u32> = 253..=255;
/// Number of our tables on the host.
const TABLES: u32 = 4;
/// Number of our rules on the host.
const PRIORITIES: u32 = 6;

/// The names and numbers of the host's namespace that a second installation would have as well.
/// What carries them is ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Names {
    set: String,
    inbound: String,
    outbound: String,
    chain_prefix: String,
    first_table: u32,
    first_priority: u32,
}

/// A name or number that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NamesError {
    /// A name that is empty, too long, or made of other signs.
    #[error("{what} {name:?}: use one to {longest} letters, digits, dashes, underscores and dots")]
    Name {
        /// What it is the name of.
        what: &'static str,
        /// The name.
        name: String,
        /// The greatest length.
        longest: usize,
    },
    /// Two devices would have one name.
    #[error(
        "two devices would be called {0:?}: give both tunnels names that differ in more than a 2 at their end"
    )]
    SameDevice(String),
    /// Chains of others start like this.
    #[error("chain prefix {0:?}: chains of that start belong to others")]
    ForeignPrefix(String),
    /// There is no room for our tables.
    #[error("first table {0}: it and the three after it must be greater than 0 and not 253 to 255")]
    Table(u32),
    /// There is no room for our rules.
    #[error("first priority {0}: it must be between 2 and {max}, before the main table's rule", max = priority::MAIN - PRIORITIES)]
    Priority(u32),
}

/// Those of the first Istio Ambient.
impl Default for Names {
    fn default() -> Self {
        Self {
            set: "ztunnel-pods-ips".to_owned(),
            inbound: "istioin".to_owned(),
            outbound: "istioout".to_owned(),
            chain_prefix: "ztunnel-".to_owned(),
            first_table: 100,
            first_priority: 100,
        }
    }
}

impl Names {
    /// The same with another start of the sets' names.
    ///
    /// # Errors
    /// If no set can be called so.
    pub fn with_set(self, set: String) -> Result<Self, NamesError> {
        // One more for the sets of IPv6.
        check("set", &set, LONGEST_SET - GUARD.len() - 1)?;
        Ok(Self { set, ..self })
    }

    /// The same with other devices.
    ///
    /// # Errors
    /// If no devices can be called so, or both are.
    pub fn with_devices(self, inbound: String, outbound: String) -> Result<Self, NamesError> {
        for device in [&inbound, &outbound] {
            // One more of the second slot, and one more in the proxy's namespace.
            check("device", device, LONGEST_DEVICE - 2)?;
        }
        let names = Self {
            inbound,
            outbound,
            ..self
        };
        let mut taken = BTreeSet::new();
        for device in Slot::BOTH.into_iter().flat_map(|slot| names.devices(slot)) {
            if !taken.insert(device.clone()) {
                return Err(NamesError::SameDevice(device));
            }
        }
        Ok(names)
    }

    /// The same with another start of the chains' names.
    ///
    /// # Errors
    /// If no chains can be called so.
    pub fn with_chain_prefix(self, chain_prefix: String) -> Result<Self, NamesError> {
        let longest_hook = HOOKS
            .iter()
            .map(|hook| hook.len())
            .max()
            .unwrap_or_default();
        check("chain prefix", &chain_prefix, LONGEST_CHAIN - longest_hook)?;
        if is_foreign(&chain_prefix) {
            return Err(NamesError::ForeignPrefix(chain_prefix));
        }
        Ok(Self {
            chain_prefix,
            ..self
        })
    }

    /// The same with other route tables: this one and the three after it.
    ///
    /// # Errors
    /// If one of them is the kernel's.
    pub fn with_first_table(self, first_table: u32) -> Result<Self, NamesError> {
        let last = first_table.checked_add(TABLES - 1);
        let free = last.is_some_and(|last| {
            first_table > 0
                && (last < *KERNELS_TABLES.start() || first_table > *KERNELS_TABLES.end())
        });
        if !free {
            return Err(NamesError::Table(first_table));
        }
        Ok(Self {
            first_table,
            ..self
        })
    }

    /// The same with other priorities of the rules: this one, the five after it, and the one before it.
    ///
    /// # Errors
    /// If they would come after the main table's rule.
    pub fn with_first_priority(self, first_priority: u32) -> Result<Self, NamesError> {
        if !(2..=priority::MAIN - PRIORITIES).contains(&first_priority) {
            return Err(NamesError::Priority(first_priority));
        }
        Ok(Self {
            first_priority,
            ..self
        })
    }

    /// Set of a family's addresses of this node's mesh pods.
    #[must_use]
    pub fn set(&self, role: Role, family: Family) -> AddressSet {
        let role_part = match role {
            Role::Redirect => "",
            Role::Guard => GUARD,
        };
        let family_part = match family {
            Family::V4 => "",
            Family::V6 => "6",
        };
        let name = format!("{}{role_part}{family_part}", self.set);
        AddressSet { name, role, family }
    }

    /// Sets of a family's addresses, one a role.
    #[must_use]
    pub fn sets(&self, family: Family) -> [AddressSet; 2] {
        Role::ALL.map(|role| self.set(role, family))
    }

    /// Device towards the proxy of a slot for traffic to mesh pods.
    #[must_use]
    pub fn inbound(&self, slot: Slot) -> String {
        of_slot(&self.inbound, slot)
    }

    /// Device towards the proxy of a slot for traffic from mesh pods.
    #[must_use]
    pub fn outbound(&self, slot: Slot) -> String {
        of_slot(&self.outbound, slot)
    }

    /// The devices towards the proxy of a slot.
    #[must_use]
    pub fn devices(&self, slot: Slot) -> [String; 2] {
        [self.inbound(slot), self.outbound(slot)]
    }

    /// The slot whose proxy a device of the host leads to, if it has one of our names.
    #[must_use]
    pub fn slot_of(&self, device: &str) -> Option<Slot> {
        let is_of = |slot: &Slot| self.devices(*slot).iter().any(|ours| ours == device);
        Slot::BOTH.into_iter().find(is_of)
    }

    /// Whether a device of the host or of a proxy has one of our names.
    #[must_use]
    pub fn is_device(&self, name: &str) -> bool {
        let mut ours = Slot::BOTH.into_iter().flat_map(|slot| self.devices(slot));
        ours.any(|ours| name == ours || name == peer(&ours))
    }

    /// Start of our chains' names, in both namespaces. The built-in chain's name follows.
    #[must_use]
    pub fn chain_prefix(&self) -> &str {
        &self.chain_prefix
    }

    /// The built-in chain that a chain of ours is reached from.
    #[must_use]
    pub fn hook<'a>(&self, chain: &'a str) -> Option<&'a str> {
        chain
            .strip_prefix(&self.chain_prefix)
            .filter(|hook| HOOKS.contains(hook))
    }

    /// Whether a chain is one that another installation of Ambit reaches from this built-in chain. It
    /// leaves alone what carries none of its marks, so its jump may stand before ours.
    #[must_use]
    pub fn is_neighbour(&self, chain: &str, hook: &str) -> bool {
        chain.strip_suffix(hook).is_some_and(|prefix| {
            !prefix.is_empty() && prefix != self.chain_prefix && !is_foreign(prefix)
        })
    }
}

/// Name of the other end of a device of the host, in the proxy's namespace.
#[must_use]
pub fn peer(device: &str) -> String {
    format!("p{device}")
}

fn of_slot(device: &str, slot: Slot) -> String {
    match slot {
        Slot::First => device.to_owned(),
        Slot::Second => format!("{device}2"),
    }
}

fn is_foreign(prefix: &str) -> bool {
    FOREIGN_PREFIXES
        .iter()
        .any(|start| prefix.starts_with(start) || start.starts_with(prefix))
}

fn check(what: &'static str, name: &str, longest: usize) -> Result<(), NamesError> {
    let is_sign = |sign: char| sign.is_ascii_alphanumeric() || "-_.".contains(sign);
    if name.is_empty() || name.len() > longest || !name.chars().all(is_sign) {
        return Err(NamesError::Name {
            what,
            name: name.to_owned(),
            longest,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_the_kernel_or_others_would_not_take_are_refused() {
        let names = Names::default;
        let text = str::to_owned;
        assert!(names().with_set(text("mesh-two")).is_ok());
        assert!(names().with_set("x".repeat(24)).is_ok());
        assert!(names().with_set("x".repeat(25)).is_err());
        assert!(names().with_set(text("a b")).is_err());
        assert!(names().with_devices(text("in0"), text("out0")).is_ok());
        assert_eq!(
            names().with_devices(text("in0"), text("in0")),
            Err(NamesError::SameDevice(text("in0")))
        );
        assert_eq!(
            names().with_devices(text("in"), text("in2")),
            Err(NamesError::SameDevice(text("in2")))
        );
        assert!(names().with_devices("d".repeat(14), text("out0")).is_err());
        assert!(names().with_chain_prefix(text("mesh2-")).is_ok());
        assert_eq!(
            names().with_chain_prefix(text("KUBE-")),
            Err(NamesError::ForeignPrefix(text("KUBE-")))
        );
        assert!(names().with_chain_prefix(text("")).is_err());
        assert!(names().with_first_table(1100).is_ok());
        for table in [0, 250, 255, u32::MAX] {
            assert_eq!(
                names().with_first_table(table),
                Err(NamesError::Table(table))
            );
        }
        assert!(names().with_first_priority(32760).is_ok());
        for priority in [0, 1, 32761] {
            assert_eq!(
                names().with_first_priority(priority),
                Err(NamesError::Priority(priority))
            );
        }
    }

    #[test]
    fn only_our_prefix_before_a_built_in_chain_is_ours() {
        let names = Names::default();
        assert_eq!(names.hook("ztunnel-INPUT"), Some("INPUT"));
        assert_eq!(names.hook("ztunnel-POSTROUTING-2"), None);
        assert_eq!(names.hook("KUBE-INPUT"), None);
        assert!(names.is_neighbour("second-INPUT", "INPUT"));
        for other in ["ztunnel-INPUT", "cali-INPUT", "second-OUTPUT", "INPUT"] {
            assert!(!names.is_neighbour(other, "INPUT"), "{other}");
        }
        assert!(names.is_device("pistioin") && !names.is_device("istioin0"));
        assert_eq!(names.slot_of("istioout2"), Some(Slot::Second));
        assert_eq!(names.slot_of("pistioout2"), None);
        assert!(names.is_table(103) && !names.is_table(104));
        assert!(names.is_priority(105) && !names.is_priority(106));
        assert!(names.is_priority(99) && !names.is_priority(98));
    }
}
