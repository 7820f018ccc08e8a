//! The steps from what the kernel holds to what it should hold. Pure: a set difference, in an order
//! in which no mesh pod's traffic ever leaves in the clear.

use std::collections::BTreeSet;
use std::fmt;

use crate::datapath::{Datapath, Item, Place};

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

impl Plan {
    /// Nothing to do.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }
}

/// The plan from `observed` to `desired`.
///
/// Pods that leave the mesh lose their set membership first, then the proxy's side is built, then the
/// host's from devices up to set members, then what is left over goes, in the opposite order.
#[must_use]
pub fn plan(desired: &Datapath, observed: &Datapath) -> Plan {
    let observed = without_lost(desired, observed);
    let mut steps = Vec::new();
    for item in observed.host.difference(&desired.host) {
        if matches!(item, Item::Member(_)) {
            steps.push(Step {
                place: Place::Host,
                change: Change::Remove(item.clone()),
            });
        }
    }
    // The host's links come before the proxy's side: one end of a veth pair makes the other.
    additions(Place::Host, desired, &observed, is_link, &mut steps);
    additions(Place::Proxy, desired, &observed, |_| true, &mut steps);
    additions(
        Place::Host,
        desired,
        &observed,
        |item| !is_link(item),
        &mut steps,
    );
    for place in [Place::Host, Place::Proxy] {
        removals(place, desired, &observed, &mut steps);
    }
    Plan { steps }
}

fn is_link(item: &Item) -> bool {
    matches!(item, Item::Link(_))
}

/// What is left of `observed` once the links that have to go are gone: the kernel takes away what is
/// on a device together with it.
fn without_lost(desired: &Datapath, observed: &Datapath) -> Datapath {
    let mut left = observed.clone();
    for place in [Place::Host, Place::Proxy] {
        let kept: BTreeSet<&str> = links(desired.side(place).intersection(observed.side(place)));
        let lost: BTreeSet<&str> = links(observed.side(place))
            .difference(&kept)
            .copied()
            .collect();
        let on_lost = |item: &Item| item.device().is_some_and(|device| lost.contains(device));
        left.side_mut(place).retain(|item| !on_lost(item));
        // The other end of a lost veth pair goes with it.
        if place == Place::Host {
            let peers: BTreeSet<String> = lost.iter().map(|name| format!("p{name}")).collect();
            left.proxy
                .retain(|item| !item.device().is_some_and(|device| peers.contains(device)));
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
    for new in desired.difference(observed).filter(|item| wanted(item)) {
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
    for old in observed.iter().rev().filter(|old| !desired.contains(*old)) {
        let replaced = desired.iter().any(|new| new.replaces(old)) || needs_no_removal(old);
        if !replaced && !matches!((place, old), (Place::Host, Item::Member(_))) {
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
            Place::Proxy => "proxy",
        };
        match &self.change {
            Change::Add(item) => write!(f, "{place} + {item}"),
            Change::Replace { new, .. } => write!(f, "{place} ~ {new}"),
            Change::Remove(item) => write!(f, "{place} - {item}"),
        }
    }
}
