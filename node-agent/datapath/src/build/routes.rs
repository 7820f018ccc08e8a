//! The host's routes and policy routing rules.

use ipnet::IpNet;

use super::is_closed_or_served;
use crate::datapath::{Action, Item, Route, Rule, Selector, Target};
use crate::family::Family;
use crate::input::{Hold, NodeInput, Proxy, TunnelEnd};
use crate::names::{METRIC_IPV6, METRIC_LAST, Names, priority};
use crate::slot::Slot;

pub(super) fn routes(input: &NodeInput, family: Family) -> Vec<Item> {
    let mut routes = refusals(input, family);
    routes.extend(answers(input, family));
    routes.extend(to_the_proxy(input, family));
    routes
}

/// What counts where no way to the proxy is left.
fn refusals(input: &NodeInput, family: Family) -> Vec<Item> {
    let (names, everywhere) = (&input.names, family.everywhere());
    let mut routes = vec![unreachable(names.table_outbound(), everywhere)];
    routes.extend(Slot::BOTH.map(|slot| unreachable(names.table_return(slot), everywhere)));
    if is_closed_or_served(input) {
        let of_pod = |ip| unreachable(names.table_inbound(), ip);
        routes.extend(pods(input, family).map(of_pod));
    }
    routes
}

/// Back to the proxy that carries a connection, as long as its namespace is there: when its process
/// dies, its kernel resets what it carried.
fn answers(input: &NodeInput, family: Family) -> Vec<Item> {
    let back = |slot| {
        let proxy = input.proxies[slot].as_ref()?;
        let target = Target::Via {
            gateway: proxy.ends.of(family)?.proxy,
            device: proxy.host_device.clone(),
            onlink: true,
        };
        let table = input.names.table_return(slot);
        Some(route(table, family.everywhere(), target))
    };
    Slot::BOTH.into_iter().filter_map(back).collect()
}

/// New connections of mesh pods and towards them.
fn to_the_proxy(input: &NodeInput, family: Family) -> Vec<Item> {
    let Some((slot, proxy)) = input.serving() else {
        return Vec::new();
    };
    if proxy.ends.of(family).is_none() {
        return Vec::new();
    }
    let names = &input.names;
    let into = |end: TunnelEnd, device| Target::Via {
        gateway: end.network(family).proxy(),
        device,
        onlink: false,
    };
    let outbound = into(input.tunnel.outbound, names.outbound(slot));
    let inbound = into(input.tunnel.inbound, names.inbound(slot));
    let mut routes = vec![route(names.table_outbound(), family.everywhere(), outbound)];
    let itself = |(_, proxy): (Slot, &Proxy)| {
        let device = proxy.host_device.clone();
        let ip = proxy.ends.of(family)?.proxy;
        Some(route(
            names.table_outbound(),
            ip.into(),
            Target::Link { device },
        ))
    };
    routes.extend(input.proxies.taken().filter_map(itself));
    let of_pod = |ip| route(names.table_inbound(), ip, inbound.clone());
    routes.extend(pods(input, family).map(of_pod));
    routes
}

fn pods(input: &NodeInput, family: Family) -> impl Iterator<Item = IpNet> {
    let ips = input.pods.iter().map(|pod| pod.ip);
    ips.filter(move |ip| Family::of(*ip) == family)
        .map(IpNet::from)
}

pub(super) fn route(table: u32, destination: IpNet, target: Target) -> Item {
    let metric = match Family::of(destination.addr()) {
        Family::V4 => 0,
        Family::V6 => METRIC_IPV6,
    };
    Item::Route(Route {
        table,
        destination,
        metric,
        target,
    })
}

fn unreachable(table: u32, destination: IpNet) -> Item {
    Item::Route(Route {
        table,
        destination,
        metric: METRIC_LAST,
        target: Target::Unreachable,
    })
}

/// What a pod sends that waits to be carried. Dropped without a word, an application's first packet is
/// repeated a second later; refused, the application would be told that it failed. Only TCP: the rest
/// is never carried.
pub(super) fn hold(hold: &Hold, names: &Names) -> Item {
    Item::Rule(Rule {
        family: Family::of(hold.ip),
        priority: names.priority_hold(),
        selector: Selector::TcpFrom {
            device: hold.device.clone(),
            ip: hold.ip,
        },
        action: Action::Blackhole,
    })
}

pub(super) fn rules(family: Family, input: &NodeInput) -> Vec<Item> {
    use Action::{Goto, Lookup, Nop};
    let (names, marks) = (&input.names, &input.marks);
    let answers = Slot::BOTH.map(|slot| {
        (
            names.priority_return(),
            Selector::Mark(marks.return_[slot]),
            Lookup(names.table_return(slot)),
        )
    });
    let others = [
        (
            names.priority_skip(),
            Selector::Mark(marks.skip),
            Goto(priority::MAIN),
        ),
        (
            names.priority_outbound(),
            Selector::Mark(marks.outbound),
            Lookup(names.table_outbound()),
        ),
        // The host reaches its pods directly: kubelet's probes must work whatever the proxy does.
        (
            names.priority_host(),
            Selector::SentHere,
            Goto(names.priority_host_end()),
        ),
        // Only TCP: ping and UDP to mesh pods keep their way.
        (
            names.priority_inbound(),
            Selector::Tcp,
            Lookup(names.table_inbound()),
        ),
        (names.priority_host_end(), Selector::All, Nop),
    ];
    let rule = |(priority, selector, action)| {
        Item::Rule(Rule {
            family,
            priority,
            selector,
            action,
        })
    };
    answers.into_iter().chain(others).map(rule).collect()
}
