//! A new pod of the mesh says nothing in the clear from its first moment on, and nobody else waits.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mesh_tests::capture::{Capture, tcp_of};
use mesh_tests::cluster::{Cluster, SYSTEM, items};
use mesh_tests::enrolment::unlabel;
use mesh_tests::guard::{Namespace, Undo};
use mesh_tests::manifest::{Pod, TCP};
use mesh_tests::scene::with_port;
use mesh_tests::stage::{NODE_1, NODE_2};
use mesh_tests::wait::eventually;

const SOON: Duration = Duration::from_secs(60);

/// Where a container runtime keeps its plugins and their configuration.
const LIST: &str = "/etc/cni/net.d/10-ptp.conflist";

/// How many pods start at once.
const CROWD: usize = 20;

/// A pod's own command: from its first moment it sends this text until it arrives, then says how long
/// that took in all, and sleeps.
fn chatter(to: &str, text: &str) -> String {
    format!(
        "[bash, -c, 'begun=$(date +%s%N); \
         until podtool send --to {to} --text {text} --timeout 40 >/dev/null 2>&1; do sleep 0.02; done; \
         echo took $(( ($(date +%s%N) - begun) / 1000000 )); exec sleep infinity']"
    )
}

/// How many milliseconds a pod's first words took to arrive; none yet.
fn took(cluster: &Cluster, namespace: &str, pod: &str) -> Result<Option<u64>> {
    let log = cluster.kubectl(&["-n", namespace, "logs", pod])?;
    let number = log.lines().find_map(|line| line.strip_prefix("took "));
    Ok(number.map(str::parse).transpose()?)
}

fn wait_took(cluster: &Cluster, namespace: &str, pod: &str) -> Result<u64> {
    let mut time = 0;
    eventually(SOON, "the pod's first words arrive", || {
        time = took(cluster, namespace, pod)?.context("they have not")?;
        Ok(())
    })?;
    Ok(time)
}

/// The rules of a node that hold pods back.
fn holds(cluster: &Cluster, node: &str) -> Result<String> {
    let rules = cluster.on_node(node, &["sh", "-c", "ip rule; ip -6 rule"])?;
    let held = rules.lines().filter(|line| line.starts_with("99:"));
    Ok(held.collect::<Vec<_>>().join("\n"))
}

fn wait_no_holds(cluster: &Cluster, node: &str) -> Result<()> {
    eventually(SOON, "nobody is held", || {
        let holds = holds(cluster, node)?;
        ensure!(holds.is_empty(), "{holds}");
        Ok(())
    })
    .map(drop)
}

/// A server on node 2 and its first address; in the mesh if its namespace is.
fn server(cluster: &Cluster, namespace: &str) -> Result<IpAddr> {
    cluster.apply(&Pod::new(namespace, "server", NODE_2).manifests())?;
    cluster.wait_ready(namespace)?;
    let ips = cluster.pod_ips(namespace, "server")?;
    ips.first().copied().context("no address")
}

#[test]
fn a_new_pod_of_the_mesh_says_nothing_in_the_clear_from_its_first_moment_on() -> Result<()> {
    let cluster = Cluster::current()?;
    let namespace = Namespace::create(&cluster, "crowd", Some("ambient"))?;
    let name = namespace.name.as_str();
    let server = server(&cluster, name)?;
    cluster.wait_in_mesh(name, SOON)?;
    let marker = format!("marker-of-{name}");
    let command = chatter(&with_port(server, TCP), &marker);
    let pods: Vec<String> = (0..CROWD).map(|number| format!("new-{number}")).collect();
    let manifests: String = pods
        .iter()
        .map(|pod| {
            let pod = Pod {
                command: Some(&command),
                ..Pod::new(name, pod, NODE_1)
            };
            pod.manifests()
        })
        .collect();

    let capture = Capture::start("first-moment", &tcp_of(&[server]))?;
    cluster.apply(&manifests)?;
    let mut times = Vec::new();
    for pod in &pods {
        times.push(wait_took(&cluster, name, pod)?);
    }
    let captured = capture.stop()?;
    times.sort_unstable();
    println!("milliseconds until the first words arrived: {times:?}");
    // Not even an attempt is in the clear.
    captured.ensure_encrypted(&marker)?;
    ensure!(
        !captured.packets("tcp port 15008")?.is_empty(),
        "nothing was captured"
    );
    let slowest = times.last().copied().unwrap_or_default();
    ensure!(slowest < 10_000, "{slowest} ms");
    wait_no_holds(&cluster, NODE_1)
}

#[test]
fn pods_that_stay_out_of_the_mesh_are_let_go() -> Result<()> {
    let cluster = Cluster::current()?;
    let plain = Namespace::create(&cluster, "listens", None)?;
    let to = with_port(server(&cluster, &plain.name)?, TCP);
    let command = chatter(&to, "hello");
    let start = |namespace: &str, pod: &str, mode: Option<&str>| -> Result<u64> {
        let manifests = Pod {
            command: Some(&command),
            mode,
            ..Pod::new(namespace, pod, NODE_1)
        }
        .manifests();
        cluster.apply(&manifests)?;
        wait_took(&cluster, namespace, pod)
    };
    let mesh = Namespace::create(&cluster, "labelled", Some("ambient"))?;
    let alone = Namespace::create(&cluster, "one-of-two", None)?;
    start(&alone.name, "inside", Some("ambient"))?;
    for (namespace, pod, mode) in [
        (&mesh.name, "opted-out", Some("none")),
        (&alone.name, "beside", None),
    ] {
        let took = start(namespace, pod, mode)?;
        println!("{pod}: {took} ms");
        ensure!(took < 10_000, "{pod}: {took} ms");
    }
    wait_no_holds(&cluster, NODE_1)
}

/// No agent runs, and no controller, until this is dropped.
fn without_agents_and_controllers(cluster: &Cluster) -> Result<Undo> {
    let scale = |cluster: &Cluster, replicas: u8| {
        let replicas = format!("--replicas={replicas}");
        cluster.kubectl(&[
            "-n",
            SYSTEM,
            "scale",
            "deployment/ambit-controller",
            &replicas,
        ])
    };
    let select = |cluster: &Cluster, value: &str| {
        let patch = format!(
            r#"{{"spec":{{"template":{{"spec":{{"nodeSelector":{{"example.com/no-such-node":{value}}}}}}}}}}}"#
        );
        let call = [
            "-n",
            SYSTEM,
            "patch",
            "daemonset/ambit-node-agent",
            "-p",
            &patch,
        ];
        cluster.kubectl(&call)
    };
    let undo = Undo::new({
        let cluster = cluster.clone();
        move || {
            scale(&cluster, 2)?;
            select(&cluster, "null")?;
            cluster.wait_recovered()
        }
    });
    scale(cluster, 0)?;
    select(cluster, "\"x\"")?;
    eventually(SOON, "no agent and no controller", || {
        let label = "app.kubernetes.io/name in (ambit-node-agent, ambit-controller)";
        let pods = cluster.get(&["-n", SYSTEM, "pods", "-l", label])?;
        ensure!(items(&pods).next().is_none(), "some run");
        Ok(())
    })?;
    Ok(undo)
}

#[test]
fn without_an_agent_new_pods_of_the_mesh_wait_and_all_others_start() -> Result<()> {
    let cluster = Cluster::current()?;
    cluster.wait_recovered()?;
    let plain = Namespace::create(&cluster, "others", None)?;
    let mesh = Namespace::create(&cluster, "waits", Some("ambient"))?;
    let (plain, mesh) = (plain.name.as_str(), mesh.name.as_str());
    let listens = server(&cluster, plain)?;
    let server = server(&cluster, mesh)?;
    cluster.wait_in_mesh(mesh, SOON)?;
    let marker = format!("marker-of-{mesh}");
    let chatters = |to| chatter(&with_port(to, TCP), &marker);
    let back = without_agents_and_controllers(&cluster)?;

    let other = Pod {
        command: Some(&chatters(listens)),
        ..Pod::new(plain, "other", NODE_1)
    };
    cluster.apply(&other.manifests())?;
    let took_other = wait_took(&cluster, plain, "other")?;
    println!("outside the mesh: {took_other} ms");
    // Nobody repeats a first packet in less than a second.
    ensure!(took_other < 900, "{took_other} ms");

    let capture = Capture::start("waits", &tcp_of(&[server]))?;
    // Kubelet reaches it meanwhile: it is Ready.
    let waiting = Pod {
        command: Some(&chatters(server)),
        ..Pod::new(mesh, "waiting", NODE_1)
    };
    let probed = Pod {
        probe: Some("{httpGet: {path: /, port: 8080}, periodSeconds: 1}"),
        ..Pod::new(mesh, "probed", NODE_1)
    };
    cluster.apply(&(waiting.manifests() + &probed.manifests()))?;
    cluster.wait_ready(mesh)?;
    std::thread::sleep(Duration::from_secs(5));
    assert_eq!(took(&cluster, mesh, "waiting")?, None);
    let held = holds(&cluster, NODE_1)?;
    for pod in ["waiting", "probed"] {
        for ip in cluster.pod_ips(mesh, pod)? {
            ensure!(held.contains(&format!("from {ip} iif")), "{ip}: {held}");
        }
    }

    back.now()?;
    let waited = wait_took(&cluster, mesh, "waiting")?;
    println!("held for {waited} ms");
    ensure!(waited > 5000, "{waited} ms");
    let captured = capture.stop()?;
    captured.ensure_encrypted(&marker)?;
    cluster.wait_in_mesh(mesh, SOON)?;
    wait_no_holds(&cluster, NODE_1)
}

#[test]
fn a_namespace_that_leaves_the_mesh_lets_its_waiting_pods_go() -> Result<()> {
    let cluster = Cluster::current()?;
    let plain = Namespace::create(&cluster, "hears", None)?;
    let to = with_port(server(&cluster, &plain.name)?, TCP);
    let mesh = Namespace::create(&cluster, "leaves", Some("ambient"))?;
    let name = mesh.name.as_str();
    eventually(SOON, "the node knows the namespace", || {
        let orders = cluster.on_node(NODE_1, &["cat", "/var/lib/ambit/guard.json"])?;
        ensure!(orders.contains(name), "{orders}");
        Ok(())
    })?;
    let back = without_agents_and_controllers(&cluster)?;
    let pod = Pod {
        command: Some(&chatter(&to, "hello")),
        ..Pod::new(name, "waiting", NODE_1)
    };
    cluster.apply(&pod.manifests())?;
    cluster.wait_ready(name)?;
    ensure!(!holds(&cluster, NODE_1)?.is_empty(), "nobody is held");
    unlabel(&cluster, name)?;
    back.now()?;
    wait_took(&cluster, name, "waiting")?;
    wait_no_holds(&cluster, NODE_1)
}

#[test]
fn the_plugin_is_the_last_of_every_nodes_chain_and_comes_back() -> Result<()> {
    let cluster = Cluster::current()?;
    for node in [NODE_1, NODE_2] {
        let list = |cluster: &Cluster| -> Result<serde_json::Value> {
            Ok(serde_json::from_str(
                &cluster.on_node(node, &["cat", LIST])?,
            )?)
        };
        let kinds = |list: &serde_json::Value| {
            let plugins = list["plugins"].as_array().into_iter().flatten();
            plugins
                .map(|plugin| plugin["type"].clone())
                .collect::<Vec<_>>()
        };
        let before = cluster.on_node(node, &["cat", LIST])?;
        assert_eq!(
            kinds(&list(&cluster)?),
            ["no-dad", "ptp", "portmap", "ambit-cni"]
        );
        // Its CNI writes the list anew.
        let lines: Vec<&str> = before.split('\n').collect();
        let entry = lines.iter().position(|line| line.contains("ambit-cni"));
        let entry = entry.context("it has a line of its own")?;
        let kept = lines[..entry].join("\n");
        let kept = kept
            .strip_suffix(',')
            .context("a comma joins it to the others")?;
        let without = format!("{kept}\n{}", lines[entry + 1..].join("\n"));
        let write = format!("printf %s \"$1\" >{LIST}");
        cluster.on_node(node, &["sh", "-c", &write, "sh", &without])?;
        eventually(Duration::from_secs(10), "it is back", || {
            let list = list(&cluster)?;
            ensure!(
                kinds(&list).last().is_some_and(|kind| kind == "ambit-cni"),
                "{list}"
            );
            Ok(())
        })?;
        assert_eq!(cluster.on_node(node, &["cat", LIST])?, before);
    }
    Ok(())
}
