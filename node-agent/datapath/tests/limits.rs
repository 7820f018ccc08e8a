//! What stands in the way on a real host, in network namespaces: found as other programs made it.
#![allow(clippy::unwrap_used, reason = "this is a test")]

mod bed;

use std::net::UdpSocket;

use bed::converge::{attached, converge, kernel};
use bed::{Bed, PROXY, input_with};
use datapath::attachment::{self, AttachError};
use datapath::facts::lack::{self, Lack};
use datapath::facts::{self, Earlier, Interest, Obstacle, Others};
use datapath::names::Names;
use datapath::{Datapath, IptablesBackend, Kernel, NodeInput, Slot, TunnelKind, build, plan};

const BACKENDS: [(IptablesBackend, &str); 2] = [
    (IptablesBackend::Nft, "nft"),
    (IptablesBackend::Legacy, "legacy"),
];

async fn others(bed: &Bed) -> (facts::Facts, Others) {
    facts::find(&bed.netns("host"), &Names::default(), Earlier::default())
        .await
        .unwrap()
}

/// What stands in the way of what is built from `input`.
async fn obstacles(bed: &Bed, input: &NodeInput) -> Vec<Obstacle> {
    obstacles_in(bed, input, &others(bed).await).await
}

async fn obstacles_in(
    bed: &Bed,
    input: &NodeInput,
    (facts, others): &(facts::Facts, Others),
) -> Vec<Obstacle> {
    let interest = Interest {
        marks: &input.marks,
        desired: &build(input),
        device: Some("vproxy"),
        ipv6: false,
    };
    let root = "/proc/sys/net".as_ref();
    facts::obstacles(&bed.netns("host"), root, (facts, others), interest)
        .await
        .unwrap()
}

/// The only one, in words.
fn only(found: &[Obstacle]) -> String {
    assert_eq!(found.len(), 1, "{found:?}");
    found[0].to_string()
}

#[tokio::test]
async fn nothing_stands_in_the_way_on_a_plain_host() {
    for (backend, program) in BACKENDS {
        let bed = Bed::new(backend);
        // Marks of kube-proxy's, of Calico's and of a chain that looks at nothing of ours.
        bed.run(
            "host",
            &format!(
                "iptables-{program} -t nat -A POSTROUTING -m mark --mark 0x4000/0x4000 -j MASQUERADE
                 iptables-{program} -t mangle -A FORWARD -j MARK --set-xmark 0x40000/0x40000
                 ip rule add priority 99 fwmark 0x80000/0xf0000 lookup main"
            ),
        );
        for kind in [TunnelKind::Veth, TunnelKind::Geneve] {
            assert_eq!(obstacles(&bed, &input_with(kind, 1)).await, []);
        }
    }
}

#[tokio::test]
async fn who_has_the_port_of_geneve_is_named() {
    let bed = Bed::new(IptablesBackend::Nft);
    let geneve = input_with(TunnelKind::Geneve, 1);
    let socket = bed.netns("host").run(bind).unwrap();
    let found = only(&obstacles(&bed, &geneve).await);
    assert!(
        found.contains("a UDP socket of another program (0.0.0.0:6081)"),
        "{found}"
    );
    drop(socket);
    bed.run(
        "host",
        "ip link add vx type vxlan id 5 dstport 6081 local 10.244.1.1
         ip link set vx up",
    );
    let found = only(&obstacles(&bed, &geneve).await);
    assert!(
        found.contains("the vxlan device vx") && found.contains("spec.tunnel.port"),
        "{found}"
    );
    assert_eq!(
        obstacles(&bed, &input_with(TunnelKind::Veth, 1)).await,
        [],
        "a veth pair has no port"
    );
}

#[tokio::test]
#[ignore = "needs a kernel with geneve: ring 5"]
async fn geneve_devices_that_keep_ours_from_being_made_are_named() {
    for device in [
        "type geneve external dstport 6081".to_owned(),
        format!("type geneve id 1001 remote {PROXY} dstport 6081"),
    ] {
        let bed = Bed::new(IptablesBackend::Nft);
        bed.run(
            "host",
            &format!("ip link add theirs {device}; ip link set theirs up"),
        );
        let geneve = input_with(TunnelKind::Geneve, 1);
        let found = only(&obstacles(&bed, &geneve).await);
        assert!(found.contains("the geneve device theirs"), "{found}");
        assert_eq!(refused(&bed, &geneve).await, Some(Lack::GenevePort));
    }
}

#[tokio::test]
#[ignore = "needs a kernel with geneve: ring 5"]
async fn geneve_devices_of_other_numbers_share_the_port() {
    let bed = Bed::new(IptablesBackend::Nft);
    bed.run(
        "host",
        &format!(
            "ip link add theirs type geneve id 7 remote {PROXY} dstport 6081
             ip link set theirs up"
        ),
    );
    let geneve = input_with(TunnelKind::Geneve, 1);
    assert_eq!(obstacles(&bed, &geneve).await, []);
    attached(&bed, &geneve).await;
    assert_eq!(
        obstacles(&bed, &geneve).await,
        [],
        "ours have the port, too"
    );
    bed.run("host", "ip link show theirs");
}

#[tokio::test]
#[ignore = "needs a kernel with geneve: ring 5"]
async fn geneve_devices_do_not_come_up_on_a_port_in_use() {
    let bed = Bed::new(IptablesBackend::Nft);
    let socket = bed.netns("host").run(bind).unwrap();
    let geneve = input_with(TunnelKind::Geneve, 1);
    assert_eq!(refused(&bed, &geneve).await, Some(Lack::GenevePort));
    drop(socket);
    let kernel = attached(&bed, &geneve).await;
    let desired = build(&geneve);
    converge(&kernel, &Datapath::default(), &desired).await;
}

/// Another user of geneve's port.
fn bind() -> UdpSocket {
    UdpSocket::bind("0.0.0.0:6081").unwrap()
}

/// What the kernel lacks for the data path, as it says itself.
async fn refused(bed: &Bed, input: &NodeInput) -> Option<Lack> {
    let mut kernel = kernel(bed);
    kernel.attach(Slot::First, bed.netns("proxy")).unwrap();
    let desired = build(input);
    let observed = kernel.observe(&desired).await.unwrap();
    let error = kernel.apply(&plan(&desired, &observed)).await.unwrap_err();
    lack::of_kernel(&error.cause, Some(error.step.change.item()))
}

#[tokio::test]
async fn uses_of_our_marks_are_found_in_every_table_of_both_backends() {
    for (_, program) in BACKENDS {
        let bed = Bed::new(IptablesBackend::Nft);
        bed.run(
            "host",
            &format!("iptables-{program} -t raw -A PREROUTING -j MARK --set-xmark 0x200/0xf00"),
        );
        let found = only(&obstacles(&bed, &input_with(TunnelKind::Veth, 1)).await);
        assert!(
            found.contains("the mark bits 0x300") && found.contains("--set-xmark 0x200/0xf00"),
            "{found}"
        );
    }
}

#[tokio::test]
async fn rules_that_changed_since_the_last_look_are_found() {
    for (_, program) in BACKENDS {
        let bed = Bed::new(IptablesBackend::Nft);
        let (names, veth) = (Names::default(), input_with(TunnelKind::Veth, 1));
        let rule = "PREROUTING -j MARK --set-xmark 0x200/0x200";
        let mut found = others(&bed).await;
        for (change, obstacles) in [("-A", 1), ("-D", 0), ("-A", 1)] {
            bed.run(
                "host",
                &format!("iptables-{program} -t mangle {change} {rule}"),
            );
            let earlier = Earlier {
                others: Some(&found.1),
                ..Earlier::default()
            };
            let again = facts::find(&bed.netns("host"), &names, earlier).await;
            found = again.unwrap();
            let standing = obstacles_in(&bed, &veth, &found).await;
            assert_eq!(
                standing.len(),
                obstacles,
                "{program} {change}: {standing:?}"
            );
        }
    }
}

#[tokio::test]
async fn calicos_check_of_the_source_is_found_as_iptables_prints_it() {
    // What Felix writes for a host whose pods' devices are called v….
    const RULES: &str = "*raw
:cali-PREROUTING - [0:0]
:cali-rpf-skip - [0:0]
-A PREROUTING -j cali-PREROUTING
-A cali-PREROUTING -m comment --comment cali:XFX5xbM8B9qR10JG -j MARK --set-xmark 0x0/0xf0000
-A cali-PREROUTING -i v+ -m comment --comment cali:EWMPb0zVROM -j MARK --set-xmark 0x40000/0x40000
-A cali-PREROUTING -m mark --mark 0x40000/0x40000 -j cali-rpf-skip
-A cali-PREROUTING -m mark --mark 0x40000/0x40000 -m rpfilter --validmark --invert -j DROP
COMMIT
";
    for (_, program) in BACKENDS {
        let bed = Bed::new(IptablesBackend::Nft);
        bed.run(
            "host",
            &format!("iptables-{program}-restore --noflush <<END\n{RULES}END"),
        );
        let veth = input_with(TunnelKind::Veth, 1);
        let found = only(&obstacles(&bed, &veth).await);
        assert!(
            found.contains("by vproxy is dropped") && found.contains("rpfilter"),
            "{found}"
        );
        bed.run(
            "host",
            &format!("iptables-{program} -t raw -A cali-rpf-skip -i vproxy -s 0.0.0.0/0 -j ACCEPT"),
        );
        assert_eq!(obstacles(&bed, &veth).await, []);
    }
}

#[tokio::test]
async fn a_bpf_program_on_the_proxys_device_is_found_both_ways() {
    for way in ["ingress", "egress"] {
        let bed = Bed::new(IptablesBackend::Nft);
        bed.run("host", "tc qdisc add dev vproxy clsact");
        let veth = input_with(TunnelKind::Veth, 1);
        assert_eq!(obstacles(&bed, &veth).await, []);
        bed.run(
            "host",
            &format!("tc filter add dev vproxy {way} bpf bytecode \"1,6 0 0 4294967295,\""),
        );
        let found = only(&obstacles(&bed, &veth).await);
        assert!(found.contains("attached to the proxy"), "{found}");
    }
}

#[tokio::test]
async fn forwarding_that_is_off_is_found_for_the_host_and_for_the_proxys_device() {
    let bed = Bed::new(IptablesBackend::Nft);
    let veth = input_with(TunnelKind::Veth, 1);
    for setting in ["net.ipv4.conf.vproxy.forwarding", "net.ipv4.ip_forward"] {
        bed.run("host", &format!("sysctl -qw {setting}=0"));
        let found = only(&obstacles(&bed, &veth).await);
        assert!(found.contains(&setting.replace('.', "/")), "{found}");
        bed.run("host", &format!("sysctl -qw {setting}=1"));
        assert_eq!(obstacles(&bed, &veth).await, []);
    }
}

#[tokio::test]
async fn the_backend_is_that_of_the_hosts_rules() {
    let bed = Bed::new(IptablesBackend::Nft);
    assert_eq!(others(&bed).await.0.iptables, IptablesBackend::Nft);
    bed.run(
        "host",
        "iptables-nft -t nat -A POSTROUTING -s 192.0.2.0/24 -j MASQUERADE
         iptables-legacy -t mangle -N KUBE-IPTABLES-HINT",
    );
    assert_eq!(
        others(&bed).await.0.iptables,
        IptablesBackend::Legacy,
        "what kubelet says counts"
    );
    bed.run("host", "iptables-legacy -t mangle -X KUBE-IPTABLES-HINT");
    assert_eq!(others(&bed).await.0.iptables, IptablesBackend::Nft);
}

#[tokio::test]
async fn a_proxy_on_another_kind_of_device_is_named() {
    let bed = Bed::new(IptablesBackend::Nft);
    bed.put_proxy_on_macvlan();
    let (host, proxy) = (bed.netns("host"), bed.netns("proxy"));
    let error = attachment::find(&host, &proxy, "/proc/sys/net".as_ref())
        .await
        .unwrap_err();
    assert!(
        matches!(&error, AttachError::NotVeth { kind, .. } if kind == "of kind macvlan"),
        "{error}"
    );
}
