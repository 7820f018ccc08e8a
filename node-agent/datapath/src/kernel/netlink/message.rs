//! Routes and rules as rtnetlink messages, and back.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::IpProtocol;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope,
    RouteType,
};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};

use crate::datapath::{Action, Place, Route, Rule, Selector, Target};
use crate::family::Family;
use crate::input::Mark;
use crate::names::{Names, PROTOCOL, TABLE_LOCAL, priority};

const NEXTHOP_ONLINK: u32 = 4;

/// What netlink calls a family.
pub(super) fn address_family(family: Family) -> AddressFamily {
    match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    }
}

/// The family that netlink means.
pub(crate) fn family_of(family: AddressFamily) -> Option<Family> {
    match family {
        AddressFamily::Inet => Some(Family::V4),
        AddressFamily::Inet6 => Some(Family::V6),
        _ => None,
    }
}

fn ip_of(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some((*ip).into()),
        RouteAddress::Inet6(ip) => Some((*ip).into()),
        _ => None,
    }
}

pub(super) fn route_device(route: &Route) -> Option<&str> {
    match &route.target {
        Target::Unreachable => None,
        Target::Local { device } | Target::Link { device } | Target::Via { device, .. } => {
            Some(device)
        }
    }
}

/// A route, whose device has this index.
pub(super) fn route(route: &Route, index: Option<u32>) -> RouteMessage {
    let mut message = RouteMessage::default();
    let header = &mut message.header;
    header.address_family = address_family(route.family());
    header.destination_prefix_length = route.destination.prefix_len();
    header.protocol = RouteProtocol::Other(PROTOCOL);
    header.kind = RouteType::Unicast;
    header.scope = RouteScope::Universe;
    match &route.target {
        Target::Unreachable => header.kind = RouteType::Unreachable,
        Target::Local { .. } => {
            header.kind = RouteType::Local;
            header.scope = RouteScope::Host;
        }
        Target::Link { .. } => header.scope = RouteScope::Link,
        Target::Via { onlink: true, .. } => header.flags = RouteFlags::Onlink,
        Target::Via { .. } => {}
    }
    let attributes = &mut message.attributes;
    attributes.push(RouteAttribute::Table(route.table));
    if route.destination.prefix_len() > 0 {
        attributes.push(RouteAttribute::Destination(route.destination.addr().into()));
    }
    if let Target::Via { gateway, .. } = &route.target {
        attributes.push(RouteAttribute::Gateway((*gateway).into()));
    }
    attributes.extend(index.map(RouteAttribute::Oif));
    if route.metric > 0 {
        attributes.push(RouteAttribute::Priority(route.metric));
    }
    message
}

/// A question for the way to an address.
pub(super) fn query(to: IpAddr, mark: Option<u32>) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = address_family(Family::of(to));
    message.header.destination_prefix_length = IpNet::from(to).prefix_len();
    message
        .attributes
        .push(RouteAttribute::Destination(to.into()));
    message.attributes.extend(mark.map(RouteAttribute::Mark));
    message
}

/// A route that carries our protocol and is in one of our tables.
pub(super) fn own_route(
    message: &RouteMessage,
    place: Place,
    devices: &BTreeMap<u32, String>,
    names: &Names,
) -> Option<Route> {
    if message.header.protocol != RouteProtocol::Other(PROTOCOL) {
        return None;
    }
    let table = table(&message.header, &message.attributes);
    let is_ours = match place {
        Place::Host => names.is_table(table),
        Place::Proxy(_) => table == TABLE_LOCAL,
    };
    if !is_ours {
        return None;
    }
    let everywhere = family_of(message.header.address_family)?.everywhere();
    let (mut ip, mut gateway, mut device, mut metric) = (everywhere.addr(), None, None, 0);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => ip = ip_of(address)?,
            RouteAttribute::Gateway(address) => gateway = ip_of(address),
            RouteAttribute::Oif(index) => device = devices.get(index).cloned(),
            RouteAttribute::Priority(value) => metric = *value,
            _ => {}
        }
    }
    let destination = IpNet::new(ip, message.header.destination_prefix_length).ok()?;
    let onlink = message.header.flags.bits() & NEXTHOP_ONLINK != 0;
    let target = match (message.header.kind, gateway, device) {
        (RouteType::Unreachable, _, _) => Target::Unreachable,
        (RouteType::Local, _, Some(device)) => Target::Local { device },
        (_, Some(gateway), Some(device)) => Target::Via {
            gateway,
            device,
            onlink,
        },
        (_, None, Some(device)) => Target::Link { device },
        (_, _, None) => return None,
    };
    Some(Route {
        table,
        destination,
        metric,
        target,
    })
}

fn table(header: &RouteHeader, attributes: &[RouteAttribute]) -> u32 {
    attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Table(table) => Some(*table),
            _ => None,
        })
        .unwrap_or_else(|| header.table.into())
}

/// A rule.
pub(super) fn rule(rule: &Rule) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = address_family(rule.family);
    let attributes = &mut message.attributes;
    attributes.push(RuleAttribute::Priority(rule.priority));
    attributes.push(RuleAttribute::Protocol(RouteProtocol::Other(PROTOCOL)));
    match &rule.selector {
        Selector::All => {}
        Selector::Mark(mark) => {
            attributes.push(RuleAttribute::FwMark(mark.value()));
            attributes.push(RuleAttribute::FwMask(mark.mask()));
        }
        Selector::SentHere => attributes.push(RuleAttribute::Iifname("lo".to_owned())),
        Selector::Tcp => attributes.push(RuleAttribute::IpProtocol(IpProtocol::Tcp)),
        Selector::TcpFrom { device, ip } => {
            message.header.src_len = IpNet::from(*ip).prefix_len();
            attributes.push(RuleAttribute::Source(*ip));
            attributes.push(RuleAttribute::Iifname(device.clone()));
            attributes.push(RuleAttribute::IpProtocol(IpProtocol::Tcp));
        }
    }
    match rule.action {
        Action::Lookup(table) => {
            message.header.action = RuleAction::ToTable;
            attributes.push(RuleAttribute::Table(table));
        }
        Action::Goto(priority) => {
            message.header.action = RuleAction::Goto;
            attributes.push(RuleAttribute::Goto(priority));
        }
        Action::Nop => message.header.action = RuleAction::Nop,
        Action::Blackhole => message.header.action = RuleAction::Blackhole,
    }
    message
}

/// A rule that carries our protocol and one of our priorities.
pub(super) fn own_rule(message: &RuleMessage, place: Place, names: &Names) -> Option<Rule> {
    let family = family_of(message.header.family)?;
    let (mut priority, mut value, mut mask, mut table) =
        (0, None, None, u32::from(message.header.table));
    let (mut goto, mut own, mut selector) = (None, false, Selector::All);
    let (mut device, mut source) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Priority(number) => priority = *number,
            RuleAttribute::Protocol(protocol) => own = *protocol == RouteProtocol::Other(PROTOCOL),
            RuleAttribute::FwMark(mark) => value = Some(*mark),
            RuleAttribute::FwMask(bits) => mask = Some(*bits),
            RuleAttribute::Iifname(name) => device = Some(name.clone()),
            RuleAttribute::Source(ip) => source = Some(*ip),
            RuleAttribute::IpProtocol(_) => selector = Selector::Tcp,
            RuleAttribute::Table(number) => table = *number,
            RuleAttribute::Goto(number) => goto = Some(*number),
            _ => {}
        }
    }
    if let (Some(value), Some(mask)) = (value, mask) {
        selector = Mark::new(value, mask).map_or(Selector::All, Selector::Mark);
    }
    match (device, source) {
        (Some(device), Some(ip)) => selector = Selector::TcpFrom { device, ip },
        (Some(_), None) => selector = Selector::SentHere,
        _ => {}
    }
    let action = match (message.header.action, goto) {
        (RuleAction::Goto, Some(priority)) => Action::Goto(priority),
        (RuleAction::Nop, _) => Action::Nop,
        (RuleAction::Blackhole, _) => Action::Blackhole,
        _ => Action::Lookup(table),
    };
    let is_ours = match place {
        Place::Host => names.is_priority(priority),
        Place::Proxy(_) => [priority::TPROXY, priority::PROXY_RETURN].contains(&priority),
    };
    (own && is_ours).then_some(Rule {
        family,
        priority,
        selector,
        action,
    })
}

/// The device and the source address of an answer to [`query`].
pub(crate) fn way(message: &RouteMessage) -> (Option<u32>, Option<IpAddr>) {
    let mut way = (None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(index) => way.0 = Some(*index),
            RouteAttribute::PrefSource(address) => way.1 = ip_of(address),
            _ => {}
        }
    }
    way
}

/// The device of an answer to [`query`] that leads over no gateway.
pub(crate) fn on_link(message: &RouteMessage) -> Option<u32> {
    let over_gateway = message.attributes.iter().any(|attribute| {
        matches!(
            attribute,
            RouteAttribute::Gateway(_) | RouteAttribute::Via(_)
        )
    });
    let index = way(message).0;
    index.filter(|_| message.header.kind == RouteType::Unicast && !over_gateway)
}

/// Whether a rule of somebody else reads or needs these bits of the mark.
pub(crate) fn foreign_mark(message: &RuleMessage) -> Option<u32> {
    let own = message
        .attributes
        .contains(&RuleAttribute::Protocol(RouteProtocol::Other(PROTOCOL)));
    let mask = message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RuleAttribute::FwMask(mask) => Some(*mask),
            _ => None,
        });
    mask.filter(|_| !own)
}
