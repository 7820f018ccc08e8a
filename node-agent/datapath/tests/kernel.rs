//! The data path in a real kernel, in network namespaces, read back with other tools.
//!
//! Tests named `geneve_…` need a kernel with that driver: `tests/run-rings` runs them here if this
//! one has it, and in a guest with Debian's kernel if not.
#![allow(clippy::unwrap_used, reason = "this is a test")]

mod bed;

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use bed::converge::{BACKENDS, attached, converge, kernel};
use bed::{Bed, HOST, PODS, PROXY, dual, input_with, ipv6_of, ipv6_only, set_mtu};
use datapath::names::Names;
use datapath::{
    Datapath, FailureMode, Family, Hold, IptablesBackend, Kernel, MeshPod, NodeInput, Slot,
    TunnelKind, build, plan, with_holds,
};

#[tokio::test]
async fn the_kernel_holds_what_was_planned_and_a_second_plan_is_empty() {
    holds_what_was_planned(TunnelKind::Veth).await;
}

#[tokio::test]
#[ignore = "needs a kernel with geneve: ring 5"]
async fn geneve_the_kernel_holds_what_was_planned_and_a_second_plan_is_empty() {
    holds_what_was_planned(TunnelKind::Geneve).await;
}

async fn holds_what_was_planned(kind: TunnelKind) {
    for backend in BACKENDS {
        let bed = Bed::new(backend);
        attached(&bed, &input_with(kind, 2)).await;
        let rules = bed.run("host", "ip rule");
        for line in [
            "100:\tfrom all fwmark 0x200/0x200 goto 32766",
            "101:\tfrom all fwmark 0x100/0x100 lookup 101",
            "102:\tfrom all fwmark 0x40/0x40 lookup 102",
            "103:\tfrom all iif lo goto 105",
            "104:\tfrom all ipproto tcp lookup 100",
            "105:\tfrom all nop",
        ] {
            assert!(rules.contains(line), "{line} is not in\n{rules}");
        }
        let outbound = bed.run("host", "ip route show table 101");
        assert!(
            outbound.contains("default via 192.168.127.2 dev istioout"),
            "{outbound}"
        );
        assert!(outbound.contains("unreachable default"), "{outbound}");
        assert!(
            bed.run("host", "ip route show table 102")
                .contains("via 10.244.1.3 dev vproxy")
        );
        assert!(
            bed.run("host", "ip route show table 100")
                .contains("10.244.1.4 via 192.168.126.2 dev istioin")
        );
        let members = bed.run("host", "ipset list ztunnel-pods-ips");
        assert!(
            members.contains("10.244.1.4") && members.contains("10.244.1.5"),
            "{members}"
        );
        assert!(
            bed.save("host")
                .contains("-A PREROUTING -j ztunnel-PREROUTING")
        );
        assert!(
            bed.save("proxy")
                .contains("--on-port 15008 --on-ip 127.0.0.1 --tproxy-mark 0x400/0xfff")
        );
        assert!(
            bed.run("proxy", "ip rule")
                .contains("20000:\tfrom all fwmark 0x400/0xfff lookup 100")
        );
        assert_eq!(
            bed.run("proxy", "cat /proc/sys/net/ipv4/ip_local_port_range"),
            "16384\t29999\n"
        );
    }
}

/// Holds are made, read back, made anew and removed as everything else is; those of others stay.
#[tokio::test]
async fn holds_of_new_pods_are_part_of_the_data_path() {
    let bed = Bed::dual(IptablesBackend::Nft);
    bed.run(
        "host",
        "ip rule add from 10.244.1.8 iif va ipproto tcp priority 99 blackhole",
    );
    let input = dual(input_with(TunnelKind::Veth, 1));
    let kernel = attached(&bed, &input).await;
    let hold = |ip: IpAddr| Hold {
        device: "vb".to_owned(),
        ip,
    };
    let holds = [hold(PODS[1].into()), hold(ipv6_of(PODS[1]).into())].into();
    let held = with_holds(build(&input), &holds, &Names::default());
    converge(&kernel, &held, &held).await;
    let rules = || bed.run("host", "ip rule; ip -6 rule");
    let lines = [
        "99:\tfrom 10.244.1.5 iif vb ipproto tcp blackhole proto 90",
        "99:\tfrom fd00:244:1::5 iif vb ipproto tcp blackhole proto 90",
    ];
    assert!(
        lines.iter().all(|line| rules().contains(line)),
        "{}",
        rules()
    );
    bed.run(
        "host",
        "ip rule del from 10.244.1.5 iif vb ipproto tcp priority 99 blackhole",
    );
    converge(&kernel, &held, &held).await;
    assert!(
        lines.iter().all(|line| rules().contains(line)),
        "{}",
        rules()
    );
    converge(&kernel, &build(&input), &held).await;
    assert!(
        !lines.iter().any(|line| rules().contains(line)),
        "{}",
        rules()
    );
    assert!(rules().contains("from 10.244.1.8"), "{}", rules());
}

#[tokio::test]
async fn removal_leaves_the_host_byte_for_byte_as_before() {
    removal_leaves_nothing(TunnelKind::Veth).await;
}

#[tokio::test]
#[ignore = "needs a kernel with geneve: ring 5"]
async fn geneve_removal_leaves_the_host_byte_for_byte_as_before() {
    removal_leaves_nothing(TunnelKind::Geneve).await;
}

async fn removal_leaves_nothing(kind: TunnelKind) {
    for backend in BACKENDS {
        let bed = Bed::new(backend);
        // Reading a table loads it, which is no trace of ours.
        bed.save("host");
        bed.run("host", "iptables-nft -t mangle -S; iptables-nft -t nat -S");
        let before = bed.dump();
        let desired = build(&input_with(kind, 2));
        let kernel = attached(&bed, &input_with(kind, 2)).await;
        assert_ne!(before, bed.dump());
        converge(&kernel, &Datapath::default(), &desired).await;
        assert_eq!(before, bed.dump());
    }
}

#[tokio::test]
async fn whatever_is_deleted_by_hand_comes_back() {
    deleted_comes_back(TunnelKind::Veth).await;
}

#[tokio::test]
#[ignore = "needs a kernel with geneve: ring 5"]
async fn geneve_whatever_is_deleted_by_hand_comes_back() {
    deleted_comes_back(TunnelKind::Geneve).await;
}

async fn deleted_comes_back(kind: TunnelKind) {
    for backend in BACKENDS {
        let bed = Bed::new(backend);
        let desired = build(&input_with(kind, 2));
        let kernel = attached(&bed, &input_with(kind, 2)).await;
        let whole = bed.dump();
        let iptables = match backend {
            IptablesBackend::Nft => "iptables-nft",
            IptablesBackend::Legacy => "iptables-legacy",
        };
        for vandal in [
            "ip link delete istioin".to_owned(),
            "ip link set istioout down".to_owned(),
            "ip addr del 192.168.126.1/30 dev istioin".to_owned(),
            "ip rule del priority 101".to_owned(),
            "ip route del default table 102".to_owned(),
            "ip route flush table 100".to_owned(),
            "ipset del ztunnel-pods-ips 10.244.1.4".to_owned(),
            "ipset flush ztunnel-pods-ips-guard".to_owned(),
            "sysctl -qw net.ipv4.conf.vproxy.rp_filter=1".to_owned(),
            format!("{iptables} -t mangle -D PREROUTING -j ztunnel-PREROUTING"),
            format!("{iptables} -t mangle -F ztunnel-OUTPUT"),
            format!(
                "{iptables} -t nat -D POSTROUTING -j ztunnel-POSTROUTING
                 {iptables} -t nat -F ztunnel-POSTROUTING
                 {iptables} -t nat -X ztunnel-POSTROUTING"
            ),
            format!("{iptables} -t nat -I PREROUTING 1 -j RETURN"),
        ] {
            bed.run("host", &vandal);
            converge(&kernel, &desired, &desired).await;
        }
        bed.run(
            "host",
            &format!("{iptables} -t nat -D PREROUTING -j RETURN"),
        );
        assert_eq!(sorted(&whole), sorted(&bed.dump()));
    }
}

#[tokio::test]
async fn an_address_that_the_kernel_gives_a_device_of_ours_goes_again() {
    let bed = Bed::dual(IptablesBackend::Nft);
    let input = dual(input_with(TunnelKind::Veth, 2));
    let desired = build(&input);
    let kernel = attached(&bed, &input).await;
    let addresses = || bed.run("host", "ip -o -6 addr show dev istioin");
    let before = addresses();
    bed.run("host", "sysctl -qw net.ipv6.conf.istioin.addr_gen_mode=0");
    assert_ne!(addresses(), before);
    converge(&kernel, &desired, &desired).await;
    assert_eq!(addresses(), before);
}

fn sorted(text: &str) -> Vec<String> {
    // The order of routes and devices is that of their making, and a new pair has a new index.
    let mut lines: Vec<String> = text
        .lines()
        .map(|line| line.trim().replace("@if", "@"))
        .collect();
    lines.retain(|line| {
        !line.contains("istioin") && !line.contains("istioout") || line.starts_with("-A")
    });
    lines.sort();
    lines
}

#[tokio::test]
async fn without_a_proxy_closed_leaves_only_unreachable_routes() {
    closed_without_a_proxy(TunnelKind::Veth).await;
}

#[tokio::test]
#[ignore = "needs a kernel with geneve: ring 5"]
async fn geneve_without_a_proxy_closed_leaves_only_unreachable_routes() {
    closed_without_a_proxy(TunnelKind::Geneve).await;
}

async fn closed_without_a_proxy(kind: TunnelKind) {
    let bed = Bed::new(IptablesBackend::Nft);
    let mut gone = input_with(kind, 2);
    let kernel = attached(&bed, &gone).await;
    gone.proxies.first = None;
    converge(&kernel, &build(&gone), &build(&gone)).await;
    for (table, expected) in [
        ("101", "unreachable default"),
        ("102", "unreachable default"),
        ("100", "unreachable 10.244.1.4"),
    ] {
        let routes = bed.run("host", &format!("ip route show table {table}"));
        assert!(
            routes.contains(expected) && !routes.contains(" via "),
            "{routes}"
        );
    }
    assert!(
        bed.run("host", "ipset list ztunnel-pods-ips")
            .contains("10.244.1.4")
    );
    // The host itself still reaches its pods: kubelet's probes go on.
    let way = bed.run("host", "ip route get 10.244.1.4 ipproto tcp");
    assert!(way.contains(&format!("src {HOST}")), "{way}");
}

#[tokio::test]
async fn without_a_proxy_open_lets_traffic_go_directly() {
    open_without_a_proxy(TunnelKind::Veth).await;
}

#[tokio::test]
#[ignore = "needs a kernel with geneve: ring 5"]
async fn geneve_without_a_proxy_open_lets_traffic_go_directly() {
    open_without_a_proxy(TunnelKind::Geneve).await;
}

async fn open_without_a_proxy(kind: TunnelKind) {
    let bed = Bed::new(IptablesBackend::Nft);
    let mut gone = input_with(kind, 2);
    let kernel = attached(&bed, &gone).await;
    gone.proxies.first = None;
    gone.failure_mode = FailureMode::Open;
    converge(&kernel, &build(&gone), &build(&gone)).await;
    assert!(
        !bed.run("host", "ipset list ztunnel-pods-ips")
            .contains("10.244.")
    );
    // An empty table is one that the kernel does not know.
    assert!(
        !bed.run("host", "ip route show table all")
            .contains("table 100")
    );
}

#[tokio::test]
async fn a_proxys_namespace_is_found_from_both_sides() {
    let bed = Bed::new(IptablesBackend::Nft);
    let found = datapath::attachment::find(
        &bed.netns("host"),
        &bed.netns("proxy"),
        "/proc/sys/net".as_ref(),
    )
    .await
    .unwrap();
    assert_eq!(
        (found.device.as_str(), found.host_device.as_str()),
        ("eth0", "vproxy")
    );
    let ends = input_with(TunnelKind::Veth, 0).proxies.first.unwrap().ends;
    assert_eq!(found.ends, ends);
}

/// The proxy has its default route by `eth1`, whose other end is in the namespace "a": that end is not the host's.
async fn is_not_found_at_eth1(bed: &Bed) {
    bed.run(
        "proxy",
        "ip link set eth1 up
         ip addr del 10.244.1.3/32 dev eth0
         ip addr add 10.244.1.3/32 dev eth1
         ip route replace default dev eth1",
    );
    let found = datapath::attachment::find(
        &bed.netns("host"),
        &bed.netns("proxy"),
        "/proc/sys/net".as_ref(),
    )
    .await;
    assert!(
        matches!(&found, Err(datapath::attachment::AttachError::NoHostEnd(device)) if device == "eth1"),
        "{found:?}"
    );
}

/// Of a pod that just goes, the host's way to its address is that out of the node: rules for that device would
/// send the node's own connections to the proxy.
#[tokio::test]
async fn a_proxy_is_not_found_at_a_device_that_is_not_the_other_end_of_its_own() {
    let bed = Bed::new(IptablesBackend::Nft);
    let proxy = bed.name("proxy");
    // No device of the host has this index.
    bed.run(
        "a",
        &format!("ip link add out index 4000 up type veth peer name eth1 netns {proxy}"),
    );
    is_not_found_at_eth1(&bed).await;
}

/// Devices of pods have the same few indices, and so may devices of namespaces that are not the host's.
#[tokio::test]
async fn a_proxy_is_not_found_at_another_pods_device_of_the_same_index() {
    let bed = Bed::new(IptablesBackend::Nft);
    // The host's device of pod "b" has the index that the proxy's other end has in its namespace.
    for (namespace, other) in [("a", "proxy"), ("host", "b")] {
        let other = bed.name(other);
        bed.run(
            namespace,
            &format!(
                "ip link add out index 4000 up type veth peer name eth1 index 4001 netns {other}"
            ),
        );
    }
    is_not_found_at_eth1(&bed).await;
}

#[tokio::test]
async fn geneve_is_made_where_the_kernel_has_it_and_named_where_not() {
    let bed = Bed::new(IptablesBackend::Nft);
    let (facts, _) = datapath::facts::find(
        &bed.netns("host"),
        &Names::default(),
        datapath::facts::Earlier::default(),
    )
    .await
    .unwrap();
    let geneve = input_with(TunnelKind::Geneve, 1);
    let mut kernel = kernel(&bed);
    kernel.attach(Slot::First, bed.netns("proxy")).unwrap();
    let desired = build(&geneve);
    if facts.geneve {
        converge(&kernel, &desired, &desired).await;
        assert!(
            bed.run("host", "ip -d link show istioin")
                .contains("geneve id 1000 remote 10.244.1.3")
        );
    } else {
        let observed = kernel.observe(&desired).await.unwrap();
        let error = kernel.apply(&plan(&desired, &observed)).await.unwrap_err();
        let message = error.cause.to_string();
        assert!(
            message.contains("modprobe geneve") && message.contains("spec.tunnel.type: Veth"),
            "{message}"
        );
    }
}

#[tokio::test]
#[ignore = "needs a kernel with geneve: ring 5"]
async fn geneve_devices_are_those_of_the_configuration_on_both_ends() {
    let bed = Bed::new(IptablesBackend::Nft);
    let mut input = input_with(TunnelKind::Geneve, 1);
    let kernel = attached(&bed, &input).await;
    assert_geneve(&bed, &input);

    let before = build(&input);
    input.tunnel.port = 6082;
    set_mtu(&mut input, 1400);
    input.tunnel.inbound.vni = 2000;
    input.tunnel.outbound.vni = 2001;
    converge(&kernel, &build(&input), &before).await;
    assert_geneve(&bed, &input);
}

/// Checks what iproute2 says of the four devices.
fn assert_geneve(bed: &Bed, input: &NodeInput) {
    let tunnel = &input.tunnel;
    let (proxy, host) = (PROXY.to_string(), HOST.to_owned());
    let mtu = input.proxies.first.as_ref().unwrap().mtu;
    for (netns, device, vni, remote) in [
        ("host", "istioin", tunnel.inbound.vni, &proxy),
        ("host", "istioout", tunnel.outbound.vni, &proxy),
        ("proxy", "pistioin", tunnel.inbound.vni, &host),
        ("proxy", "pistioout", tunnel.outbound.vni, &host),
    ] {
        let shown = bed.run(netns, &format!("ip -d link show {device}"));
        for words in [
            format!("mtu {mtu} "),
            format!("geneve id {vni} remote {remote} "),
            format!("dstport {} ", tunnel.port),
            "UP".to_owned(),
        ] {
            assert!(shown.contains(&words), "{words} is not in\n{shown}");
        }
    }
}

#[tokio::test]
#[ignore = "needs a kernel with geneve: ring 5"]
async fn geneve_becomes_veth_and_geneve_again() {
    let bed = Bed::new(IptablesBackend::Nft);
    let [geneve, veth] =
        [TunnelKind::Geneve, TunnelKind::Veth].map(|kind| build(&input_with(kind, 2)));
    let kernel = attached(&bed, &input_with(TunnelKind::Geneve, 2)).await;
    converge(&kernel, &veth, &geneve).await;
    let shown = bed.run("host", "ip -d link show istioin");
    assert!(shown.contains(" veth "), "{shown}");
    converge(&kernel, &geneve, &veth).await;
    assert_geneve(&bed, &input_with(TunnelKind::Geneve, 2));
}

#[tokio::test]
#[ignore = "needs a kernel with geneve: ring 5"]
async fn geneve_ends_deleted_in_the_proxys_namespace_come_back() {
    let bed = Bed::new(IptablesBackend::Nft);
    let input = input_with(TunnelKind::Geneve, 1);
    let kernel = attached(&bed, &input).await;
    for vandal in [
        "ip link delete pistioin",
        "ip link set pistioout down",
        "ip link set pistioout mtu 1300",
    ] {
        bed.run("proxy", vandal);
        converge(&kernel, &build(&input), &build(&input)).await;
        assert_geneve(&bed, &input);
    }
}

#[tokio::test]
async fn connections_from_and_to_mesh_pods_meet_the_proxy() {
    connections_meet_the_proxy(TunnelKind::Veth).await;
}

#[tokio::test]
#[ignore = "needs a kernel with geneve: ring 5"]
async fn geneve_connections_from_and_to_mesh_pods_meet_the_proxy() {
    connections_meet_the_proxy(TunnelKind::Geneve).await;
}

async fn connections_meet_the_proxy(kind: TunnelKind) {
    for backend in BACKENDS {
        let bed = Bed::dual(backend);
        attached(&bed, &dual(input_with(kind, 1))).await;
        for family in Family::ALL {
            connections_of_a_family_meet_the_proxy(&bed, family);
        }
    }
}

#[tokio::test]
async fn connections_of_pods_with_ipv6_only_meet_the_proxy() {
    ipv6_only_connections_meet_the_proxy(TunnelKind::Veth).await;
}

#[tokio::test]
#[ignore = "needs a kernel with geneve: ring 5"]
async fn geneve_over_ipv6_connections_of_pods_with_ipv6_only_meet_the_proxy() {
    ipv6_only_connections_meet_the_proxy(TunnelKind::Geneve).await;
}

async fn ipv6_only_connections_meet_the_proxy(kind: TunnelKind) {
    for backend in BACKENDS {
        let bed = Bed::dual(backend);
        let mut input = ipv6_only(input_with(kind, 1));
        if kind == TunnelKind::Geneve {
            // The outer header of IPv6 is 20 bytes longer.
            set_mtu(&mut input, 1430);
        }
        attached(&bed, &input).await;
        if kind == TunnelKind::Geneve {
            let shown = bed.run("host", "ip -d link show istioin");
            assert!(
                shown.contains(&format!("remote {}", ipv6_of(PROXY))),
                "{shown}"
            );
        }
        connections_of_a_family_meet_the_proxy(&bed, Family::V6);
    }
}

fn connections_of_a_family_meet_the_proxy(bed: &Bed, family: Family) {
    let [mesh, outside] = PODS.map(|ip| match family {
        Family::V4 => IpAddr::V4(ip),
        Family::V6 => ipv6_of(ip).into(),
    });
    // The proxy's answers come from there, and the host takes none from where it has no route to.
    let elsewhere: IpAddr = match family {
        Family::V4 => Ipv4Addr::new(203, 0, 113, 7).into(),
        Family::V6 => "2001:db8::7".parse().unwrap(),
    };
    bed.run(
        "host",
        &format!("ip route add {elsewhere} via {outside} dev vb onlink"),
    );
    for (from, source, to, port, tunnel, listening) in [
        ("a", mesh, elsewhere, 80, "istioout", 15001),
        ("b", outside, mesh, 80, "istioin", 15006),
        ("b", outside, mesh, 15008, "istioin", 15008),
    ] {
        let listener = bed.listen_transparently("proxy", family, listening);
        let to = SocketAddr::new(to, port);
        let sent = bed.sent_over(tunnel);
        let mut client = bed.connect(from, to);
        let (mut server, peer) = listener.accept().unwrap();
        assert_eq!((peer.ip(), server.local_addr().unwrap()), (source, to));
        assert!(bed.sent_over(tunnel) > sent, "nothing went over {tunnel}");
        server.write_all(b"met").unwrap();
        drop(server);
        let mut heard = String::new();
        client.read_to_string(&mut heard).unwrap();
        assert_eq!(heard, "met");
    }
}

#[tokio::test]
async fn a_node_full_of_pods_is_read_back_whole() {
    for backend in BACKENDS {
        let bed = Bed::dual(backend);
        let mut input = dual(input_with(TunnelKind::Veth, 0));
        let ips = (0..250u8).map(|last| Ipv4Addr::new(10, 244, 2, last));
        input.pods = ips
            .flat_map(|ip| [ip.into(), ipv6_of(ip).into()])
            .map(|ip| MeshPod { ip })
            .collect();
        attached(&bed, &input).await;
        for set in [
            "ztunnel-pods-ips",
            "ztunnel-pods-ips6",
            "ztunnel-pods-ips-guard",
            "ztunnel-pods-ips-guard6",
        ] {
            let listed = bed.run("host", &format!("ipset list -t {set}"));
            assert!(listed.contains("Number of entries: 250"), "{listed}");
        }
    }
}

#[tokio::test]
async fn a_glance_passes_over_chains_until_they_are_looked_at_again() {
    for backend in BACKENDS {
        let bed = Bed::new(backend);
        let desired = build(&input_with(TunnelKind::Veth, 1));
        let kernel = attached(&bed, &input_with(TunnelKind::Veth, 1)).await;
        let iptables = match backend {
            IptablesBackend::Nft => "iptables-nft",
            IptablesBackend::Legacy => "iptables-legacy",
        };
        bed.run("host", &format!("{iptables} -t nat -F ztunnel-PREROUTING"));
        let glanced = kernel.glance(&desired).await.unwrap();
        assert!(plan(&desired, &glanced).is_empty());
        let observed = kernel.observe(&desired).await.unwrap();
        let repair = plan(&desired, &observed);
        assert_eq!(repair.steps.len(), 1, "{repair}");
        kernel.apply(&repair).await.unwrap();
        // What was written is read again, also at a glance.
        let glanced = kernel.glance(&desired).await.unwrap();
        assert!(plan(&desired, &glanced).is_empty());
        assert!(bed.save("host").contains("-A ztunnel-PREROUTING -m mark"));
    }
}
