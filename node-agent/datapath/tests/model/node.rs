//! What a [`Datapath`] holds, indexed for packets, and the node that it is a part of: a host at
//! 10.244.1.1 with a proxy's pod behind `vproxy`, that of its successor behind `vnext`, any pod behind
//! `v` and the last byte of its address, and everything else behind `eth0`. The same in IPv6.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use datapath::datapath::{Link, Route, Table, Target};
use datapath::names::Names;
use datapath::{Datapath, Family, Item, PerSlot, Place, Slot};
use ipnet::IpNet;

use super::chains;
use crate::bed::{HOST, HOST6, NEXT_PROXY, PROXY, ipv6_of};

/// The device to other nodes.
pub(crate) const UPLINK: &str = "eth0";
/// The proxy's device in its own namespace.
pub(crate) const PROXY_DEVICE: &str = "eth0";

/// A node.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) host: Side,
    pub(crate) proxies: PerSlot<Side>,
    /// What `rp_filter` of the host's devices is until somebody sets it.
    pub(crate) default_rp_filter: u8,
    /// Whether sources are checked at all. What must not happen must not happen without that either.
    pub(crate) checks_sources: bool,
}

/// A namespace of it.
#[derive(Debug)]
pub(crate) struct Side {
    pub(crate) rules: Vec<datapath::datapath::Rule>,
    pub(crate) routes: BTreeMap<u32, Vec<Route>>,
    pub(crate) links: BTreeMap<String, Link>,
    chains: BTreeMap<(Family, Table, String), Vec<chains::Rule>>,
    members: BTreeSet<(String, IpAddr)>,
    up: BTreeSet<String>,
    addresses: BTreeSet<(String, IpNet)>,
    settings: BTreeMap<String, String>,
}

impl Node {
    pub(crate) fn of(held: &Datapath, default_rp_filter: u8) -> Self {
        Self {
            host: Side::of(held.side(Place::Host)),
            proxies: PerSlot {
                first: Side::of(held.side(Place::Proxy(Slot::First))),
                second: Side::of(held.side(Place::Proxy(Slot::Second))),
            },
            default_rp_filter,
            checks_sources: true,
        }
    }

    /// The same without a check of sources.
    pub(crate) fn of_any_source(held: &Datapath) -> Self {
        Self {
            checks_sources: false,
            ..Self::of(held, 0)
        }
    }

    pub(crate) fn side(&self, place: Place) -> &Side {
        match place {
            Place::Host => &self.host,
            Place::Proxy(slot) => &self.proxies[slot],
        }
    }
}

impl Side {
    fn of(items: &BTreeSet<Item>) -> Self {
        let mut side = Self {
            rules: Vec::new(),
            routes: BTreeMap::new(),
            links: BTreeMap::new(),
            chains: BTreeMap::new(),
            members: BTreeSet::new(),
            up: BTreeSet::new(),
            addresses: BTreeSet::new(),
            settings: BTreeMap::new(),
        };
        for item in items {
            side.take(item.clone());
        }
        side.rules.sort_by_key(|rule| rule.priority);
        side
    }

    fn take(&mut self, item: Item) {
        match item {
            Item::Link(link) => {
                self.links.insert(link.name().to_owned(), link);
            }
            Item::Up(device) => {
                self.up.insert(device);
            }
            Item::Address(address) => {
                self.addresses.insert((address.device, address.address));
            }
            Item::Sysctl(sysctl) => {
                self.settings.insert(sysctl.path, sysctl.value);
            }
            Item::Route(route) => self.routes.entry(route.table).or_default().push(route),
            Item::Rule(rule) => self.rules.push(rule),
            Item::Set(_) => {}
            Item::Member(member) => {
                self.members.insert((member.set.name, member.ip));
            }
            Item::Chains(all) => {
                for (hook, chain) in all.chains {
                    // A chain that nothing leads to is not run.
                    if !chain.jumps.is_empty() {
                        let rules = chain.rules.iter().map(|rule| chains::parse(rule)).collect();
                        self.chains.insert((all.family, all.table, hook), rules);
                    }
                }
            }
        }
    }

    pub(crate) fn chain(&self, family: Family, table: Table, hook: &str) -> &[chains::Rule] {
        let chain = self.chains.get(&(family, table, hook.to_owned()));
        chain.map_or(&[], Vec::as_slice)
    }

    pub(crate) fn has_member(&self, set: &str, ip: IpAddr) -> bool {
        self.members.contains(&(set.to_owned(), ip))
    }

    /// Of our devices, those that are up; those of others are all.
    pub(crate) fn is_up(&self, device: &str) -> bool {
        !is_tunnel(device) || self.up.contains(device)
    }

    pub(crate) fn has_address(&self, device: Option<&str>, ip: IpAddr) -> bool {
        self.addresses.iter().any(|(on, address)| {
            device.is_none_or(|device| device == on) && address.addr() == ip && self.is_up(on)
        })
    }

    /// Whether a route counts: the kernel takes those of a device away when it goes down.
    pub(crate) fn counts(&self, route: &Route) -> bool {
        match &route.target {
            Target::Unreachable => true,
            Target::Local { device } | Target::Link { device } | Target::Via { device, .. } => {
                self.is_up(device)
            }
        }
    }

    /// Whether anything leads to the proxy in a slot.
    pub(crate) fn leads_to(&self, slot: Slot) -> bool {
        let tunnels = Names::default().devices(slot);
        let mut routes = self.routes.values().flatten();
        routes.any(|route| match &route.target {
            Target::Link { device } | Target::Via { device, .. } => {
                device == device_of(slot) || tunnels.contains(device)
            }
            Target::Unreachable | Target::Local { .. } => false,
        })
    }

    pub(crate) fn setting(&self, path: &str) -> Option<&str> {
        self.settings.get(path).map(String::as_str)
    }
}

/// Whether a device has one of our names.
pub(crate) fn is_tunnel(device: &str) -> bool {
    device.contains("istio")
}

/// The pod with this last byte, of a family.
pub(crate) fn pod(last: u8, family: Family) -> IpAddr {
    let ipv4 = std::net::Ipv4Addr::new(10, 244, 1, last);
    match family {
        Family::V4 => ipv4.into(),
        Family::V6 => ipv6_of(ipv4).into(),
    }
}

/// The host's address towards its pods.
pub(crate) fn host(family: Family) -> IpAddr {
    match family {
        Family::V4 => HOST.parse().unwrap(),
        Family::V6 => HOST6.parse().unwrap(),
    }
}

/// The proxy in a slot.
pub(crate) fn proxy(slot: Slot, family: Family) -> IpAddr {
    pod(last_of(slot), family)
}

/// The pod of this node that has an address, proxies not among them.
pub(crate) fn pod_of(ip: IpAddr) -> Option<u8> {
    let last = last_byte(ip);
    let is_pod = last != 1 && Slot::BOTH.iter().all(|slot| last_of(*slot) != last);
    (is_pod && pod(last, Family::of(ip)) == ip).then_some(last)
}

/// What is behind a device of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Behind {
    Pod(u8),
    Proxy(Slot),
    Outside,
}

pub(crate) fn behind(device: &str) -> Behind {
    match device {
        UPLINK => Behind::Outside,
        "vproxy" => Behind::Proxy(Slot::First),
        "vnext" => Behind::Proxy(Slot::Second),
        pod => Behind::Pod(pod.strip_prefix('v').unwrap().parse().unwrap()),
    }
}

pub(crate) fn device_of(slot: Slot) -> &'static str {
    match slot {
        Slot::First => "vproxy",
        Slot::Second => "vnext",
    }
}

/// The device that the main table of the host leads to an address by.
pub(crate) fn main_device(ip: IpAddr) -> String {
    let of_proxy = Slot::BOTH
        .into_iter()
        .find(|slot| proxy(*slot, Family::of(ip)) == ip);
    match (of_proxy, pod_of(ip)) {
        (Some(slot), _) => device_of(slot).to_owned(),
        (None, Some(last)) => format!("v{last}"),
        (None, None) => UPLINK.to_owned(),
    }
}

fn last_of(slot: Slot) -> u8 {
    match slot {
        Slot::First => PROXY.octets()[3],
        Slot::Second => NEXT_PROXY.octets()[3],
    }
}

fn last_byte(ip: IpAddr) -> u8 {
    match ip {
        IpAddr::V4(ip) => ip.octets()[3],
        IpAddr::V6(ip) => ip.octets()[15],
    }
}
