//! The steps from what the kernel holds to what it should hold. Pure: a set difference, in an order
//! in which no mesh pod's traffic ever leaves in the clear.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;

use crate::datapath::{Datapath, Item, Link, Place, Route, Rule, Table, Target};
use crate::family::Family;
use crate::names::{forwarding, peer};
use crate::set::Role;
use crate::slot::Slot;

/// Steps, in order. Empty when nothing is to be done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// The steps.
    pub steps: Vec<Step>,
}

/// One change of one item.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Where.
    pub place: Place,
    /// What.
    pub change: Change,
}

/// A change of one item.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Make it.
    Add(Item),
    /// Put `new` in the place of `old`, atomically where the kernel can.
    Replace {
        /// What is there.
        old: Item,
        /// What is to be there.
        new: Item,
    },
    /// Take it away.
    Remove(Item),
}

impl Change {
    /// What goes and what comes.
    #[must_use]
    pub fn ends(&self) -> (Option<&Item>, Option<&Item>) {
        match self {
            Self::Add(new) => (None, Some(new)),
            Self::Replace { old, new } => (Some(old), Some(new)),
            Self::Remove(old) => (Some(old), None),
        }
    }

    /// What comes, or else what goes.
    #[must_use]
    pub fn item(&self) -> &Item {
        match self {
            Self::Add(item) | Self::Replace { new: item, .. } | Self::Remove(item) => item,
        }
    }
}

impl Plan {
    /// Nothing to do.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }
}

/// The plan from `observed` to `desired`.
///
/// No prefix of it lets a mesh pod's traffic out in the clear, or sends what the proxy dials back to
/// the proxy:
/// 1. Pods that leave the mesh lose their set memberships, first that by which they are guarded: what they
///    open is not dropped in between.
/// 2. Unreachable routes are made, but for pods that only join: those stay reachable all the time. The
///    routes to a proxy that is gone go, so that those count; also those to a proxy whose dials the host
///    cannot tell apart for now.
/// 3. Devices of the proxy's side that stand in the way of others go, and its namespace stops to forward.
/// 4. Devices, rules and chains of the host are made, then the proxy's side; only then the routes to the
///    proxy (its own dials must be told apart by then, and the way back to it must lead to it), then what
///    refuses a pod that joins where no such route is left, and last the members of the sets: of those that
///    redirect before those that guard.
/// 5. What is left over goes in the opposite order, and last of all what holds pods back: they are
///    carried by then.
#[must_use]
pub fn plan(desired: &Datapath, observed: &Datapath) -> Plan {
    let mut steps = Vec::new();
    let left = withdraw(desired, observed, &mut steps);
    let mut observed = without_lost(desired, &left);
    // The proxy's end of a veth pair is made with the host's, and needs its name to be free.
    for slot in Slot::BOTH {
        let wanted = &desired.proxies[slot];
        let in_the_way = |item: &Item| is_link(item) && !is_replaced(item, wanted);
        let place = Place::Proxy(slot);
        remove_early(place, in_the_way, &mut observed, &mut steps);
    }
    for slot in Slot::BOTH {
        let place = Place::Proxy(slot);
        add_early(place, is_forwarding, desired, &mut observed, &mut steps);
    }
    // One end of a veth pair makes the other, so the host's side is begun before the proxies'.
    let begins = |item: &Item| rank(item) <= LAST_OF_BEGINNING;
    additions(Place::Host, desired, &observed, begins, &mut steps);
    for slot in Slot::BOTH {
        let place = Place::Proxy(slot);
        additions(place, desired, &observed, |_| true, &mut steps);
    }
    let ends = |item: &Item| !begins(item);
    additions(Place::Host, desired, &observed, ends, &mut steps);
    for place in Place::ALL {
        removals(place, desired, &observed, &mut steps);
    }
    Plan { steps }
}

/// Takes pods out of the mesh, and traffic away from proxies that cannot have it; what is left then.
fn withdraw(desired: &Datapath, observed: &Datapath, steps: &mut Vec<Step>) -> Datapath {
    let mut left = observed.clone();
    for role in [Role::Guard, Role::Redirect] {
        let leaves = |item: &Item| is_in(item, role) && !desired.host.contains(item);
        remove_early(Place::Host, leaves, &mut left, steps);
    }
    let joins = |route: &Route| route.pod().is_some_and(|ip| !is_member(observed, ip));
    let refuses_already =
        |item: &Item| matches!(item, Item::Route(route) if refuses(route) && !joins(route));
    add_early(Place::Host, refuses_already, desired, &mut left, steps);
    let serves = desired.host.iter().any(is_outbound);
    let tunnels = links(&desired.host);
    let torn =
        Family::ALL.map(|family| is_torn(family, &desired.host, &observed.host).then_some(family));
    let is_stale = |item: &Item| match item {
        Item::Route(route) if route.leads_into_a_tunnel() => {
            !serves
                || item.device().is_none_or(|device| !tunnels.contains(device))
                || torn.contains(&Some(route.family()))
        }
        Item::Route(route) if leads_back(route) => !is_replaced(item, &desired.host),
        _ => false,
    };
    remove_early(Place::Host, is_stale, &mut left, steps);
    left
}

fn remove_early(
    place: Place,
    which: impl Fn(&Item) -> bool,
    left: &mut Datapath,
    steps: &mut Vec<Step>,
) {
    let gone: Vec<Item> = left
        .side(place)
        .iter()
        .filter(|item| which(item))
        .cloned()
        .collect();
    for item in gone {
        left.side_mut(place).remove(&item);
        steps.push(Step {
            place,
            change: Change::Remove(item),
        });
    }
}

fn add_early(
    place: Place,
    which: impl Fn(&Item) -> bool,
    desired: &Datapath,
    left: &mut Datapath,
    steps: &mut Vec<Step>,
) {
    let known = steps.len();
    additions(place, desired, left, which, steps);
    for step in &steps[known..] {
        let (old, new) = step.change.ends();
        if let Some(old) = old {
            left.side_mut(place).remove(old);
        }
        left.side_mut(place).extend(new.cloned());
    }
}

fn is_in(item: &Item, role: Role) -> bool {
    matches!(item, Item::Member(member) if member.set.role == role)
}

fn is_member(held: &Datapath, ip: IpAddr) -> bool {
    let mut all = held.host.iter();
    all.any(|item| matches!(item, Item::Member(member) if member.ip == ip))
}

/// Whether chains and rules of a family both have to be mended. Until both are, the host may take what
/// a proxy dials for what a pod does.
fn is_torn(family: Family, desired: &BTreeSet<Item>, observed: &BTreeSet<Item>) -> bool {
    let mut missing = desired.difference(observed);
    let lacks_chains = missing.clone().any(|item| {
        matches!(item, Item::Chains(chains)
            if chains.family == family && chains.table == Table::Mangle)
    });
    let is_there = |wanted: &Rule| {
        observed.iter().any(|item| {
            matches!(item, Item::Rule(rule)
                if (rule.family, rule.priority) == (wanted.family, wanted.priority))
        })
    };
    lacks_chains
        && missing.any(
            |item| matches!(item, Item::Rule(rule) if rule.family == family && !is_there(rule)),
        )
}

fn is_forwarding(item: &Item) -> bool {
    matches!(item, Item::Sysctl(sysctl)
        if Family::ALL.iter().any(|family| sysctl.path == forwarding(*family)))
}

/// Whether it hands a proxy what belongs to the connections that it carries.
fn leads_back(route: &Route) -> bool {
    matches!(route.target, Target::Via { onlink: true, .. })
}

fn is_replaced(old: &Item, desired: &BTreeSet<Item>) -> bool {
    desired.iter().any(|new| new.replaces(old))
}

fn is_outbound(item: &Item) -> bool {
    matches!(item, Item::Route(route)
        if route.leads_into_a_tunnel() && route.destination.prefix_len() == 0)
}

/// The last rank of what the host needs before a proxy's side may work.
const LAST_OF_BEGINNING: u8 = 7;

/// Place of an item in the order of making.
fn rank(item: &Item) -> u8 {
    match item {
        Item::Link(_) => 0,
        // What a device does on its way up depends on them.
        Item::Sysctl(_) => 1,
        Item::Up(_) => 2,
        Item::Address(_) => 3,
        Item::Route(route) if refuses(route) && route.pod().is_none() => 4,
        Item::Rule(_) => 5,
        Item::Set(_) => 6,
        Item::Chains(_) => 7,
        Item::Route(route) if refuses(route) => 10,
        // The way back first: what a proxy is handed it answers at once.
        Item::Route(route) if !route.leads_into_a_tunnel() => 8,
        Item::Route(_) => 9,
        Item::Member(member) => match member.set.role {
            Role::Redirect => 11,
            Role::Guard => 12,
        },
    }
}

/// Place of an item in the order of removal: a pod that leaves loses its refusal before its way, so
/// that it is reachable all the time.
fn removal_rank(item: &Item) -> u8 {
    match item {
        Item::Route(route) if refuses(route) && route.pod().is_some() => 0,
        hold if hold.is_hold() => 14,
        other => 13 - rank(other),
    }
}

fn refuses(route: &Route) -> bool {
    route.target == Target::Unreachable
}

fn is_link(item: &Item) -> bool {
    matches!(item, Item::Link(_))
}

/// What is left of `observed` once the links that have to go are gone: the kernel takes away what is
/// on a device together with it.
fn without_lost(desired: &Datapath, observed: &Datapath) -> Datapath {
    let mut left = observed.clone();
    for place in Place::ALL {
        let kept: BTreeSet<&str> = links(desired.side(place).intersection(observed.side(place)));
        let lost: BTreeSet<&str> = links(observed.side(place))
            .difference(&kept)
            .copied()
            .collect();
        let on_lost = |item: &Item| item.device().is_some_and(|device| lost.contains(device));
        left.side_mut(place).retain(|item| !on_lost(item));
        // The other end of a lost veth pair goes with it.
        if place == Place::Host {
            let pairs = observed.host.iter().filter_map(|item| match item {
                Item::Link(Link::Veth { name, .. }) => Some(name.as_str()),
                _ => None,
            });
            let peers: BTreeSet<String> =
                pairs.filter(|name| lost.contains(name)).map(peer).collect();
            let on_peer = |item: &Item| item.device().is_some_and(|device| peers.contains(device));
            for slot in Slot::BOTH {
                left.proxies[slot].retain(|item| !on_peer(item));
            }
        }
    }
    left
}

fn links<'a>(items: impl IntoIterator<Item = &'a Item>) -> BTreeSet<&'a str> {
    items
        .into_iter()
        .filter_map(|item| match item {
            Item::Link(link) => Some(link.name()),
            _ => None,
        })
        .collect()
}

fn additions(
    place: Place,
    desired: &Datapath,
    observed: &Datapath,
    wanted: impl Fn(&Item) -> bool,
    steps: &mut Vec<Step>,
) {
    let (desired, observed) = (desired.side(place), observed.side(place));
    let mut missing: Vec<&Item> = desired
        .difference(observed)
        .filter(|item| wanted(item))
        .collect();
    missing.sort_by_key(|item| rank(item));
    for new in missing {
        let old = observed.difference(desired).find(|old| new.replaces(old));
        let change = match old {
            Some(old) => Change::Replace {
                old: old.clone(),
                new: new.clone(),
            },
            None => Change::Add(new.clone()),
        };
        steps.push(Step { place, change });
    }
}

fn removals(place: Place, desired: &Datapath, observed: &Datapath, steps: &mut Vec<Step>) {
    let (desired, observed) = (desired.side(place), observed.side(place));
    let mut extra: Vec<&Item> = observed.difference(desired).collect();
    extra.sort_by_key(|item| removal_rank(item));
    for old in extra {
        if !is_replaced(old, desired) && !needs_no_removal(old) {
            steps.push(Step {
                place,
                change: Change::Remove(old.clone()),
            });
        }
    }
}

/// A setting whose own value is also the one to leave behind.
fn needs_no_removal(item: &Item) -> bool {
    matches!(item, Item::Sysctl(sysctl) if sysctl.value == sysctl.restore)
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for step in &self.steps {
            writeln!(f, "{step}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = match self.place {
            Place::Host => "host ",
            Place::Proxy(Slot::First) => "proxy",
            Place::Proxy(Slot::Second) => "next ",
        };
        match &self.change {
            Change::Add(item) => write!(f, "{place} + {item}"),
            Change::Replace { new, .. } => write!(f, "{place} ~ {new}"),
            Change::Remove(item) => write!(f, "{place} - {item}"),
        }
    }
}
