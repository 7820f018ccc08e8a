//! Items in the words of the commands that a person would type.

use std::fmt;

use super::{Action, Address, Chains, Item, Link, Member, Route, Rule, Selector, Sysctl, Target};
use crate::family::Family;
use crate::names::{METRIC_LAST, PROTOCOL};
use crate::set::AddressSet;

/// As the arguments that a person would type after `ip`, `ipset`, `iptables` or `sysctl`.
impl fmt::Display for Item {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Link(link) => write!(f, "ip link {link}"),
            Self::Up(device) => write!(f, "ip link set {device} up"),
            Self::Address(Address { device, address }) => {
                let option = Family::of(address.addr()).option();
                write!(f, "ip {option}address {address} dev {device}")
            }
            Self::Sysctl(Sysctl { path, value, .. }) => {
                write!(f, "sysctl net/{path}={}", value.replace('\t', " "))
            }
            Self::Route(route) => write!(f, "ip {}route {route}", route.family().option()),
            Self::Rule(rule) => write!(f, "ip {}rule {rule}", rule.family.option()),
            Self::Set(AddressSet { name, family, .. }) => {
                let kind = match family {
                    Family::V4 => "inet",
                    Family::V6 => "inet6",
                };
                write!(f, "ipset {name} hash:ip family {kind}")
            }
            Self::Member(Member { set, ip }) => write!(f, "ipset {} {ip}", set.name),
            Self::Chains(chains) => write!(f, "{chains}"),
        }
    }
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Geneve {
                name,
                vni,
                remote,
                port,
                mtu,
            } => write!(
                f,
                "{name} mtu {mtu} type geneve id {vni} remote {remote} dstport {port}"
            ),
            Self::Veth {
                name,
                peer: Some(peer),
                mtu,
            } => {
                write!(f, "{name} mtu {mtu} type veth peer name {peer}")
            }
            Self::Veth {
                name, peer: None, ..
            } => write!(f, "{name} type veth (peer elsewhere)"),
            Self::Foreign { name } => write!(f, "{name} (not ours)"),
        }
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            table,
            destination,
            metric,
            target,
        } = self;
        match target {
            Target::Unreachable => write!(f, "unreachable {destination}")?,
            Target::Local { device } => write!(f, "local {destination} dev {device}")?,
            Target::Link { device } => write!(f, "{destination} dev {device} scope link")?,
            Target::Via {
                gateway,
                device,
                onlink,
            } => {
                write!(f, "{destination} via {gateway} dev {device}")?;
                if *onlink {
                    f.write_str(" onlink")?;
                }
            }
        }
        write!(f, " table {table} proto {PROTOCOL}")?;
        if *metric == METRIC_LAST {
            write!(f, " metric {metric}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "priority {}", self.priority)?;
        match &self.selector {
            Selector::TcpFrom { device, ip } => write!(f, " from {ip} iif {device} ipproto tcp")?,
            Selector::All => {}
            Selector::Mark(mark) => write!(f, " fwmark {mark}")?,
            Selector::SentHere => f.write_str(" iif lo")?,
            Selector::Tcp => f.write_str(" ipproto tcp")?,
        }
        match self.action {
            Action::Lookup(table) => write!(f, " lookup {table}"),
            Action::Goto(priority) => write!(f, " goto {priority}"),
            Action::Nop => f.write_str(" nop"),
            Action::Blackhole => f.write_str(" blackhole"),
        }
    }
}

impl fmt::Display for Chains {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let program = match self.family {
            Family::V4 => "iptables",
            Family::V6 => "ip6tables",
        };
        write!(f, "{program} -t {}", self.table.name())?;
        for (hook, chain) in &self.chains {
            write!(f, "\n      {hook} -> {}{hook}", self.prefix)?;
            for rule in &chain.rules {
                write!(f, "\n        {rule}")?;
            }
        }
        Ok(())
    }
}
