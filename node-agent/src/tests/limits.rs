//! What stands in the way on a host: the condition that says so, and that it goes when its cause does.

use std::path::Path;

use crds::{AmbientNodeStatus, IptablesBackend as Kept, KernelStatus, conditions};
use datapath::IptablesBackend;
use datapath::names::Names;

use super::bed::{Bed, PROXY};
use super::peer::Peer;
use super::{Agent, eventually, ready, veth};
use crate::cleanup::cleanup;

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_does_not_forward_is_told_which_setting_is_off() {
    let bed = Bed::new(IptablesBackend::Nft);
    bed.run("host", "sysctl -qw net.ipv4.ip_forward=0");
    let mut agent = Agent::start(&bed, 1_000).await;
    agent.want(veth(1));
    let _peer = Peer::connect(&agent.socket, &bed, "proxy").await;
    let kind = conditions::REDIRECTION_READY;
    agent.until(kind, "ForwardingDisabled").await;
    let (_, message) = agent.says(kind);
    assert!(message.contains("net/ipv4/ip_forward is 0"), "{message}");
    assert!(
        bed.run("host", "ip rule").contains("fwmark 0x100/0x100"),
        "the data path stands, for when the node forwards"
    );
    bed.run("host", "sysctl -qw net.ipv4.ip_forward=1");
    agent.until(conditions::READY, "AllReady").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_without_a_veth_is_turned_away_with_what_it_needs() {
    let bed = Bed::new(IptablesBackend::Nft);
    bed.put_proxy_on_macvlan();
    let mut agent = Agent::start(&bed, 1_000).await;
    agent.want(veth(1));
    let _peer = Peer::connect(&agent.socket, &bed, "proxy").await;
    agent
        .until(conditions::PROXY_ATTACHED, "ProxyWithoutVeth")
        .await;
    let (_, message) = agent.says(conditions::PROXY_ATTACHED);
    assert!(message.contains("eth0 is of kind macvlan"), "{message}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_of_the_source_is_told_until_the_proxy_is_exempted() {
    let bed = Bed::new(IptablesBackend::Nft);
    bed.run(
        "host",
        "iptables-nft -t raw -N cali-rpf-skip
         iptables-nft -t raw -A PREROUTING -i v+ -j cali-rpf-skip
         iptables-nft -t raw -A PREROUTING -i v+ -m rpfilter --validmark --invert -j DROP",
    );
    let mut agent = Agent::start(&bed, 1_000).await;
    agent.want(veth(1));
    let _peer = Peer::connect(&agent.socket, &bed, "proxy").await;
    let kind = conditions::REDIRECTION_READY;
    agent.until(kind, "SourceCheck").await;
    let (_, message) = agent.says(kind);
    assert!(
        message.contains("vproxy") && message.contains("allowedSourcePrefixes"),
        "{message}"
    );
    bed.run(
        "host",
        "iptables-nft -t raw -A cali-rpf-skip -i vproxy -j ACCEPT",
    );
    agent.until(conditions::READY, "AllReady").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_data_path_of_bpf_programs_is_told_and_a_strangers_program_is_a_warning() {
    let bed = Bed::new(IptablesBackend::Nft);
    bed.run(
        "host",
        "tc qdisc add dev vproxy clsact
         tc filter add dev vproxy ingress bpf bytecode \"1,6 0 0 4294967295,\"",
    );
    let (mut agent, peer) = ready(&bed, 1).await;
    let kind = conditions::REDIRECTION_READY;
    agent.until(kind, "EbpfDataPath").await;
    let (holds, message) = agent.says(kind);
    assert!(holds == "True" && message.contains("vproxy"), "{message}");
    drop((agent, peer));

    bed.run(
        "host",
        &format!(
            "ip link add cilium_host type veth peer name cilium_net
             ip link set vproxy down
             ip link set vproxy name lxc0123
             ip link set lxc0123 up
             ip route replace {PROXY}/32 dev lxc0123 scope host"
        ),
    );
    let mut agent = Agent::start(&bed, 2_000).await;
    agent.want(veth(1));
    let _peer = Peer::connect(&agent.socket, &bed, "proxy").await;
    agent.until(conditions::READY, "EbpfDataPath").await;
    let (holds, message) = agent.says(kind);
    assert!(
        holds == "False" && message.contains("generic-veth"),
        "{message}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_backend_of_iptables_is_kept_and_a_host_that_has_moved_is_told() {
    let bed = Bed::new(IptablesBackend::Legacy);
    let ours = |backend: &str| {
        let saved = bed.run("host", &format!("iptables-{backend}-save"));
        saved.contains("ztunnel-PREROUTING")
    };
    // A host without rules does not say what it uses; the status does.
    let kept = AmbientNodeStatus {
        kernel: Some(KernelStatus {
            iptables: Kept::Legacy,
            ..KernelStatus::default()
        }),
        ..AmbientNodeStatus::default()
    };
    let mut agent = Agent::start(&bed, 1_000).await;
    agent.want_after(veth(1), Some(kept));
    let peer = Peer::connect(&agent.socket, &bed, "proxy").await;
    agent.until(conditions::READY, "AllReady").await;
    assert!(ours("legacy") && !ours("nft"));
    drop((agent, peer));

    bed.run("host", "iptables-nft -t mangle -N KUBE-IPTABLES-HINT");
    let mut agent = Agent::start(&bed, 2_000).await;
    agent.want(veth(1));
    let peer = Peer::connect(&agent.socket, &bed, "proxy").await;
    let kind = conditions::REDIRECTION_READY;
    agent.until(kind, "IptablesBackendChanged").await;
    let (_, message) = agent.says(kind);
    assert!(message.contains("ambit-node-agent cleanup"), "{message}");
    assert!(ours("legacy") && !ours("nft"), "nothing is mixed silently");
    drop((agent, peer));

    // As the message says; also what somebody mixed before.
    bed.run(
        "host",
        "iptables-nft -t mangle -N ztunnel-PREROUTING; iptables-nft -t mangle -A PREROUTING -j ztunnel-PREROUTING",
    );
    let (socket, root) = (
        Path::new("/nonexistent/agent.sock"),
        Path::new("/proc/sys/net"),
    );
    let folder = tempfile::tempdir().unwrap();
    let mut plugin = super::plugin(folder.path());
    cleanup(
        bed.netns("host"),
        root,
        socket,
        &Names::default(),
        &mut plugin,
    )
    .await
    .unwrap();
    assert!(!ours("legacy") && !ours("nft"));
    let mut agent = Agent::start(&bed, 3_000).await;
    agent.want(veth(1));
    let _peer = Peer::connect(&agent.socket, &bed, "proxy").await;
    agent.until(conditions::READY, "AllReady").await;
    eventually("our chains are where the host's are", || ours("nft")).await;
    assert!(!ours("legacy"));
}
