//! From what is known about a node to what its kernel should hold. Pure.
//!
//! Fails closed: the tables of mesh traffic end in an unreachable route, so that what is marked for
//! the proxy never falls through to the main table when a device, a route or the proxy is missing.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

use crate::datapath::{
    Action, Address, Chain, Chains, Datapath, Item, Link, Route, Rule, Selector, Sysctl, Table,
    Target,
};
use crate::input::{FailureMode, Marks, NodeInput, Proxy, Tunnel, TunnelEnd, TunnelKind};
use crate::names::{
    ISTIOIN, ISTIOOUT, METRIC_LAST, PISTIOIN, PISTIOOUT, PROXY_PORT_RANGE, SET, TABLE_INBOUND,
    TABLE_LOCAL, TABLE_OUTBOUND, TABLE_RETURN, priority,
};

/// What the kernel should hold.
#[must_use]
pub fn build(input: &NodeInput) -> Datapath {
    let mut datapath = Datapath::default();
    host(input, &mut datapath.host);
    if let Some(proxy) = &input.proxy {
        host_tunnels(&input.tunnel, proxy, &mut datapath.host);
        proxy_side(input, proxy, &mut datapath.proxy);
    }
    datapath
}

fn host(input: &NodeInput, host: &mut BTreeSet<Item>) {
    let proxy = input.proxy.as_ref();
    let serving = proxy.filter(|proxy| proxy.serving);
    host.extend(host_routes(input, serving));
    host.extend(host_rules(&input.marks));
    host.insert(Item::Set(SET.to_owned()));
    host.insert(Item::Chains(host_mangle(&input.marks, proxy)));
    host.insert(Item::Chains(host_nat(&input.marks)));
    if serving.is_some() || input.failure_mode == FailureMode::Closed {
        host.extend(input.pods.iter().map(|pod| Item::Member(pod.ip)));
    }
}

fn host_routes(input: &NodeInput, serving: Option<&Proxy>) -> Vec<Item> {
    let default = Ipv4Net::default();
    let mut routes = vec![
        unreachable(TABLE_OUTBOUND, default),
        unreachable(TABLE_RETURN, default),
    ];
    if serving.is_some() || input.failure_mode == FailureMode::Closed {
        routes.extend(
            input
                .pods
                .iter()
                .map(|pod| unreachable(TABLE_INBOUND, pod.ip.into())),
        );
    }
    let via = |gateway, device: &str, onlink| Target::Via {
        gateway,
        device: device.to_owned(),
        onlink,
    };
    // A proxy that died answers what it had proxied with RST, by the kernel of its namespace.
    if let Some(Proxy {
        ip, host_device, ..
    }) = &input.proxy
    {
        routes.push(route(TABLE_RETURN, default, via(*ip, host_device, true)));
    }
    let Some(proxy) = serving else { return routes };
    let outbound = via(input.tunnel.outbound.network.proxy(), ISTIOOUT, false);
    let inbound = via(input.tunnel.inbound.network.proxy(), ISTIOIN, false);
    let to_proxy = Target::Link {
        device: proxy.host_device.clone(),
    };
    routes.push(route(TABLE_OUTBOUND, default, outbound));
    routes.push(route(TABLE_OUTBOUND, proxy.ip.into(), to_proxy));
    routes.extend(
        input
            .pods
            .iter()
            .map(|pod| route(TABLE_INBOUND, pod.ip.into(), inbound.clone())),
    );
    routes
}

fn route(table: u32, destination: Ipv4Net, target: Target) -> Item {
    Item::Route(Route {
        table,
        destination,
        metric: 0,
        target,
    })
}

fn unreachable(table: u32, destination: Ipv4Net) -> Item {
    Item::Route(Route {
        table,
        destination,
        metric: METRIC_LAST,
        target: Target::Unreachable,
    })
}

fn host_rules(marks: &Marks) -> Vec<Item> {
    use Action::{Goto, Lookup, Nop};
    [
        (
            priority::SKIP,
            Selector::Mark(marks.skip),
            Goto(priority::MAIN),
        ),
        (
            priority::OUTBOUND,
            Selector::Mark(marks.outbound),
            Lookup(TABLE_OUTBOUND),
        ),
        (
            priority::RETURN,
            Selector::Mark(marks.return_),
            Lookup(TABLE_RETURN),
        ),
        // The host reaches its pods directly: kubelet's probes must work whatever the proxy does.
        // Reverse-path lookups count as sent here, so pods' devices keep their own rp_filter.
        (priority::HOST, Selector::SentHere, Goto(priority::HOST_END)),
        // Only TCP: ping and UDP to mesh pods keep their way.
        (priority::INBOUND, Selector::Tcp, Lookup(TABLE_INBOUND)),
        (priority::HOST_END, Selector::All, Nop),
    ]
    .map(|(priority, selector, action)| {
        Item::Rule(Rule {
            priority,
            selector,
            action,
        })
    })
    .into()
}

fn host_mangle(marks: &Marks, proxy: Option<&Proxy>) -> Chains {
    let Marks {
        outbound,
        skip,
        proxied,
        own,
        return_,
        ..
    } = marks;
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
        ip, host_device, ..
    }) = proxy
    {
        prerouting.push(format!(
            "! -s {ip}/32 -i {host_device} -j MARK --set-xmark {proxied}"
        ));
        prerouting.push(format!("-m mark --mark {skip} -j RETURN"));
        prerouting.push(format!("-i {host_device} -j MARK --set-xmark {own}"));
        for device in [ISTIOIN, ISTIOOUT] {
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
        "-p tcp -m set --match-set {SET} src -j MARK --set-xmark {outbound}"
    ));
    chains(
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

fn host_nat(marks: &Marks) -> Chains {
    // The proxy must see the ClusterIP and the pod's own address.
    let accept = format!("-m mark --mark {} -j ACCEPT", marks.outbound);
    chains(
        Table::Nat,
        [
            ("PREROUTING", vec![accept.clone()]),
            ("POSTROUTING", vec![accept]),
        ],
    )
}

fn chains<const N: usize>(table: Table, chains: [(&str, Vec<String>); N]) -> Chains {
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
    Chains { table, chains }
}

fn host_tunnels(tunnel: &Tunnel, proxy: &Proxy, host: &mut BTreeSet<Item>) {
    for (name, peer, end) in ends(tunnel) {
        host.insert(Item::Link(match tunnel.kind {
            TunnelKind::Geneve => geneve(tunnel, name, end, proxy.ip),
            TunnelKind::Veth => Link::Veth {
                name: name.to_owned(),
                peer: Some(peer.to_owned()),
                mtu: tunnel.mtu,
            },
        }));
        host.extend(up(name, end.network.host(), end.network.prefix_len()));
        host.insert(rp_filter(name, "2", "2"));
    }
    // What the proxy dials from pods' addresses arrives here, where no route to them points. The
    // kernel takes the larger of this and `all`; 2 (loose) holds against any `all`.
    host.insert(rp_filter(&proxy.host_device, "2", &proxy.default_rp_filter));
}

fn ends(tunnel: &Tunnel) -> [(&'static str, &'static str, TunnelEnd); 2] {
    [
        (ISTIOIN, PISTIOIN, tunnel.inbound),
        (ISTIOOUT, PISTIOOUT, tunnel.outbound),
    ]
}

fn geneve(tunnel: &Tunnel, name: &str, end: TunnelEnd, remote: Ipv4Addr) -> Link {
    Link::Geneve {
        name: name.to_owned(),
        vni: end.vni,
        remote,
        port: tunnel.port,
        mtu: tunnel.mtu,
    }
}

fn up(device: &str, ip: Ipv4Addr, prefix_len: u8) -> [Item; 2] {
    let address = Ipv4Net::new(ip, prefix_len).unwrap_or_else(|_| ip.into());
    [
        Item::Up(device.to_owned()),
        Item::Address(Address {
            device: device.to_owned(),
            address,
        }),
    ]
}

fn rp_filter(device: &str, value: &str, restore: &str) -> Item {
    Item::Sysctl(Sysctl {
        path: format!("ipv4/conf/{device}/rp_filter"),
        value: value.to_owned(),
        restore: restore.to_owned(),
    })
}

fn proxy_side(input: &NodeInput, proxy: &Proxy, side: &mut BTreeSet<Item>) {
    for (_, name, end) in ends(&input.tunnel) {
        if input.tunnel.kind == TunnelKind::Geneve {
            side.insert(Item::Link(geneve(&input.tunnel, name, end, proxy.host_ip)));
        }
        side.extend(up(name, end.network.proxy(), end.network.prefix_len()));
        side.insert(rp_filter(name, "0", "0"));
    }
    // The namespace is the proxy's alone.
    side.insert(rp_filter(&proxy.device, "0", &proxy.default_rp_filter));
    side.insert(rp_filter("all", "0", "0"));
    side.insert(Item::Sysctl(Sysctl {
        path: "ipv4/ip_local_port_range".to_owned(),
        value: PROXY_PORT_RANGE.to_owned(),
        restore: PROXY_PORT_RANGE.to_owned(),
    }));
    let local = Target::Local {
        device: "lo".to_owned(),
    };
    side.insert(route(TABLE_LOCAL, Ipv4Net::default(), local));
    for (priority, mark) in [
        (priority::TPROXY, input.marks.tproxy),
        (priority::PROXY_RETURN, input.marks.proxy_return),
    ] {
        let (selector, action) = (Selector::Mark(mark), Action::Lookup(TABLE_LOCAL));
        side.insert(Item::Rule(Rule {
            priority,
            selector,
            action,
        }));
    }
    side.insert(Item::Chains(proxy_mangle(input, proxy)));
}

fn proxy_mangle(input: &NodeInput, proxy: &Proxy) -> Chains {
    let (ports, mark) = (input.ports, input.marks.tproxy);
    let tproxy =
        |port: u16| format!("-j TPROXY --on-port {port} --on-ip 127.0.0.1 --tproxy-mark {mark}");
    let answer = |protocol: &str| {
        format!(
            "! -d {}/32 -i {} -p {protocol} -j MARK --set-xmark {}",
            proxy.ip, proxy.device, input.marks.proxy_return
        )
    };
    let prerouting = vec![
        format!(
            "-i {PISTIOIN} -p tcp -m tcp --dport {0} {1}",
            ports.inbound,
            tproxy(ports.inbound)
        ),
        format!("-i {PISTIOIN} -p tcp {}", tproxy(ports.inbound_plaintext)),
        format!("-i {PISTIOOUT} -p tcp {}", tproxy(ports.outbound)),
        answer("tcp"),
        // Errors about what was dialled from a pod's address (RFC 792; path MTU, refusals).
        answer("icmp"),
    ];
    chains(Table::Mangle, [("PREROUTING", prerouting)])
}
