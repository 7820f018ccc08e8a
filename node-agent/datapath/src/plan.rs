//! The steps from what the kernel holds to what it should hold. Pure: a set difference, in an order
//! in which no mesh pod's traffic ever leaves in the clear.

use std::collections::BTreeSet;
use std::fmt;

use crate::datapath::{Datapath, Item, Link, Place, Route, Target};
use crate::names::peer;
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
/// 1. Pods that leave the mesh lose their set membership.
/// 2. Without a proxy to send to, the routes to it go, so that the unreachable ones below them count.
/// 3. Devices of the proxy's side that stand in the way of others go.
/// 4. Devices, the proxy's side, unreachable routes, rules and chains are made; only then the routes
///    to the proxy (its own dials must be told apart by then, and the way back to it must lead to it),
///    and last the members of the set.
/// 5. What is left over goes in the opposite order.
#[must_use]
pub fn plan(desired: &Datapath, observed: &Datapath) -> Plan {
    let mut steps = Vec::new();
    let mut left = observed.clone();
    let leaves = |item: &Item| matches!(item, Item::Member(_));
    remove_early(Place::Host, leaves, desired, &mut left, &mut steps);
    if !desired.host.iter().any(is_outbound) {
        remove_early(Place::Host, is_to_proxy, desired, &mut left, &mut steps);
    }
    let mut observed = without_lost(desired, &left);
    // The proxy's end of a veth pair is made with the host's, and needs its name to be free.
    for slot in Slot::BOTH {
        let wanted = &desired.proxies[slot];
        let in_the_way =
            |item: &Item| is_link(item) && !wanted.iter().any(|new| new.replaces(item));
        let place = Place::Proxy(slot);
        remove_early(place, in_the_way, desired, &mut observed, &mut steps);
    }
    // The host's links come before the proxy's side: one end of a veth pair makes the other.
    additions(Place::Host, desired, &observed, is_link, &mut steps);
    for slot in Slot::BOTH {
        let place = Place::Proxy(slot);
        additions(place, desired, &observed, |_| true, &mut steps);
    }
    additions(
        Place::Host,
        desired,
        &observed,
        |item| !is_link(item),
        &mut steps,
    );
    for place in Place::ALL {
        removals(place, desired, &observed, &mut steps);
    }
    Plan { steps }
}

fn remove_early(
    place: Place,
    which: impl Fn(&Item) -> bool,
    desired: &Datapath,
    left: &mut Datapath,
    steps: &mut Vec<Step>,
) {
    let gone: Vec<Item> = left
        .side(place)
        .difference(desired.side(place))
        .cloned()
        .collect();
    for item in gone.into_iter().filter(which) {
        left.side_mut(place).remove(&item);
        steps.push(Step {
            place,
            change: Change::Remove(item),
        });
    }
}

/// A route that hands traffic to the proxy.
fn is_to_proxy(item: &Item) -> bool {
    matches!(item, Item::Route(route) if route.leads_into_a_tunnel())
}

fn is_outbound(item: &Item) -> bool {
    matches!(item, Item::Route(route)
        if route.leads_into_a_tunnel() && route.destination.prefix_len() == 0)
}

/// Place of an item in the order of making.
fn rank(item: &Item) -> u8 {
    match item {
        Item::Link(_) => 0,
        // What a device does on its way up depends on them.
        Item::Sysctl(_) => 1,
        Item::Up(_) => 2,
        Item::Address(_) => 3,
        Item::Route(route) if refuses(route) => 4,
        Item::Rule(_) => 5,
        Item::Set(_) => 6,
        Item::Chains(_) => 7,
        // The way back first: what a proxy is handed it answers at once.
        Item::Route(route) if !route.leads_into_a_tunnel() => 8,
        Item::Route(_) => 9,
        Item::Member(_) => 10,
    }
}

/// Place of an item in the order of removal: a pod that leaves loses its refusal before its way, so
/// that it is reachable all the time.
fn removal_rank(item: &Item) -> u8 {
    match item {
        Item::Route(route) if refuses(route) && route.pod().is_some() => 0,
        other => 11 - rank(other),
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
        let replaced = desired.iter().any(|new| new.replaces(old));
        if !replaced && !needs_no_removal(old) {
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
