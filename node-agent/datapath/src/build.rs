//! From what is known about a node to what its kernel should hold. Pure.
//!
//! Fails closed: the tables of mesh traffic end in an unreachable route, so that what is marked for
//! the proxy never falls through to the main table when a device, a route or the proxy is missing.
//!
//! ```text
//!  NodeInput ─▶ routes, chains, devices ─▶ host
//!          └──▶ proxy_side, for each attached proxy ─▶ proxies
//! ```

mod chains;
mod devices;
mod proxy_side;
mod routes;

use std::collections::BTreeSet;

use crate::datapath::{Datapath, Item, Member};
use crate::family::Family;
use crate::input::{FailureMode, Hold, NodeInput};
use crate::names::Names;

/// What the kernel should hold.
#[must_use]
pub fn build(input: &NodeInput) -> Datapath {
    let mut datapath = Datapath::default();
    host(input, &mut datapath.host);
    for (slot, proxy) in input.proxies.taken() {
        datapath.host.extend(devices::tunnels(input, slot, proxy));
        datapath.proxies[slot] = proxy_side::build(input, slot, proxy);
    }
    datapath.host.extend(devices::of_pods(input));
    datapath
}

/// The same with these pods held back, and no others. Who is held depends on what the kernel holds of
/// them already, and holds stand where nothing else can.
#[must_use]
pub fn with_holds(mut datapath: Datapath, holds: &BTreeSet<Hold>, names: &Names) -> Datapath {
    datapath.host.retain(|item| !item.is_hold());
    let items = holds.iter().map(|hold| routes::hold(hold, names));
    datapath.host.extend(items);
    datapath
}

fn host(input: &NodeInput, host: &mut BTreeSet<Item>) {
    for family in input.families() {
        host.extend(routes::routes(input, family));
        host.extend(routes::rules(family, input));
        host.extend(input.names.sets(family).map(Item::Set));
        host.insert(Item::Chains(chains::mangle(family, input)));
        host.insert(Item::Chains(chains::nat(family, input)));
    }
    if is_closed_or_served(input) {
        host.extend(input.pods.iter().flat_map(|pod| {
            let ip = pod.ip;
            let sets = input.names.sets(Family::of(ip));
            sets.map(|set| Item::Member(Member { set, ip }))
        }));
    }
}

/// Whether mesh pods' traffic must not go directly.
fn is_closed_or_served(input: &NodeInput) -> bool {
    input.serving().is_some() || input.failure_mode == FailureMode::Closed
}
