//! Pods that the plugin holds back, and when the agent lets them go.

use guard::record::{self, Record};

use super::*;

/// What the plugin does for a new pod of a bed.
fn hold(bed: &Bed, agent: &Agent, pod: usize, namespace: &str) {
    let device = ["va", "vb"][pod];
    let index = bed.run("host", &format!("ip -o link show {device} | cut -d: -f1"));
    let record = Record {
        container: format!("sandbox-{pod}"),
        interface: "eth0".to_owned(),
        network: "bed".to_owned(),
        uid: format!("pod-{pod}"),
        namespace: namespace.to_owned(),
        name: format!("pod-{pod}"),
        index: index.trim().parse().unwrap(),
        device: device.to_owned(),
        addresses: [PODS[pod].into()].into(),
        priority: 99,
        protocol: 90,
    };
    record.write(&agent.records()).unwrap();
    bed.run(
        "host",
        &format!(
            "ip rule add from {} iif {device} ipproto tcp priority 99 protocol 90 blackhole",
            PODS[pod]
        ),
    );
}

fn is_held(bed: &Bed, pod: usize) -> bool {
    let rules = bed.run("host", "ip rule");
    rules.contains(&format!("99:\tfrom {} iif", PODS[pod]))
}

fn guarded(pods: usize) -> AmbientNodeSpec {
    AmbientNodeSpec {
        mesh_namespaces: vec!["shop".to_owned()],
        ..veth(pods)
    }
}

impl Agent {
    fn records(&self) -> PathBuf {
        self.folder().join("held")
    }

    fn folder(&self) -> &Path {
        self.socket.parent().unwrap()
    }
}

fn is_nothing_recorded(agent: &Agent) -> bool {
    record::all(&agent.records()).unwrap().is_empty()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_held_pod_is_let_go_once_the_kernel_sends_it_to_the_proxy() {
    let bed = Bed::new(IptablesBackend::Nft);
    let mut agent = Agent::start(&bed, 1_000).await;
    hold(&bed, &agent, 0, "shop");
    hold(&bed, &agent, 1, "shop");
    let peer = Peer::connect(&agent.socket, &bed, "proxy").await;
    peer.hold_back("pod-1");
    agent.want(guarded(2));
    eventually("pod 0 is let go", || !is_held(&bed, 0)).await;
    assert!(is_member(&bed, 0), "it was let go before it was carried");
    agent
        .until(conditions::WORKLOADS_READY, "WorkloadsPending")
        .await;
    assert!(is_held(&bed, 1) && !is_member(&bed, 1));

    // What somebody takes away is back, as everything of ours is.
    bed.run("host", "ip rule del priority 99");
    eventually("pod 1 is held again", || is_held(&bed, 1)).await;

    peer.release("pod-1");
    agent.until(conditions::READY, "AllReady").await;
    eventually("pod 1 is let go", || !is_held(&bed, 1)).await;
    assert!(is_member(&bed, 1));
    eventually("nothing is recorded", || is_nothing_recorded(&agent)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_need_not_wait_is_let_go_also_where_the_mesh_cannot_begin() {
    let bed = Bed::new(IptablesBackend::Nft);
    bed.run("host", "ip rule add fwmark 0x100/0x100 lookup main");
    let mut agent = Agent::start(&bed, 1_000).await;
    hold(&bed, &agent, 0, "shop");
    hold(&bed, &agent, 1, "shop");
    let mut spec = guarded(1);
    spec.outside = vec!["pod-1".to_owned()];
    agent.want(spec.clone());
    agent
        .until(conditions::REDIRECTION_READY, "MarksConflict")
        .await;
    eventually("the pod that stays out is let go", || !is_held(&bed, 1)).await;
    assert!(is_held(&bed, 0), "it would talk in the clear");
    assert!(
        !bed.succeeds("host", "ipset list ztunnel-pods-ips"),
        "something was begun"
    );
    // Its namespace leaves the mesh.
    spec.mesh_namespaces.clear();
    agent.want(spec);
    eventually("the other is let go", || !is_held(&bed, 0)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn holds_of_pods_that_are_gone_and_of_nobody_go() {
    let bed = Bed::new(IptablesBackend::Nft);
    let agent = Agent::start(&bed, 1_000).await;
    hold(&bed, &agent, 0, "shop");
    bed.run(
        "host",
        "ip rule add from 10.244.1.77 iif vb ipproto tcp priority 99 protocol 90 blackhole",
    );
    agent.want(guarded(0));
    eventually("the hold without a record is gone", || {
        !bed.run("host", "ip rule").contains("10.244.1.77")
    })
    .await;
    assert!(is_held(&bed, 0));
    bed.run("host", "ip link delete va");
    eventually("the hold of the pod is gone", || !is_held(&bed, 0)).await;
    eventually("and its record", || is_nothing_recorded(&agent)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_failure_mode_open_nobody_is_held() {
    let bed = Bed::new(IptablesBackend::Nft);
    let agent = Agent::start(&bed, 1_000).await;
    hold(&bed, &agent, 0, "shop");
    agent.want(AmbientNodeSpec {
        failure_mode: FailureMode::Open,
        ..guarded(1)
    });
    eventually("it is let go", || !is_held(&bed, 0)).await;
    let orders = std::fs::read_to_string(agent.folder().join("guard.json")).unwrap();
    assert!(!orders.contains("shop"), "{orders}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_plugin_joins_the_cni_chain_comes_back_and_leaves_without_a_trace() {
    let bed = Bed::new(IptablesBackend::Nft);
    let before = bed.dump();
    let mut agent = Agent::start(&bed, 1_000).await;
    let folder = agent.folder().to_owned();
    let list = folder.join("cni/10-ptp.conflist");
    let read = || std::fs::read_to_string(&list).unwrap();
    // As a whole: half a list would be complained of, too.
    let rewrite = |text: &str| {
        let new = folder.join("new");
        std::fs::write(&new, text).unwrap();
        std::fs::rename(new, &list).unwrap();
    };
    let _peer = Peer::connect(&agent.socket, &bed, "proxy").await;
    agent.want(guarded(1));
    agent
        .until(conditions::REDIRECTION_READY, "Redirecting")
        .await;
    assert!(read().contains("ambit-cni") && folder.join("cni-programs/ambit-cni").exists());
    let orders = std::fs::read_to_string(folder.join("guard.json")).unwrap();
    assert!(orders.contains("shop"), "{orders}");

    // The CNI writes its list anew.
    rewrite(CNI_LIST);
    eventually("it is in the chain again", || read().contains("ambit-cni")).await;
    // Somebody names a program that is not where the runtime is said to look.
    rewrite(&CNI_LIST.replace("ptp", "elsewhere"));
    agent
        .until(conditions::REDIRECTION_READY, "NewPodsNotHeld")
        .await;
    let (status, message) = agent.says(conditions::REDIRECTION_READY);
    assert_eq!(status, "True");
    assert!(
        message.contains("elsewhere") && message.contains("CNI_BIN_DIR"),
        "{message}"
    );
    assert!(!read().contains("ambit-cni"));
    rewrite(CNI_LIST);
    agent
        .until(conditions::REDIRECTION_READY, "Redirecting")
        .await;

    hold(&bed, &agent, 1, "shop");
    agent.known.send_replace(Known::Absent);
    eventually("the host is as it was", || bed.dump() == before).await;
    assert_eq!(read(), CNI_LIST);
    assert!(!folder.join("cni-programs/ambit-cni").exists());
    assert!(!folder.join("guard.json").exists());
    assert_eq!(record::all(&agent.records()).unwrap(), []);
}
