//! A proxy's network namespace: the other ends of its tunnels, and what hands packets to its sockets.

use std::collections::BTreeSet;

use super::chains::{chains, host_net};
use super::devices::{address, ends, geneve, ipv6_device, rp_filter, setting};
use super::routes::route;
use crate::datapath::{Action, Chains, Item, Rule, Selector, Table, Target};
use crate::family::Family;
use crate::input::{Marks, NodeInput, Proxy, TunnelKind};
use crate::names::{LINK_LOCAL, TABLE_LOCAL, forwarding, peer, priority, proxy_port_range};
use crate::slot::Slot;

pub(super) fn build(input: &NodeInput, slot: Slot, proxy: &Proxy) -> BTreeSet<Item> {
    let mut side = BTreeSet::new();
    for (device, end) in ends(input, slot) {
        let name = &peer(&device);
        if input.tunnel.kind == TunnelKind::Geneve {
            let remote = proxy.ends.outer().host;
            let link = geneve(&input.tunnel, name, end, remote, proxy.mtu);
            side.insert(Item::Link(link));
        }
        side.insert(Item::Up(name.to_owned()));
        for family in input.families() {
            let network = end.network(family);
            side.insert(address(name, network.proxy(), network.prefix_len()));
        }
        side.insert(rp_filter(name, "0", "0"));
        side.extend(ipv6_device(input, name, LINK_LOCAL[1].into()));
    }
    // The namespace is the proxy's alone.
    side.insert(rp_filter(&proxy.device, "0", &proxy.default_rp_filter));
    side.insert(rp_filter("all", "0", "0"));
    let range = "ipv4/ip_local_port_range".to_owned();
    side.insert(setting(range, proxy_port_range(slot)));
    for family in input.families() {
        // Many a pod's namespace forwards because its node does (`net.core.devconf_inherit_init_net`).
        // Here it must not: with a part of this missing, it would send on what the host hands it.
        side.insert(setting(forwarding(family).to_owned(), "0"));
        let local = Target::Local {
            device: "lo".to_owned(),
        };
        side.insert(route(TABLE_LOCAL, family.everywhere(), local));
        side.extend(rules(family, &input.marks));
        side.insert(Item::Chains(mangle(family, input, slot, proxy)));
    }
    side
}

fn rules(family: Family, marks: &Marks) -> [Item; 2] {
    [
        (priority::TPROXY, marks.tproxy),
        (priority::PROXY_RETURN, marks.proxy_return),
    ]
    .map(|(priority, mark)| {
        Item::Rule(Rule {
            family,
            priority,
            selector: Selector::Mark(mark),
            action: Action::Lookup(TABLE_LOCAL),
        })
    })
}

fn mangle(family: Family, input: &NodeInput, slot: Slot, proxy: &Proxy) -> Chains {
    let (names, ports, mark) = (&input.names, input.ports, input.marks.tproxy);
    let [from_inbound, from_outbound] = names.devices(slot).map(|device| peer(&device));
    let tproxy = |port: u16| {
        let ip = family.loopback();
        format!("-j TPROXY --on-port {port} --on-ip {ip} --tproxy-mark {mark}")
    };
    let mut prerouting = vec![
        format!(
            "-i {from_inbound} -p tcp -m tcp --dport {0} {1}",
            ports.inbound,
            tproxy(ports.inbound)
        ),
        format!(
            "-i {from_inbound} -p tcp {}",
            tproxy(ports.inbound_plaintext)
        ),
        format!("-i {from_outbound} -p tcp {}", tproxy(ports.outbound)),
    ];
    let Some(ends) = proxy.ends.of(family) else {
        return chains(names, family, Table::Mangle, [("PREROUTING", prerouting)]);
    };
    let answer = |protocol: &str| {
        format!(
            "! -d {} -i {} -p {protocol} -j MARK --set-xmark {}",
            host_net(ends.proxy),
            proxy.device,
            input.marks.proxy_return
        )
    };
    prerouting.push(answer("tcp"));
    // Errors about what was dialled from a pod's address (RFC 792, RFC 4443; path MTU, refusals).
    match family {
        Family::V4 => prerouting.push(answer("icmp")),
        // Of the errors only: neighbours ask for each other by ICMPv6 too.
        Family::V6 => prerouting.extend(
            [1, 2, 3].map(|kind| answer(&format!("ipv6-icmp -m icmp6 --icmpv6-type {kind}"))),
        ),
    }
    chains(names, family, Table::Mangle, [("PREROUTING", prerouting)])
}
