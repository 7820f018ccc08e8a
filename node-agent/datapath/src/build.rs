//! From what is known about a node to what its kernel should hold. Pure.
//!
//! Fails closed: the tables of mesh traffic end in an unreachable route, so that what is marked for
//! the proxy never falls through to the main table when a device, a route or the proxy is missing.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use crate::datapath::{
    Action, Address, AddressSet, Chain, Chains, Datapath, Item, Link, Member, Route, Rule,
    Selector, Sysctl, Table, Target,
};
use crate::family::Family;
use crate::input::{FailureMode, Marks, NodeInput, Proxy, Tunnel, TunnelEnd, TunnelKind};
use crate::names::{
    LINK_LOCAL, METRIC_IPV6, METRIC_LAST, Names, PROXY_PORT_RANGE, TABLE_LOCAL, peer, priority,
};

/// What the kernel should hold.
#[must_use]
pub fn build(input: &NodeInput) -> Datapath {
    let mut datapath = Datapath::default();
    host(input, &mut datapath.host);
    if let Some(proxy) = &input.proxy {
        host_tunnels(input, proxy, &mut datapath.host);
        proxy_side(input, proxy, &mut datapath.proxy);
    }
    datapath
}

fn host(input: &NodeInput, host: &mut BTreeSet<Item>) {
    for family in input.families() {
        host.extend(host_routes(input, family));
        host.extend(host_rules(family, input));
        host.insert(Item::Set(AddressSet {
            name: input.names.set(family),
            family,
        }));
        host.insert(Item::Chains(host_mangle(family, input)));
        host.insert(Item::Chains(host_nat(family, input)));
    }
    if serving(input).is_some() || input.failure_mode == FailureMode::Closed {
        host.extend(input.pods.iter().map(|pod| {
            Item::Member(Member {
                set: input.names.set(Family::of(pod.ip)),
                ip: pod.ip,
            })
        }));
    }
}

/// The proxy, if it takes connections.
fn serving(input: &NodeInput) -> Option<&Proxy> {
    input.proxy.as_ref().filter(|proxy| proxy.serving)
}

fn host_routes(input: &NodeInput, family: Family) -> Vec<Item> {
    let names = &input.names;
    let everywhere = family.everywhere();
    let mut routes = vec![
        unreachable(names.table_outbound(), everywhere),
        unreachable(names.table_return(), everywhere),
    ];
    let pods = || {
        let ips = input.pods.iter().map(|pod| pod.ip);
        ips.filter(|ip| Family::of(*ip) == family)
    };
    let serving = serving(input);
    if serving.is_some() || input.failure_mode == FailureMode::Closed {
        routes.extend(pods().map(|ip| unreachable(names.table_inbound(), ip.into())));
    }
    let via = |gateway, device: &str, onlink| Target::Via {
        gateway,
        device: device.to_owned(),
        onlink,
    };
    let Some((proxy, ends)) = input
        .proxy
        .as_ref()
        .and_then(|proxy| Some((proxy, proxy.ends.of(family)?)))
    else {
        return routes;
    };
    // A proxy that died answers what it had proxied with RST, by the kernel of its namespace.
    let back = via(ends.proxy, &proxy.host_device, true);
    routes.push(route(names.table_return(), everywhere, back));
    if serving.is_none() {
        return routes;
    }
    let gateway = |end: TunnelEnd| end.network(family).proxy();
    let outbound = via(gateway(input.tunnel.outbound), names.outbound(), false);
    let inbound = via(gateway(input.tunnel.inbound), names.inbound(), false);
    let to_proxy = Target::Link {
        device: proxy.host_device.clone(),
    };
    routes.push(route(names.table_outbound(), everywhere, outbound));
    routes.push(route(names.table_outbound(), ends.proxy.into(), to_proxy));
    routes.extend(pods().map(|ip| route(names.table_inbound(), ip.into(), inbound.clone())));
    routes
}

fn route(table: u32, destination: IpNet, target: Target) -> Item {
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

fn host_rules(family: Family, input: &NodeInput) -> Vec<Item> {
    use Action::{Goto, Lookup, Nop};
    let (names, marks) = (&input.names, &input.marks);
    [
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
        (
            names.priority_return(),
            Selector::Mark(marks.return_),
            Lookup(names.table_return()),
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
    ]
    .map(|(priority, selector, action)| {
        Item::Rule(Rule {
            family,
            priority,
            selector,
            action,
        })
    })
    .into()
}

fn host_mangle(family: Family, input: &NodeInput) -> Chains {
    let (names, proxy) = (&input.names, input.proxy.as_ref());
    let Marks {
        outbound,
        skip,
        proxied,
        own,
        return_,
        ..
    } = &input.marks;
    let save = format!(
        "-m mark --mark {proxied} -j CONNMARK --save-mark --nfmask {mask:#x} --ctmask {mask:#x}",
        mask = proxied.mask()
    );
    let mut prerouting = Vec::new();
    let from_elsewhere =
        proxy.map_or_else(String::new, |proxy| format!("! -i {} ", proxy.host_device));
    let answer = format!("{from_elsewhere}-m connmark --mark {proxied}");
    prerouting.push(format!("{answer} -j MARK --set-xmark {return_}"));
    prerouting.push(format!("{answer} -j RETURN"));
    if let Some(Proxy {
        ends, host_device, ..
    }) = proxy
    {
        let foreign_source = ends.of(family).map_or_else(String::new, |ends| {
            format!("! -s {} ", host_net(ends.proxy))
        });
        prerouting.push(format!(
            "{foreign_source}-i {host_device} -j MARK --set-xmark {proxied}"
        ));
        prerouting.push(format!("-m mark --mark {skip} -j RETURN"));
        prerouting.push(format!("-i {host_device} -j MARK --set-xmark {own}"));
        for device in [names.inbound(), names.outbound()] {
            prerouting.push(format!("-i {device} -j MARK --set-xmark {skip}"));
        }
        prerouting.push(format!("-m mark --mark {skip} -j RETURN"));
    }
    // Connections older than the enrolment of their pod keep their direct path.
    prerouting.push(format!(
        "-p tcp -m conntrack --ctstate ESTABLISHED -m connmark ! --mark {proxied} -j MARK --set-xmark {skip}"
    ));
    prerouting.push(format!("-m mark --mark {skip} -j RETURN"));
    prerouting.push(format!(
        "-p tcp -m set --match-set {} src -j MARK --set-xmark {outbound}",
        names.set(family)
    ));
    chains(
        names,
        family,
        Table::Mangle,
        [
            ("PREROUTING", prerouting),
            ("FORWARD", vec![save.clone()]),
            ("INPUT", vec![save]),
            (
                "OUTPUT",
                // Only TCP: the host's own ICMP errors about such a connection go to its pod.
                vec![format!(
                    "-p tcp -m connmark --mark {proxied} -j MARK --set-xmark {return_}"
                )],
            ),
        ],
    )
}

fn host_nat(family: Family, input: &NodeInput) -> Chains {
    // The proxy must see the ClusterIP and the pod's own address.
    let accept = format!("-m mark --mark {} -j ACCEPT", input.marks.outbound);
    chains(
        &input.names,
        family,
        Table::Nat,
        [
            ("PREROUTING", vec![accept.clone()]),
            ("POSTROUTING", vec![accept]),
        ],
    )
}

/// A host's address as iptables prints it in a match.
fn host_net(ip: IpAddr) -> IpNet {
    ip.into()
}

fn chains<const N: usize>(
    names: &Names,
    family: Family,
    table: Table,
    chains: [(&str, Vec<String>); N],
) -> Chains {
    let chains = chains
        .into_iter()
        .map(|(hook, rules)| {
            (
                hook.to_owned(),
                Chain {
                    jumps: vec![0],
                    rules,
                },
            )
        })
        .collect::<BTreeMap<_, _>>();
    Chains {
        family,
        table,
        prefix: names.chain_prefix().to_owned(),
        chains,
    }
}

fn host_tunnels(input: &NodeInput, proxy: &Proxy, host: &mut BTreeSet<Item>) {
    let tunnel = &input.tunnel;
    for (name, end) in ends(input) {
        host.insert(Item::Link(match tunnel.kind {
            TunnelKind::Geneve => geneve(tunnel, name, end, proxy.ends.outer().proxy),
            TunnelKind::Veth => Link::Veth {
                name: name.to_owned(),
                peer: Some(peer(name)),
                mtu: tunnel.mtu,
            },
        }));
        host.insert(Item::Up(name.to_owned()));
        for family in input.families() {
            let network = end.network(family);
            host.insert(address(name, network.host(), network.prefix_len()));
        }
        host.insert(rp_filter(name, "2", "2"));
        host.extend(ipv6_device(input, name, LINK_LOCAL[0].into()));
    }
    // What the proxy dials from pods' addresses arrives here, where no route to them points. The
    // kernel takes the larger of this and `all`; 2 (loose) holds against any `all`.
    host.insert(rp_filter(&proxy.host_device, "2", &proxy.default_rp_filter));
    // What a pod sends is checked against the way back to it, which for TCP leads into the tunnel.
    for device in &input.pod_devices {
        host.insert(rp_filter(device, "2", &proxy.default_rp_filter));
    }
}

/// The tunnels, with the host's device of each.
fn ends(input: &NodeInput) -> [(&str, TunnelEnd); 2] {
    let NodeInput { names, tunnel, .. } = input;
    [
        (names.inbound(), tunnel.inbound),
        (names.outbound(), tunnel.outbound),
    ]
}

fn geneve(tunnel: &Tunnel, name: &str, end: TunnelEnd, remote: IpAddr) -> Link {
    Link::Geneve {
        name: name.to_owned(),
        vni: end.vni,
        remote,
        port: tunnel.port,
        mtu: tunnel.mtu,
    }
}

fn address(device: &str, ip: IpAddr, prefix_len: u8) -> Item {
    Item::Address(Address {
        device: device.to_owned(),
        address: IpNet::new(ip, prefix_len).unwrap_or_else(|_| ip.into()),
    })
}

/// What IPv6 needs of a tunnel's device: that it is on, whatever the namespace starts devices with,
/// and a link-local address to find its neighbour from (RFC 4861).
fn ipv6_device(input: &NodeInput, device: &str, link_local: IpAddr) -> Vec<Item> {
    if !input.families().contains(&Family::V6) {
        return Vec::new();
    }
    let setting = |name: &str, value: &str| setting(format!("ipv6/conf/{device}/{name}"), value);
    vec![
        setting("disable_ipv6", "0"),
        // No link-local address of the kernel's own.
        setting("addr_gen_mode", "1"),
        address(device, link_local, 64),
    ]
}

/// A setting that goes away with its device or namespace.
fn setting(path: String, value: &str) -> Item {
    Item::Sysctl(Sysctl {
        path,
        value: value.to_owned(),
        restore: value.to_owned(),
    })
}

fn rp_filter(device: &str, value: &str, restore: &str) -> Item {
    Item::Sysctl(Sysctl {
        path: format!("ipv4/conf/{device}/rp_filter"),
        value: value.to_owned(),
        restore: restore.to_owned(),
    })
}

fn proxy_side(input: &NodeInput, proxy: &Proxy, side: &mut BTreeSet<Item>) {
    for (device, end) in ends(input) {
        let name = &peer(device);
        if input.tunnel.kind == TunnelKind::Geneve {
            let remote = proxy.ends.outer().host;
            side.insert(Item::Link(geneve(&input.tunnel, name, end, remote)));
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
    side.insert(setting(range, PROXY_PORT_RANGE));
    for family in input.families() {
        let local = Target::Local {
            device: "lo".to_owned(),
        };
        side.insert(route(TABLE_LOCAL, family.everywhere(), local));
        side.extend(proxy_rules(family, &input.marks));
        side.insert(Item::Chains(proxy_mangle(family, input, proxy)));
    }
}

fn proxy_rules(family: Family, marks: &Marks) -> [Item; 2] {
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

fn proxy_mangle(family: Family, input: &NodeInput, proxy: &Proxy) -> Chains {
    let (names, ports, mark) = (&input.names, input.ports, input.marks.tproxy);
    let [from_inbound, from_outbound] = [names.inbound(), names.outbound()].map(peer);
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
