//! What is wrong is refused, or said where a person looks for it.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mesh_tests::cluster::{Cluster, SYSTEM, items};
use mesh_tests::guard::{Namespace, Undo};
use mesh_tests::manifest::Pod;
use mesh_tests::stage::{NODE_1, NODE_2};
use mesh_tests::state;
use mesh_tests::wait::eventually;
use serde_json::{Value, json};

/// What the API server says to this change of an AmbientNode's spec.
fn refusal_of(spec: &Value) -> Result<String> {
    let patch = json!({"spec": spec}).to_string();
    let call = [
        "patch",
        "ambientnode",
        NODE_1,
        "--type=merge",
        "--dry-run=server",
        "-p",
        &patch,
    ];
    Cluster::current()?.try_kubectl(&call, "")?.failure()
}

#[test]
fn overlapping_networks_of_the_tunnels_are_refused() -> Result<()> {
    let inbound = json!({"vni": 1000, "cidr": "192.168.126.0/24"});
    let outbound = json!({"vni": 1001, "cidr": "192.168.126.4/30"});
    let said = refusal_of(&json!({"tunnel": {"inbound": inbound, "outbound": outbound}}))?;
    ensure!(
        said.contains("the tunnels' cidr must not overlap"),
        "{said}"
    );
    Ok(())
}

#[test]
fn a_network_that_is_none_is_refused() -> Result<()> {
    let said = refusal_of(&json!({"tunnel": {"inbound": {"vni": 1000, "cidr": "192.168.126.0"}}}))?;
    ensure!(
        said.contains("must be an IPv4 network, for example 192.168.126.0/30"),
        "{said}"
    );
    Ok(())
}

#[test]
fn two_tunnels_of_one_number_are_refused() -> Result<()> {
    let said = refusal_of(&json!({"tunnel": {"inbound": {"vni": 1001}}}))?;
    ensure!(said.contains("the tunnels' vni must differ"), "{said}");
    Ok(())
}

#[test]
fn a_reserved_port_is_refused() -> Result<()> {
    let said = refusal_of(&json!({"ports": {"outbound": 15020}}))?;
    ensure!(
        said.contains("15020") && said.contains("are reserved for Ambit's own"),
        "{said}"
    );
    Ok(())
}

#[test]
fn one_port_for_two_listeners_is_refused() -> Result<()> {
    let said = refusal_of(&json!({"ports": {"outbound": 15008}}))?;
    ensure!(said.contains("the ports must differ"), "{said}");
    Ok(())
}

#[test]
fn a_mark_without_a_mask_is_refused() -> Result<()> {
    let said = refusal_of(&json!({"marks": {"outbound": "0x100"}}))?;
    ensure!(
        said.contains("must be value/mask in hexadecimal, for example 0x100/0x100"),
        "{said}"
    );
    Ok(())
}

#[test]
fn a_mark_outside_its_mask_gives_a_condition_that_names_the_field() -> Result<()> {
    let cluster = Cluster::current()?;
    let also = cluster.clone();
    let undo = Undo::new(move || {
        also.patch_spec(NODE_2, &json!({"marks": {"outbound": "0x100/0x100"}}))?;
        also.wait_recovered()
    });
    cluster.patch_spec(NODE_2, &json!({"marks": {"outbound": "0x300/0x100"}}))?;
    let wanted = ("Ready", "False", "InvalidSpec");
    let message = cluster.wait_condition(NODE_2, wanted, Duration::from_secs(20))?;
    ensure!(message.contains("marks.outbound"), "{message}");
    undo.now()
}

#[test]
fn a_full_set_gives_a_condition_that_names_the_set() -> Result<()> {
    const SET: &str = "ztunnel-pods-ips";
    let cluster = Cluster::current()?;
    // Who leaves later makes room.
    state::wait_nobody_leaves(&cluster)?;
    // A set of the same name, as full as one can be, in the place of the real one.
    let swap = |cluster: &Cluster, size: &str| -> Result<()> {
        let ipset = |words: &[&str]| cluster.on_node(NODE_2, &[&["ipset"], words].concat());
        let members = ipset(&["list", SET, "-output", "save"])?;
        ipset(&[
            "create",
            "ambit-test",
            "hash:ip",
            "family",
            "inet",
            "hashsize",
            "64",
            "maxelem",
            size,
        ])?;
        for member in members
            .lines()
            .filter_map(|line| line.strip_prefix(&format!("add {SET} ")))
        {
            ipset(&["add", "ambit-test", member])?;
        }
        ipset(&["swap", "ambit-test", SET])?;
        ipset(&["destroy", "ambit-test"]).map(drop)
    };
    let listed = cluster.on_node(NODE_2, &["ipset", "list", SET, "-output", "save"])?;
    let members = listed.matches(&format!("add {SET} ")).count().max(1);
    let also = cluster.clone();
    let undo = Undo::new(move || {
        swap(&also, "65536")?;
        also.wait_recovered()
    });
    swap(&cluster, &members.to_string())?;
    let namespace = Namespace::create(&cluster, "full", Some("ambient"))?;
    for pod in ["one", "two"] {
        cluster.apply(&Pod::new(&namespace.name, pod, NODE_2).manifests())?;
    }
    let wanted = ("RedirectionReady", "False", "SetFull");
    let message = cluster.wait_condition(NODE_2, wanted, Duration::from_secs(30))?;
    ensure!(message.contains(SET), "{message}");
    undo.now()?;
    cluster
        .wait_in_mesh(&namespace.name, Duration::from_secs(40))
        .map(drop)
}

/// Sets a variable of the environment in a DaemonSet or Deployment; `-` at its end takes it away.
fn set_env(cluster: &Cluster, workload: &str, variable: &str) -> Result<()> {
    cluster
        .kubectl(&["-n", SYSTEM, "set", "env", workload, variable])
        .map(drop)
}

#[test]
fn missing_iptables_give_a_condition_that_names_the_program() -> Result<()> {
    const AGENTS: &str = "daemonset/ambit-node-agent";
    let cluster = Cluster::current()?;
    let also = cluster.clone();
    let undo = Undo::new(move || {
        set_env(&also, AGENTS, "PATH-")?;
        also.wait_recovered()
    });
    set_env(&cluster, AGENTS, "PATH=/nowhere")?;
    let mut message = String::new();
    eventually(Duration::from_secs(60), "an agent misses iptables", || {
        for node in [NODE_1, NODE_2] {
            let condition = cluster.condition(node, "RedirectionReady")?;
            if condition["reason"] == "IptablesMissing" {
                message = condition["message"].as_str().unwrap_or_default().to_owned();
                return Ok(());
            }
        }
        anyhow::bail!("no node has the reason IptablesMissing")
    })?;
    ensure!(
        message.contains("iptables") && message.contains("install"),
        "{message}"
    );
    undo.now()
}

/// The log of the newest pod of the controller, with that of its run before.
fn newest_controllers_log(cluster: &Cluster) -> Result<String> {
    let pods = cluster.get(&[
        "-n",
        SYSTEM,
        "pods",
        "-l",
        "app.kubernetes.io/name=ambit-controller",
    ])?;
    let newest = items(&pods)
        .map(|pod| &pod["metadata"])
        .max_by_key(|pod| pod["creationTimestamp"].as_str().map(str::to_owned))
        .and_then(|pod| pod["name"].as_str())
        .context("no controller")?;
    let now = cluster.try_kubectl(&["-n", SYSTEM, "logs", newest], "")?;
    let before = cluster.try_kubectl(&["-n", SYSTEM, "logs", newest, "--previous"], "")?;
    Ok(now.stdout + &before.stdout)
}

/// Deletes one replica of the controller, so that a new one starts.
fn renew_a_controller(cluster: &Cluster) -> Result<()> {
    let pod = cluster.kubectl(&[
        "-n",
        SYSTEM,
        "get",
        "pods",
        "-l",
        "app.kubernetes.io/name=ambit-controller",
        "-o",
        "jsonpath={.items[0].metadata.name}",
    ])?;
    cluster
        .kubectl(&["-n", SYSTEM, "delete", "pod", &pod, "--wait=false"])
        .map(drop)
}

#[test]
fn an_unreadable_ca_secret_stops_a_new_controller_with_words_that_name_it() -> Result<()> {
    let cluster = Cluster::current()?;
    let key = cluster.kubectl(&[
        "-n",
        SYSTEM,
        "get",
        "secret",
        "ambit-ca",
        "-o",
        r"jsonpath={.data.tls\.key}",
    ])?;
    let set = |cluster: &Cluster, key: &str| {
        let patch = json!({"data": {"tls.key": key}}).to_string();
        cluster.kubectl(&[
            "-n",
            SYSTEM,
            "patch",
            "secret",
            "ambit-ca",
            "--type=merge",
            "-p",
            &patch,
        ])
    };
    let also = cluster.clone();
    let undo = Undo::new(move || {
        set(&also, &key)?;
        renew_the_broken(&also)?;
        also.wait_recovered()
    });
    // "not a key"
    set(&cluster, "bm90IGEga2V5")?;
    renew_a_controller(&cluster)?;
    eventually(
        Duration::from_secs(40),
        "it says why it does not start",
        || {
            let log = newest_controllers_log(&cluster)?;
            ensure!(
                log.contains("Secret ambit-system/ambit-ca")
                    && log.contains("correct or delete it"),
                "{log}"
            );
            Ok(())
        },
    )?;
    undo.now()
}

/// Deletes the controllers that do not run: kubelet would wait long before it tries them again.
fn renew_the_broken(cluster: &Cluster) -> Result<()> {
    let pods = cluster.get(&[
        "-n",
        SYSTEM,
        "pods",
        "-l",
        "app.kubernetes.io/name=ambit-controller",
    ])?;
    for pod in items(&pods).filter(|pod| pod["status"]["containerStatuses"][0]["ready"] != true) {
        let name = pod["metadata"]["name"]
            .as_str()
            .context("a pod without a name")?;
        cluster.kubectl(&["-n", SYSTEM, "delete", "pod", name, "--wait=false"])?;
    }
    Ok(())
}

#[test]
fn a_missing_right_of_the_controller_is_named_in_its_log() -> Result<()> {
    let cluster = Cluster::current()?;
    let undo = without_binding(&cluster, "ambit-controller")?;
    renew_a_controller(&cluster)?;
    eventually(Duration::from_secs(40), "it names the right", || {
        let log = newest_controllers_log(&cluster)?;
        ensure!(
            log.contains("cannot list resource \\\"pods\\\"")
                || log.contains("cannot list resource \"pods\""),
            "{log}"
        );
        Ok(())
    })?;
    undo.now()
}

#[test]
fn a_missing_right_of_the_agent_is_named_in_its_log() -> Result<()> {
    let cluster = Cluster::current()?;
    let undo = without_binding(&cluster, "ambit-node-agent")?;
    let pod = cluster.system_pod("ambit-node-agent", NODE_2)?;
    cluster.kubectl(&["-n", SYSTEM, "delete", "pod", &pod])?;
    eventually(Duration::from_secs(40), "it names the right", || {
        let pod = cluster.system_pod("ambit-node-agent", NODE_2)?;
        let log = cluster
            .try_kubectl(&["-n", SYSTEM, "logs", &pod], "")?
            .stdout;
        ensure!(
            log.contains("ambientnodes") && log.contains("forbidden"),
            "{log}"
        );
        Ok(())
    })?;
    undo.now()
}

/// Takes a ClusterRoleBinding away until the end of the test.
fn without_binding(cluster: &Cluster, name: &str) -> Result<Undo> {
    let mut binding = cluster.get(&["clusterrolebinding", name])?;
    binding["metadata"] = json!({"name": name, "labels": binding["metadata"]["labels"], "annotations": binding["metadata"]["annotations"]});
    let also = cluster.clone();
    let undo = Undo::new(move || {
        also.apply(&binding.to_string())?;
        also.wait_recovered()
    });
    cluster.kubectl(&["delete", "clusterrolebinding", name])?;
    Ok(undo)
}
