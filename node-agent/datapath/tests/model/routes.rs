//! Where the kernel sends a packet: policy routing rules, route tables, the check of its source.

use std::net::IpAddr;

use datapath::datapath::{Action, Route, Selector, Target};
use datapath::names::priority;
use datapath::{Family, Place};

use super::node::{self, Node, PROXY_DEVICE};
use super::{Packet, Protocol};

/// The device that what a namespace itself sends seems to come in by.
pub(crate) const ITSELF: &str = "lo";

/// What a lookup says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// To this namespace itself.
    Local,
    /// Out by a device, to a gateway if there is one.
    By {
        device: String,
        gateway: Option<IpAddr>,
    },
    /// Nowhere.
    Refused,
}

/// Looks up where a packet that came by `device` goes.
pub(crate) fn look_up(node: &Node, place: Place, device: &str, packet: &Packet) -> Way {
    let to = packet.destination;
    // Priority 0: the table of the namespace's own addresses.
    if is_own(node, place, to) {
        return Way::Local;
    }
    let side = node.side(place);
    let mut from = 0;
    for rule in &side.rules {
        if rule.priority < from || rule.family != packet.family() {
            continue;
        }
        let applies = match &rule.selector {
            Selector::All => true,
            Selector::Mark(mark) => packet.mark & mark.mask() == mark.value(),
            Selector::SentHere => device == ITSELF,
            Selector::Tcp => packet.protocol == Protocol::Tcp,
            Selector::TcpFrom { device: by, ip } => {
                packet.protocol == Protocol::Tcp && device == by && packet.source == *ip
            }
        };
        match rule.action {
            Action::Lookup(table) if applies => {
                let routes = side.routes.get(&table).map_or(&[][..], Vec::as_slice);
                if let Some(way) = best(node, place, routes, to) {
                    return way;
                }
            }
            // The kernel passes over a jump to a rule that is not there.
            Action::Goto(target)
                if applies
                    && (target == priority::MAIN
                        || side.rules.iter().any(|rule| {
                            rule.family == packet.family() && rule.priority == target
                        })) =>
            {
                from = target;
            }
            Action::Blackhole if applies => return Way::Refused,
            Action::Lookup(_) | Action::Goto(_) | Action::Nop | Action::Blackhole => {}
        }
    }
    main(place, to)
}

/// Whether the kernel takes a packet from this source by this device (RFC 3704; `fib_validate_source`).
pub(crate) fn takes_source(node: &Node, place: Place, device: &str, packet: &Packet) -> bool {
    if packet.family() == Family::V6 || !node.checks_sources {
        return true;
    }
    // Without the mark, and as if this namespace had sent it.
    let back = Packet {
        source: packet.destination,
        destination: packet.source,
        mark: 0,
        ..*packet
    };
    let filter = rp_filter(node, place, device);
    match look_up(node, place, ITSELF, &back) {
        // Nobody else has an address of ours.
        Way::Local => false,
        Way::Refused => filter == 0,
        Way::By { device: by, .. } => filter != 1 || by == device,
    }
}

/// The larger of the device's own and that of `all`.
fn rp_filter(node: &Node, place: Place, device: &str) -> u8 {
    let side = node.side(place);
    let value = |name: &str| {
        let set = side.setting(&format!("ipv4/conf/{name}/rp_filter"));
        set.map(|value| value.parse::<u8>().unwrap())
    };
    match place {
        // `all` of the host is as its devices start.
        Place::Host => value(device).unwrap_or(node.default_rp_filter),
        Place::Proxy(_) => value(device)
            .unwrap_or(node.default_rp_filter)
            .max(value("all").unwrap_or(node.default_rp_filter)),
    }
}

fn is_own(node: &Node, place: Place, ip: IpAddr) -> bool {
    let own = match place {
        Place::Host => node::host(Family::of(ip)),
        Place::Proxy(slot) => node::proxy(slot, Family::of(ip)),
    };
    ip == own || node.side(place).has_address(None, ip)
}

/// The route with the longest prefix; among those, the one with the smallest metric.
fn best(node: &Node, place: Place, routes: &[Route], to: IpAddr) -> Option<Way> {
    let side = node.side(place);
    let best = routes
        .iter()
        .filter(|route| route.destination.contains(&to) && side.counts(route))
        .max_by_key(|route| {
            let prefix = route.destination.prefix_len();
            (prefix, std::cmp::Reverse(route.metric))
        })?;
    Some(match &best.target {
        Target::Unreachable => Way::Refused,
        Target::Local { .. } => Way::Local,
        Target::Link { device } => Way::By {
            device: device.clone(),
            gateway: None,
        },
        Target::Via {
            gateway, device, ..
        } => Way::By {
            device: device.clone(),
            gateway: Some(*gateway),
        },
    })
}

fn main(place: Place, to: IpAddr) -> Way {
    let device = match place {
        Place::Host => node::main_device(to),
        Place::Proxy(_) => PROXY_DEVICE.to_owned(),
    };
    Way::By {
        device,
        gateway: None,
    }
}
