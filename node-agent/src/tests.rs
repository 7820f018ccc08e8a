//! The agent against the real kernel, in network namespaces, with a proxy of the tests' own that
//! speaks the protocol, and an API server of theirs that knows one pod.

#[path = "../datapath/tests/bed/mod.rs"]
mod bed;
mod holds;
mod limits;
mod peer;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crds::{AmbientNode, AmbientNodeSpec, AmbientNodeStatus, FailureMode, TunnelType, conditions};
use datapath::IptablesBackend;
use datapath::names::Names;
use jiff::Timestamp;
use protocol::node::Duty;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use bed::foreign::CILIUM_MARKS;
use bed::{Bed, PODS};
use peer::Peer;

use crate::args::PluginArguments;
use crate::cleanup::cleanup;
use crate::desired::tests::{spec, workload};
use crate::metrics::Metrics;
use crate::pass::Node;
use crate::plugin::Plugin;
use crate::reconcile::{self, Inputs};
use crate::report::{Outcome, report};
use crate::roster::Roster;
use crate::session::{self, Doorman, Expected};
use crate::survey::Host;
use crate::watch::Known;

const PATIENCE: Duration = Duration::from_secs(10);

/// An agent of a bed's host; it ends when dropped, as by SIGKILL.
struct Agent {
    known: watch::Sender<Known>,
    outcomes: watch::Receiver<Option<Outcome>>,
    metrics: Arc<Metrics>,
    socket: PathBuf,
    _folder: tempfile::TempDir,
    _parts: JoinSet<()>,
}

const CNI_LIST: &str = r#"{"cniVersion": "1.0.0", "name": "bed", "plugins": [{"type": "ptp"}]}"#;

/// The plugin of a host whose CNI chain is in this folder.
fn plugin(folder: &Path) -> Plugin {
    for (name, text) in [("cni-programs/ptp", ""), ("cni/10-ptp.conflist", CNI_LIST)] {
        let path = folder.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    let arguments = PluginArguments {
        hold_new_pods: true,
        cni_bin_dir: Some(folder.join("cni-programs")),
        cni_conf_dir: Some(folder.join("cni")),
        cni_program: PathBuf::from("/bin/true"),
        orders: folder.join("guard.json"),
        records: folder.join("held"),
    };
    Plugin::new(arguments, "ambit-system".to_owned())
}

impl Agent {
    async fn start(bed: &Bed, generation: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("agent.sock");
        let metrics = Arc::new(Metrics::new());
        let (known, known_receiver) = watch::channel(Known::Unread);
        let (tell_session, sessions) = mpsc::channel(8);
        let (tell_outcome, outcomes) = watch::channel(None);
        let (wake, wakes) = mpsc::channel(1);
        let doorman = Doorman {
            client: peer::api_server().await,
            expected: Expected {
                namespace: "ambit-system".to_owned(),
                node: "node-1".to_owned(),
                service_account: "ambit-proxy".to_owned(),
            },
            host: bed.netns("host"),
            sysctl_root: PathBuf::from("/proc/sys/net"),
            names: Names::default(),
        };
        let host = Host {
            netns: bed.netns("host"),
            sysctl_root: PathBuf::from("/proc/sys/net"),
            names: Names::default(),
        };
        let node = Node::new(host, plugin(folder.path()), metrics.clone(), wake);
        let inputs = Inputs {
            known: known_receiver,
            sessions,
            wakes,
            abandoned_after: Duration::from_secs(1),
            removing: watch::Sender::new(false),
        };
        let mut parts = JoinSet::new();
        let listener = session::bind(&socket).unwrap();
        parts.spawn(session::serve(listener, Arc::new(doorman), tell_session));
        parts.spawn(reconcile::run(
            node,
            inputs,
            Roster::new(generation),
            tell_outcome,
            metrics.clone(),
        ));
        Self {
            known,
            outcomes,
            metrics,
            socket,
            _folder: folder,
            _parts: parts,
        }
    }

    fn want(&self, spec: AmbientNodeSpec) {
        self.want_after(spec, None);
    }

    /// The same, with what an earlier agent wrote.
    fn want_after(&self, spec: AmbientNodeSpec, status: Option<AmbientNodeStatus>) {
        let mut object = AmbientNode::new("node-1", spec);
        object.metadata.generation = Some(1);
        object.status = status;
        self.known.send_replace(Known::Present(Arc::new(object)));
    }

    /// What the status says of a condition now: its status and its message.
    fn says(&self, kind: &str) -> (String, String) {
        let outcome = self.outcomes.borrow().clone().unwrap();
        let status = report(&outcome, &[], Timestamp::UNIX_EPOCH);
        let mut found = status.conditions.into_iter();
        let found = found.find(|found| found.type_ == kind).unwrap();
        (found.status, found.message)
    }

    /// Waits until a condition has this reason.
    async fn until(&mut self, kind: &str, reason: &str) {
        let mut last = None;
        let reached = tokio::time::timeout(PATIENCE, async {
            loop {
                let outcome = self.outcomes.borrow_and_update().clone();
                last = outcome.map(|outcome| report(&outcome, &[], Timestamp::UNIX_EPOCH));
                let found = last.iter().flat_map(|status| &status.conditions);
                if found
                    .clone()
                    .any(|found| found.type_ == kind && found.reason == reason)
                {
                    return;
                }
                self.outcomes.changed().await.unwrap();
            }
        });
        assert!(
            reached.await.is_ok(),
            "{kind} has not come to {reason}: {last:#?}"
        );
    }

    fn counter(&self, name: &str) -> u64 {
        let text = self.metrics.text().unwrap();
        let line = text
            .lines()
            .find(|line| line.starts_with(&format!("ambit_agent_{name}_total ")));
        line.unwrap().split(' ').nth(1).unwrap().parse().unwrap()
    }
}

/// Waits until `holds`.
async fn eventually(what: &str, holds: impl Fn() -> bool) {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while !holds() {
        assert!(
            tokio::time::Instant::now() < deadline,
            "it has not come to: {what}"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn veth(pods: usize) -> AmbientNodeSpec {
    let workloads = PODS[..pods]
        .iter()
        .enumerate()
        .map(|(index, ip)| workload(&format!("pod-{index}"), &ip.to_string()))
        .collect();
    let mut spec = spec(workloads);
    spec.tunnel.kind = TunnelType::Veth;
    spec
}

fn is_member(bed: &Bed, pod: usize) -> bool {
    bed.succeeds(
        "host",
        &format!("ipset test ztunnel-pods-ips {}", PODS[pod]),
    )
}

async fn ready(bed: &Bed, pods: usize) -> (Agent, Peer) {
    let mut agent = Agent::start(bed, 1_000).await;
    agent.want(veth(pods));
    let peer = Peer::connect(&agent.socket, bed, "proxy").await;
    agent.until(conditions::READY, "AllReady").await;
    (agent, peer)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_enters_the_kernel_after_the_proxy_and_leaves_it_before() {
    let bed = Bed::new(IptablesBackend::Nft);
    let mut agent = Agent::start(&bed, 1_000).await;
    let peer = Peer::connect(&agent.socket, &bed, "proxy").await;
    peer.hold_back("pod-1");
    agent.want(veth(2));
    agent
        .until(conditions::WORKLOADS_READY, "WorkloadsPending")
        .await;
    eventually("pod 0 is a member", || is_member(&bed, 0)).await;
    assert!(!is_member(&bed, 1), "the proxy is not ready for it");
    peer.release("pod-1");
    agent.until(conditions::READY, "AllReady").await;
    assert!(is_member(&bed, 1));
    let routes = bed.run("host", "ip route show table 100");
    assert!(
        routes.contains("10.244.1.5 via 192.168.126.2 dev istioin"),
        "{routes}"
    );

    let (watched, name) = (bed.name("host"), PODS[1]);
    peer.on_forget("pod-1", move || {
        let path = format!("--net=/run/netns/{watched}");
        let test = format!("! ipset test ztunnel-pods-ips {name} 2>/dev/null");
        bed::sh(&format!("nsenter {path} sh -c '{test}'"));
    });
    agent.want(veth(1));
    eventually("the proxy forgets pod 1", || !peer.knows("pod-1")).await;
    assert!(
        peer.forgot_cleanly("pod-1"),
        "the proxy forgot a pod that the kernel still sent to it"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_starts_again_changes_nothing() {
    let bed = Bed::new(IptablesBackend::Nft);
    let (agent, peer) = ready(&bed, 2).await;
    let before = bed.dump();
    drop((agent, peer));
    let mut agent = Agent::start(&bed, 2_000).await;
    agent.want(veth(2));
    // Passes go by before the proxy is back.
    eventually("it has looked twice", || agent.metrics.waits() > 1).await;
    let _peer = Peer::connect(&agent.socket, &bed, "proxy").await;
    agent.until(conditions::READY, "AllReady").await;
    assert_eq!(agent.counter("changes"), 0);
    assert_eq!(before, bed.dump());
}

#[tokio::test(flavor = "multi_thread")]
async fn s20_without_the_proxy_enrolled_pods_are_refused_and_come_back_with_it() {
    let bed = Bed::new(IptablesBackend::Nft);
    let (mut agent, peer) = ready(&bed, 1).await;
    drop(peer);
    agent.until(conditions::PROXY_ATTACHED, "NoProxy").await;
    let outbound = bed.run("host", "ip route show table 101");
    assert!(
        outbound.contains("unreachable default") && !outbound.contains("via"),
        "{outbound}"
    );
    assert!(is_member(&bed, 0), "its traffic would leave in the clear");
    let _peer = Peer::connect(&agent.socket, &bed, "proxy").await;
    agent.until(conditions::READY, "AllReady").await;
    assert!(
        bed.run("host", "ip route show table 101")
            .contains("default via 192.168.127.2 dev istioout")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_proxy_failure_mode_open_lets_pods_go_directly() {
    let bed = Bed::new(IptablesBackend::Nft);
    let (mut agent, peer) = ready(&bed, 1).await;
    let mut open = veth(1);
    open.failure_mode = FailureMode::Open;
    agent.want(open);
    drop(peer);
    agent.until(conditions::PROXY_ATTACHED, "NoProxy").await;
    eventually("no pod is a member", || !is_member(&bed, 0)).await;
}

/// Which proxy's device each of the host's tables of mesh traffic leads to.
fn ways(bed: &Bed) -> [String; 3] {
    [101, 102, 103].map(|table| {
        let routes = bed.run("host", &format!("ip route show table {table}"));
        let way = routes.lines().find(|line| line.starts_with("default via"));
        let device = way.and_then(|way| way.split(" dev ").nth(1));
        device
            .unwrap_or_default()
            .split(' ')
            .next()
            .unwrap_or_default()
            .to_owned()
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_proxy_pod_takes_over_and_the_old_one_keeps_what_it_carries() {
    let mut bed = Bed::new(IptablesBackend::Nft);
    bed.pod("next", bed::NEXT_PROXY);
    let (mut agent, peer) = ready(&bed, 1).await;
    eventually("the first proxy knows its duty", || {
        peer.duty() == Duty::Active
    })
    .await;
    assert_eq!(ways(&bed), ["istioout", "vproxy", ""]);

    let next = Peer::connect(&agent.socket, &bed, "next").await;
    eventually("the next proxy knows its duty", || {
        next.duty() == Duty::Active
    })
    .await;
    assert_eq!(ways(&bed), ["istioout2", "vproxy", "vnext"]);
    eventually("the first proxy knows too", || peer.duty() == Duty::Standby).await;

    // Its pod goes: its process first, then its device.
    drop(peer);
    agent.until(conditions::READY, "AllReady").await;
    assert_eq!(ways(&bed), ["istioout2", "vproxy", "vnext"]);
    bed.run("proxy", "ip link delete eth0");
    eventually("nothing leads to the old proxy", || {
        ways(&bed) == ["istioout2", "", "vnext"]
    })
    .await;
    agent.until(conditions::READY, "AllReady").await;
    assert!(bed.run("next", "ip link").contains("pistioin2"));
    // Devices are the last to go.
    eventually("the old proxy's devices are gone", || {
        !bed.run("proxy", "ip link").contains("pistioin")
            && !bed.succeeds("host", "ip link show istioin")
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_starts_again_between_two_proxies_changes_nothing() {
    let mut bed = Bed::new(IptablesBackend::Nft);
    bed.pod("next", bed::NEXT_PROXY);
    let (mut agent, peer) = ready(&bed, 1).await;
    let next = Peer::connect(&agent.socket, &bed, "next").await;
    eventually("the next proxy has taken over", || {
        next.duty() == Duty::Active
    })
    .await;
    agent.until(conditions::READY, "AllReady").await;
    let before = bed.dump();
    drop((agent, peer, next));

    let mut agent = Agent::start(&bed, 2_000).await;
    agent.want(veth(1));
    // The one that is about to end is the first to come back.
    let peer = Peer::connect(&agent.socket, &bed, "proxy").await;
    eventually("it has looked twice", || agent.metrics.waits() > 1).await;
    let _next = Peer::connect(&agent.socket, &bed, "next").await;
    agent.until(conditions::READY, "AllReady").await;
    assert_eq!(agent.counter("changes"), 0);
    assert_eq!(before, bed.dump());
    drop(peer);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_that_ends_serves_until_another_does() {
    let mut bed = Bed::new(IptablesBackend::Nft);
    bed.pod("next", bed::NEXT_PROXY);
    let (mut agent, peer) = ready(&bed, 1).await;
    eventually("the proxy knows its duty", || peer.duty() == Duty::Active).await;
    peer.end();
    agent.until(conditions::READY, "AllReady").await;
    assert_eq!(peer.duty(), Duty::Active);
    let next = Peer::connect(&agent.socket, &bed, "next").await;
    eventually("the next proxy has taken over", || {
        next.duty() == Duty::Active
    })
    .await;
    eventually("the first proxy knows", || peer.duty() == Duty::Standby).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_deleted_by_hand_comes_back_within_a_second() {
    let bed = Bed::new(IptablesBackend::Nft);
    let (mut agent, _peer) = ready(&bed, 1).await;
    for (vandal, wanted) in [
        (
            "ip link delete istioin",
            "ip route show table 100 | grep -q \"dev istioin\"",
        ),
        (
            "ip addr flush dev istioout",
            "ip addr show dev istioout | grep -q 192.168.127.1/30",
        ),
        ("ip rule del priority 101", "ip rule | grep -q ^101:"),
        (
            "ip route flush table 102",
            "ip route show table 102 | grep -q vproxy",
        ),
    ] {
        bed.run("host", vandal);
        let started = std::time::Instant::now();
        eventually(wanted, || bed.succeeds("host", wanted)).await;
        let took = started.elapsed();
        assert!(took < Duration::from_secs(1), "{vandal}: it took {took:?}");
    }
    bed.run("proxy", "ip rule del priority 20000");
    eventually("the proxy's rule is back", || {
        bed.succeeds("proxy", "ip rule | grep -q ^20000:")
    })
    .await;
    agent.until(conditions::READY, "AllReady").await;
    assert!(agent.counter("repairs") > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_is_not_the_nodes_proxy_is_turned_away_with_the_reason() {
    let bed = Bed::new(IptablesBackend::Nft);
    let mut agent = Agent::start(&bed, 1_000).await;
    agent.want(veth(1));
    for (namespace, pod, reason, part) in [
        (
            "host",
            "proxy",
            "ProxyWithoutVeth",
            "on the host's own network",
        ),
        (
            "a",
            "proxy",
            "ProxyRejected",
            "has address 10.244.1.4, the pod has 10.244.1.3",
        ),
        (
            "a",
            "stranger",
            "ProxyRejected",
            "there is no pod ambit-system/stranger",
        ),
        (
            "a",
            "hidden",
            "ProxyRejected",
            "ask for pod ambit-system/hidden: pods is forbidden",
        ),
    ] {
        let _peer = Peer::connect_as(&agent.socket, &bed.netns(namespace), pod).await;
        let told = tokio::time::timeout(
            PATIENCE,
            agent.outcomes.wait_for(|outcome| {
                let rejection = outcome
                    .as_ref()
                    .and_then(|outcome| outcome.rejection.clone());
                rejection.is_some_and(|why| why.message.contains(part))
            }),
        );
        assert!(told.await.is_ok(), "no rejection says {part}");
        agent.until(conditions::PROXY_ATTACHED, reason).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kernel_without_geneve_is_left_alone_and_named() {
    let bed = Bed::new(IptablesBackend::Nft);
    let (facts, _) = datapath::facts::find(
        &bed.netns("host"),
        &Names::default(),
        datapath::facts::Earlier::default(),
    )
    .await
    .unwrap();
    let mut agent = Agent::start(&bed, 1_000).await;
    let mut geneve = veth(1);
    geneve.tunnel.kind = TunnelType::Geneve;
    agent.want(geneve);
    let _peer = Peer::connect(&agent.socket, &bed, "proxy").await;
    if facts.geneve {
        agent.until(conditions::READY, "AllReady").await;
    } else {
        agent
            .until(conditions::TUNNELS_READY, "GeneveUnsupported")
            .await;
        assert!(!bed.run("host", "ip rule").contains("fwmark"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn marks_that_others_use_are_a_conflict_and_nothing_is_begun() {
    let bed = Bed::new(IptablesBackend::Nft);
    bed.run(
        "host",
        "ip rule add priority 50 fwmark 0x100/0xff00 lookup main",
    );
    let mut agent = Agent::start(&bed, 1_000).await;
    agent.want(veth(1));
    let _peer = Peer::connect(&agent.socket, &bed, "proxy").await;
    agent
        .until(conditions::REDIRECTION_READY, "MarksConflict")
        .await;
    assert!(!bed.run("host", "ip link").contains("istioin"));
}

#[tokio::test(flavor = "multi_thread")]
async fn beside_ciliums_own_marks_nothing_is_written() {
    for backend in [IptablesBackend::Nft, IptablesBackend::Legacy] {
        let bed = Bed::new(backend);
        bed.occupy();
        bed.restore(CILIUM_MARKS);
        bed.run(
            "host",
            "ip rule add priority 9 fwmark 0x200/0xf00 lookup 2004",
        );
        let before = bed.dump();
        let mut agent = Agent::start(&bed, 1_000).await;
        agent.want(veth(1));
        let _peer = Peer::connect(&agent.socket, &bed, "proxy").await;
        agent
            .until(conditions::REDIRECTION_READY, "MarksConflict")
            .await;
        assert_eq!(before, bed.dump());
        let both = bed.run("host", "iptables-nft-save; iptables-legacy-save");
        assert!(!both.contains("ztunnel-"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn beside_others_with_marks_of_their_own_the_pods_are_enrolled() {
    for backend in [IptablesBackend::Nft, IptablesBackend::Legacy] {
        let bed = Bed::new(backend);
        bed.occupy();
        let (_agent, _peer) = ready(&bed, 1).await;
        assert!(is_member(&bed, 0));
        assert!(
            bed.save("host")
                .contains("-A PREROUTING -j ztunnel-PREROUTING")
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_set_is_named_and_those_who_fit_are_enrolled() {
    let bed = Bed::new(IptablesBackend::Nft);
    bed.run(
        "host",
        "ipset create ztunnel-pods-ips hash:ip maxelem 1 hashsize 64",
    );
    let mut agent = Agent::start(&bed, 1_000).await;
    agent.want(veth(2));
    let _peer = Peer::connect(&agent.socket, &bed, "proxy").await;
    agent.until(conditions::REDIRECTION_READY, "SetFull").await;
    assert!(is_member(&bed, 0) && !is_member(&bed, 1));
    let outcome = agent.outcomes.borrow().clone().unwrap();
    let status = report(&outcome, &[], Timestamp::UNIX_EPOCH);
    assert_eq!(
        (status.enrolled, status.pending[0].uid.as_str()),
        (1, "pod-1")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn cleanup_and_the_deletion_of_the_object_leave_the_host_as_it_was() {
    for way in ["deletion", "an agent that comes too late", "cleanup"] {
        let bed = Bed::new(IptablesBackend::Nft);
        // Reading a table loads it, which is no trace of ours.
        bed.run("host", "iptables-nft -t mangle -S; iptables-nft -t nat -S");
        bed.run(
            "host",
            // As if all devices had been made under this default.
            "for name in default vproxy va vb; do sysctl -qw net.ipv4.conf.$name.rp_filter=1; done",
        );
        let before = bed.dump();
        let (agent, peer) = ready(&bed, 2).await;
        assert_ne!(before, bed.dump());
        if way == "deletion" {
            agent.known.send_replace(Known::Absent);
            eventually("the host is as it was", || bed.dump() == before).await;
        } else if way == "an agent that comes too late" {
            drop((agent, peer));
            let held = bed.dump();
            let late = Agent::start(&bed, 2_000).await;
            // The API server does not answer: that says nothing.
            tokio::time::sleep(Duration::from_millis(1500)).await;
            assert_eq!(held, bed.dump());
            late.known.send_replace(Known::Absent);
            eventually("the host is as it was", || bed.dump() == before).await;
        } else {
            drop((agent, peer));
            let folder = tempfile::tempdir().unwrap();
            let socket = std::path::Path::new("/nonexistent/agent.sock");
            let root = std::path::Path::new("/proc/sys/net");
            assert!(
                cleanup(
                    bed.netns("host"),
                    root,
                    socket,
                    &Names::default(),
                    &mut plugin(folder.path()),
                )
                .await
                .unwrap()
                    > 0
            );
            assert_eq!(before, bed.dump());
        }
    }
}
