//! What a kernel holds of ours: one set of items per network namespace.

mod display;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use crate::family::Family;
use crate::input::Mark;
use crate::set::AddressSet;
use crate::slot::{PerSlot, Slot};

/// What the namespaces of a node hold, or should hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Datapath {
    /// The host's network namespace.
    pub host: BTreeSet<Item>,
    /// The proxies' network namespaces.
    pub proxies: PerSlot<BTreeSet<Item>>,
}

/// A network namespace of the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// The host's.
    Host,
    /// That of the proxy in a slot.
    Proxy(Slot),
}

impl Place {
    /// All of them.
    pub const ALL: [Self; 3] = [
        Self::Host,
        Self::Proxy(Slot::First),
        Self::Proxy(Slot::Second),
    ];
}

/// One thing that the kernel holds.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Item {
    /// A network device.
    Link(Link),
    /// A device is up.
    Up(String),
    /// An address of a device.
    Address(Address),
    /// A setting under `/proc/sys/net`.
    Sysctl(Sysctl),
    /// A route.
    Route(Route),
    /// A policy routing rule.
    Rule(Rule),
    /// A set of addresses, of type `hash:ip`.
    Set(AddressSet),
    /// Our chains of one iptables table.
    Chains(Chains),
    /// A member of a set.
    Member(Member),
}

/// A network device.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Link {
    /// A geneve device.
    Geneve {
        /// Its name.
        name: String,
        /// Virtual network identifier.
        vni: u32,
        /// The other end.
        remote: IpAddr,
        /// UDP destination port.
        port: u16,
        /// MTU in bytes.
        mtu: u32,
    },
    /// The host's end of a veth pair; making it makes the other end in the proxy's namespace.
    Veth {
        /// Its name.
        name: String,
        /// Name of the other end; none if that is not in the attached proxy's namespace.
        peer: Option<String>,
        /// MTU of both ends in bytes.
        mtu: u32,
    },
    /// A device under our name that is not what we make.
    Foreign {
        /// Its name.
        name: String,
    },
}

/// An address of a device.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Address {
    /// The device.
    pub device: String,
    /// The address with the length of its prefix.
    pub address: IpNet,
}

/// A setting under `/proc/sys/net`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Sysctl {
    /// Path below `/proc/sys/net`, with slashes.
    pub path: String,
    /// Its value.
    pub value: String,
    /// What it is set to when it is no longer ours.
    pub restore: String,
}

/// A route of ours.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Route {
    /// Its table.
    pub table: u32,
    /// Where to.
    pub destination: IpNet,
    /// Smaller comes first.
    pub metric: u32,
    /// How.
    pub target: Target,
}

/// What a route does.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Target {
    /// The answer is that there is no way.
    Unreachable,
    /// Deliver to this host's own sockets.
    Local {
        /// The device.
        device: String,
    },
    /// Directly reached on the link.
    Link {
        /// The device.
        device: String,
    },
    /// By a gateway.
    Via {
        /// The gateway.
        gateway: IpAddr,
        /// The device.
        device: String,
        /// The gateway need not be in a network of the device.
        onlink: bool,
    },
}

/// A policy routing rule of ours.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rule {
    /// The packets it sees.
    pub family: Family,
    /// Its priority.
    pub priority: u32,
    /// What it applies to.
    pub selector: Selector,
    /// What it does.
    pub action: Action,
}

/// What a rule applies to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Selector {
    /// Everything.
    All,
    /// Packets with this mark.
    Mark(Mark),
    /// What this host itself sends (`iif lo`, ip-rule(8)).
    SentHere,
    /// TCP.
    Tcp,
    /// TCP from this address that comes in by this device.
    TcpFrom {
        /// The device.
        device: String,
        /// The address.
        ip: IpAddr,
    },
}

/// What a rule does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Action {
    /// Look the route up in this table.
    Lookup(u32),
    /// Go on at the rule of this priority.
    Goto(u32),
    /// Nothing.
    Nop,
    /// Drop without a word.
    Blackhole,
}

/// A member of a set.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Member {
    /// The set.
    pub set: AddressSet,
    /// The address.
    pub ip: IpAddr,
}

/// Our chains of one table of iptables or ip6tables; always replaced as a whole.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Chains {
    /// The packets they see.
    pub family: Family,
    /// The table.
    pub table: Table,
    /// Start of their names.
    pub prefix: String,
    /// By the built-in chain that they are reached from.
    pub chains: BTreeMap<String, Chain>,
}

/// A table of iptables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Table {
    /// Marks and TPROXY.
    Mangle,
    /// Address translation.
    Nat,
}

/// A chain of ours and the way into it.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Chain {
    /// Places of the jumps to it in the built-in chain, not counting those of other installations; as
    /// desired: the first place, once.
    pub jumps: Vec<usize>,
    /// Its rules, as `iptables-save` prints them, without the chain's name.
    pub rules: Vec<String>,
}

impl Datapath {
    /// The items of one namespace.
    #[must_use]
    pub fn side(&self, place: Place) -> &BTreeSet<Item> {
        match place {
            Place::Host => &self.host,
            Place::Proxy(slot) => &self.proxies[slot],
        }
    }

    /// The items of one namespace.
    pub fn side_mut(&mut self, place: Place) -> &mut BTreeSet<Item> {
        match place {
            Place::Host => &mut self.host,
            Place::Proxy(slot) => &mut self.proxies[slot],
        }
    }
}

impl Item {
    /// Device that this item goes away with, if it has one.
    #[must_use]
    pub fn device(&self) -> Option<&str> {
        match self {
            Self::Up(device) | Self::Address(Address { device, .. }) => Some(device),
            Self::Route(route) => match &route.target {
                Target::Unreachable => None,
                Target::Local { device } | Target::Link { device } | Target::Via { device, .. } => {
                    Some(device)
                }
            },
            Self::Sysctl(sysctl) => sysctl.device(),
            Self::Link(_) | Self::Rule(_) | Self::Set(_) | Self::Chains(_) | Self::Member(_) => {
                None
            }
        }
    }

    /// Whether it holds back what a pod sends that waits to be carried.
    #[must_use]
    pub fn is_hold(&self) -> bool {
        matches!(
            self,
            Self::Rule(Rule {
                action: Action::Blackhole,
                ..
            })
        )
    }

    /// Whether making `self` takes the place of `other` in one step. Rules never do: the new one must
    /// be there while chains still set what the old one matches.
    #[must_use]
    pub fn replaces(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Link(new), Self::Link(old)) => new.name() == old.name(),
            (Self::Sysctl(new), Self::Sysctl(old)) => new.path == old.path,
            (Self::Route(new), Self::Route(old)) => {
                (new.table, new.destination, new.metric) == (old.table, old.destination, old.metric)
            }
            (Self::Chains(new), Self::Chains(old)) => {
                (new.family, new.table) == (old.family, old.table)
            }
            _ => false,
        }
    }
}

impl Sysctl {
    /// The device whose setting it is: `conf/NAME/…` is there as long as the device is.
    fn device(&self) -> Option<&str> {
        let (_family, path) = self.path.split_once("/conf/")?;
        path.split('/').next()
    }
}

impl Route {
    /// Its family.
    #[must_use]
    pub fn family(&self) -> Family {
        Family::of(self.destination.addr())
    }

    /// Whether it hands traffic to the proxy: of the host's routes, only those into the tunnels have a
    /// gateway in a network of their device.
    #[must_use]
    pub fn leads_into_a_tunnel(&self) -> bool {
        matches!(self.target, Target::Via { onlink: false, .. })
    }

    /// The mesh pod whose inbound traffic it hands to the proxy, or refuses.
    #[must_use]
    pub fn pod(&self) -> Option<IpAddr> {
        let is_of_one = self.destination.prefix_len() == self.destination.max_prefix_len();
        let decides = self.leads_into_a_tunnel() || self.target == Target::Unreachable;
        (is_of_one && decides).then(|| self.destination.addr())
    }
}

impl Link {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Geneve { name, .. } | Self::Veth { name, .. } | Self::Foreign { name } => name,
        }
    }
}

impl Table {
    /// Its name on iptables' command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Mangle => "mangle",
            Self::Nat => "nat",
        }
    }
}
