//! The rules that hold a pod: `from ADDRESS iif DEVICE ipproto tcp blackhole`.
//!
//! What the pod sends to this host's own addresses meets the table `local` first: answers to kubelet's
//! probes pass. Only TCP is held, for only TCP is carried: names are looked up meanwhile. Nothing is
//! said to the sender, whose next try, a second later, finds the way open.

use std::net::IpAddr;

use guard::record::Record;
use netlink_packet_route::route::RouteProtocol;
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use netlink_packet_route::{AddressFamily, IpProtocol};

use crate::netlink::{Netlink, NetlinkError};

/// Holds a pod.
pub(crate) fn add(record: &Record) -> Result<(), NetlinkError> {
    let netlink = Netlink::open()?;
    for ip in &record.addresses {
        netlink.add_rule(rule(record, *ip), &shown("add", record, *ip))?;
    }
    Ok(())
}

/// Lets it go.
pub(crate) fn remove(record: &Record) -> Result<(), NetlinkError> {
    let netlink = Netlink::open()?;
    for ip in &record.addresses {
        netlink.remove_rule(rule(record, *ip), &shown("del", record, *ip))?;
    }
    Ok(())
}

fn rule(record: &Record, ip: IpAddr) -> RuleMessage {
    let mut message = RuleMessage::default();
    (message.header.family, message.header.src_len) = match ip {
        IpAddr::V4(_) => (AddressFamily::Inet, 32),
        IpAddr::V6(_) => (AddressFamily::Inet6, 128),
    };
    message.header.action = RuleAction::Blackhole;
    message.attributes = vec![
        RuleAttribute::Priority(record.priority),
        RuleAttribute::Protocol(RouteProtocol::Other(record.protocol)),
        RuleAttribute::Source(ip),
        RuleAttribute::Iifname(record.device.clone()),
        RuleAttribute::IpProtocol(IpProtocol::Tcp),
    ];
    message
}

fn shown(what: &str, record: &Record, ip: IpAddr) -> String {
    let Record {
        priority, device, ..
    } = record;
    format!("ip rule {what} from {ip} iif {device} ipproto tcp priority {priority} blackhole")
}
