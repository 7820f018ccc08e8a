//! The data path in a real kernel, in network namespaces, read back with other tools.
#![allow(clippy::unwrap_used, reason = "this is a test")]

mod bed;

use std::path::PathBuf;

use bed::{Bed, HOST, PROXY, input};
use datapath::{
    Datapath, FailureMode, IptablesBackend, Kernel, LinuxKernel, NodeInput, TunnelKind, build, plan,
};

fn kernel(bed: &Bed) -> LinuxKernel {
    LinuxKernel::in_namespace(
        bed.netns("host"),
        bed.backend,
        PathBuf::from("/proc/sys/net"),
    )
    .unwrap()
}

/// Brings the kernel to the desired state and checks that nothing is left to do.
async fn converge(kernel: &LinuxKernel, desired: &Datapath, interest: &Datapath) {
    let observed = kernel.observe(interest).await.unwrap();
    let steps = plan(desired, &observed);
    kernel.apply(&steps).await.unwrap();
    let observed = kernel.observe(interest).await.unwrap();
    let again = plan(desired, &observed);
    assert!(
        again.is_empty(),
        "after\n{steps}there is still to do\n{again}"
    );
}

async fn attached(bed: &Bed, input: &NodeInput) -> LinuxKernel {
    let mut kernel = kernel(bed);
    kernel.attach(bed.netns("proxy")).unwrap();
    let desired = build(input);
    converge(&kernel, &desired, &desired).await;
    kernel
}

const BACKENDS: [IptablesBackend; 2] = [IptablesBackend::Nft, IptablesBackend::Legacy];

#[tokio::test]
async fn the_kernel_holds_what_was_planned_and_a_second_plan_is_empty() {
    for backend in BACKENDS {
        let bed = Bed::new(backend);
        attached(&bed, &input(2)).await;
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

#[tokio::test]
async fn removal_leaves_the_host_byte_for_byte_as_before() {
    for backend in BACKENDS {
        let bed = Bed::new(backend);
        // Reading a table loads it, which is no trace of ours.
        bed.save("host");
        bed.run("host", "iptables-nft -t mangle -S; iptables-nft -t nat -S");
        let before = bed.dump();
        let desired = build(&input(2));
        let kernel = attached(&bed, &input(2)).await;
        assert_ne!(before, bed.dump());
        converge(&kernel, &Datapath::default(), &desired).await;
        assert_eq!(before, bed.dump());
    }
}

#[tokio::test]
async fn whatever_is_deleted_by_hand_comes_back() {
    for backend in BACKENDS {
        let bed = Bed::new(backend);
        let desired = build(&input(2));
        let kernel = attached(&bed, &input(2)).await;
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
            "sysctl -qw net.ipv4.conf.vproxy.rp_filter=1".to_owned(),
            format!("{iptables} -t mangle -D PREROUTING -j ztunnel-PREROUTING"),
            format!("{iptables} -t mangle -F ztunnel-OUTPUT"),
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
    let bed = Bed::new(IptablesBackend::Nft);
    let mut gone = input(2);
    let kernel = attached(&bed, &gone).await;
    gone.proxy = None;
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
    let bed = Bed::new(IptablesBackend::Nft);
    let mut gone = input(2);
    let kernel = attached(&bed, &gone).await;
    gone.proxy = None;
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
        (found.ip, found.device.as_str(), found.host_device.as_str()),
        (PROXY, "eth0", "vproxy")
    );
    assert_eq!(found.host_ip.to_string(), HOST);
}

#[tokio::test]
async fn geneve_is_made_where_the_kernel_has_it_and_named_where_not() {
    let bed = Bed::new(IptablesBackend::Nft);
    let facts = datapath::facts::find(&bed.netns("host")).await.unwrap();
    let mut geneve = input(1);
    geneve.tunnel.kind = TunnelKind::Geneve;
    geneve.tunnel.mtu = 1450;
    let mut kernel = kernel(&bed);
    kernel.attach(bed.netns("proxy")).unwrap();
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
