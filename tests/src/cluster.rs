//! The running cluster: its objects through kubectl, its nodes through their namespaces.

use std::net::IpAddr;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::command::{self, Outcome};
use crate::wait::eventually;

/// Namespace of Ambit's own programs.
pub const SYSTEM: &str = "ambit-system";

/// Label that brings a namespace or a pod into the mesh, or keeps a pod out.
pub const MODE_LABEL: &str = "istio.io/dataplane-mode";

/// The cluster that `tests/run-cluster-rings` brought up.
#[derive(Clone, Debug)]
pub struct Cluster {
    kubectl: String,
}

impl Cluster {
    /// The cluster that the environment names.
    ///
    /// # Errors
    /// If there is none: these tests do not run without a cluster.
    pub fn current() -> Result<Self> {
        let kubectl = setting("AMBIT_KUBECTL")?;
        setting("KUBECONFIG")?;
        Ok(Self { kubectl })
    }

    /// Path of kubectl.
    #[must_use]
    pub fn program(&self) -> &str {
        &self.kubectl
    }

    /// Runs kubectl; a failure is part of the outcome.
    ///
    /// # Errors
    /// If kubectl cannot be started.
    pub fn try_kubectl(&self, arguments: &[&str], input: &str) -> Result<Outcome> {
        command::run(Command::new(&self.kubectl).args(arguments), input)
    }

    /// Runs kubectl; what it printed.
    ///
    /// # Errors
    /// If it fails.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        self.try_kubectl(arguments, "")?
            .success()
            .with_context(|| format!("kubectl {}", arguments.join(" ")))
    }

    /// Applies manifests, given as YAML or JSON.
    ///
    /// # Errors
    /// If the API server refuses one.
    pub fn apply(&self, manifests: &str) -> Result<String> {
        self.try_kubectl(&["apply", "-f", "-"], manifests)?
            .success()
            .context("kubectl apply")
    }

    /// `kubectl get … -o json`.
    ///
    /// # Errors
    /// If kubectl fails or prints no JSON.
    pub fn get(&self, arguments: &[&str]) -> Result<Value> {
        let mut all = vec!["get", "-o", "json"];
        all.extend(arguments);
        Ok(serde_json::from_str(&self.kubectl(&all)?)?)
    }

    /// The AmbientNode of `node`.
    ///
    /// # Errors
    /// If it does not exist.
    pub fn ambient_node(&self, node: &str) -> Result<Value> {
        self.get(&["ambientnode", node])
    }

    /// Waits until every pod of `namespace` is ready.
    ///
    /// # Errors
    /// If one is not after a minute.
    pub fn wait_ready(&self, namespace: &str) -> Result<()> {
        self.kubectl(&[
            "-n",
            namespace,
            "wait",
            "--for=condition=Ready",
            "pod",
            "--all",
            "--timeout=60s",
        ])
        .map(drop)
    }

    /// Waits until every pod of `namespace` that should be is in the mesh; how long it took.
    ///
    /// # Errors
    /// If one is not within `limit`.
    pub fn wait_in_mesh(&self, namespace: &str, limit: Duration) -> Result<Duration> {
        eventually(limit, "in the mesh", || {
            let pods = self.get(&["-n", namespace, "pods"])?;
            let nodes = self.get(&["ambientnodes"])?;
            for pod in items(&pods).filter(|pod| wants_mesh(pod)) {
                let node = items(&nodes)
                    .find(|node| node["metadata"]["name"] == pod["spec"]["nodeName"])
                    .with_context(|| format!("no AmbientNode of {}", pod["spec"]["nodeName"]))?;
                if !enrolled(node, &pod["metadata"]["uid"]) {
                    bail!("{}: {}", pod["metadata"]["name"], summary(node));
                }
            }
            Ok(())
        })
    }

    /// Waits until every one of Ambit's programs runs as its manifest says, and every node is Ready.
    ///
    /// # Errors
    /// If one does not within a minute and a half.
    pub fn wait_recovered(&self) -> Result<()> {
        for workload in [
            "deployment/ambit-controller",
            "daemonset/ambit-node-agent",
            "daemonset/ambit-proxy",
        ] {
            self.kubectl(&["-n", SYSTEM, "rollout", "status", workload, "--timeout=90s"])?;
        }
        self.wait_mesh_ready(Duration::from_secs(90)).map(drop)
    }

    /// Waits until the AmbientNodes of all nodes are Ready, as they are now; how long it took.
    ///
    /// # Errors
    /// If one is not within `limit`.
    pub fn wait_mesh_ready(&self, limit: Duration) -> Result<Duration> {
        eventually(limit, "mesh ready", || {
            for node in self.nodes()? {
                let object = self.ambient_node(&node)?;
                ensure!(is_ready(&object), "{node}: {}", summary(&object));
            }
            Ok(())
        })
    }

    /// Names of the nodes, in order.
    ///
    /// # Errors
    /// If kubectl fails.
    pub fn nodes(&self) -> Result<Vec<String>> {
        let names = self.kubectl(&["get", "nodes", "-o", "jsonpath={.items[*].metadata.name}"])?;
        Ok(names.split_whitespace().map(str::to_owned).collect())
    }

    /// One condition of a node's AmbientNode; null if it is not there.
    ///
    /// # Errors
    /// If the AmbientNode does not exist.
    pub fn condition(&self, node: &str, kind: &str) -> Result<Value> {
        let object = self.ambient_node(node)?;
        Ok(condition_of(&object, kind).cloned().unwrap_or_default())
    }

    /// Waits until a condition of `node` has this status and reason; its message.
    ///
    /// # Errors
    /// If it does not within `limit`.
    pub fn wait_condition(
        &self,
        node: &str,
        (kind, status, reason): (&str, &str, &str),
        limit: Duration,
    ) -> Result<String> {
        let mut message = String::new();
        eventually(limit, kind, || {
            let condition = self.condition(node, kind)?;
            if condition["status"] != status || condition["reason"] != reason {
                bail!("{node}: wanted {status} {reason}, have {condition}");
            }
            message = condition["message"].as_str().unwrap_or_default().to_owned();
            Ok(())
        })?;
        Ok(message)
    }

    /// A merge patch of an AmbientNode's spec.
    ///
    /// # Errors
    /// If the API server refuses it.
    pub fn patch_spec(&self, node: &str, spec: &Value) -> Result<()> {
        let patch = json!({"spec": spec}).to_string();
        self.kubectl(&["patch", "ambientnode", node, "--type=merge", "-p", &patch])
            .map(drop)
    }

    /// How often the containers of a pod of Ambit's were started anew.
    ///
    /// # Errors
    /// If the pod does not exist.
    pub fn restarts(&self, pod: &str) -> Result<u32> {
        let path = ".status.containerStatuses[0].restartCount";
        Ok(self.pod_field(SYSTEM, pod, path)?.parse()?)
    }

    /// A field of a pod, as a JSON path.
    ///
    /// # Errors
    /// If the pod does not exist.
    pub fn pod_field(&self, namespace: &str, pod: &str, path: &str) -> Result<String> {
        self.kubectl(&[
            "-n",
            namespace,
            "get",
            "pod",
            pod,
            "-o",
            &format!("jsonpath={{{path}}}"),
        ])
    }

    /// The addresses of a pod, of both families.
    ///
    /// # Errors
    /// If the pod does not exist or has none.
    pub fn pod_ips(&self, namespace: &str, pod: &str) -> Result<Vec<IpAddr>> {
        let ips = self.pod_field(namespace, pod, ".status.podIPs[*].ip")?;
        ips.split(' ')
            .map(|ip| {
                ip.parse()
                    .with_context(|| format!("addresses of {pod}: {ips:?}"))
            })
            .collect()
    }

    /// The one pod of `namespace` with this label on `node`.
    ///
    /// # Errors
    /// If there is none.
    pub fn pod_on(&self, namespace: &str, label: &str, node: &str) -> Result<String> {
        let field = format!("--field-selector=spec.nodeName={node}");
        let pods = self.get(&["-n", namespace, "pods", "-l", label, &field])?;
        items(&pods)
            .map(|pod| &pod["metadata"])
            .find(|pod| pod["deletionTimestamp"].is_null())
            .and_then(|pod| pod["name"].as_str())
            .map(str::to_owned)
            .with_context(|| format!("no pod {label} of {namespace} on {node}"))
    }

    /// The one pod of Ambit's own program on `node`.
    ///
    /// # Errors
    /// If there is none.
    pub fn system_pod(&self, program: &str, node: &str) -> Result<String> {
        self.pod_on(SYSTEM, &format!("app.kubernetes.io/name={program}"), node)
    }

    /// The pod of the controller that leads, as its lease says.
    ///
    /// # Errors
    /// If nobody does.
    pub fn leader(&self) -> Result<String> {
        let path = "jsonpath={.spec.holderIdentity}";
        let leader =
            self.kubectl(&["-n", SYSTEM, "get", "lease", "ambit-controller", "-o", path])?;
        ensure!(!leader.is_empty(), "nobody leads");
        Ok(leader)
    }

    /// Runs a command in a pod; a failure is part of the outcome.
    ///
    /// # Errors
    /// If kubectl cannot be started.
    pub fn exec(&self, namespace: &str, pod: &str, arguments: &[&str]) -> Result<Outcome> {
        let mut all = vec!["-n", namespace, "exec", pod, "--"];
        all.extend(arguments);
        self.try_kubectl(&all, "")
    }

    /// Runs a program on `node`, as its administrator would there.
    ///
    /// # Errors
    /// If it cannot be started or fails.
    pub fn on_node(&self, node: &str, arguments: &[&str]) -> Result<String> {
        let mut all = node_words(node)?;
        all.extend(arguments.iter().map(|&argument| argument.to_owned()));
        command::run(Command::new(&all[0]).args(&all[1..]), "")?
            .success()
            .with_context(|| format!("on {node}: {}", arguments.join(" ")))
    }

    /// The backend of what `node` itself calls iptables: nft or legacy.
    ///
    /// # Errors
    /// If it has none.
    pub fn iptables(&self, node: &str) -> Result<&'static str> {
        let version = self.on_node(node, &["iptables", "--version"])?;
        Ok(if version.contains("nf_tables") {
            "nft"
        } else {
            "legacy"
        })
    }
}

/// The command line in front of a command that is to run on `node`.
///
/// # Errors
/// If there is no cluster.
pub fn node_words(node: &str) -> Result<Vec<String>> {
    Ok(vec![
        setting("AMBIT_ENTER")?,
        setting("AMBIT_CLUSTER_NAME")?,
        node.to_owned(),
    ])
}

/// The objects of a list.
pub fn items(list: &Value) -> impl Iterator<Item = &Value> {
    list["items"].as_array().into_iter().flatten()
}

fn wants_mesh(pod: &Value) -> bool {
    pod["spec"]["hostNetwork"] != true && pod["metadata"]["labels"][MODE_LABEL] != "none"
}

/// Whether an AmbientNode's status speaks of its spec as it is now.
fn is_settled(node: &Value) -> bool {
    node["status"]["observedGeneration"] == node["metadata"]["generation"]
}

/// One condition of an AmbientNode, if it is there.
fn condition_of<'a>(node: &'a Value, kind: &str) -> Option<&'a Value> {
    let conditions = node["status"]["conditions"].as_array()?;
    conditions
        .iter()
        .find(|condition| condition["type"] == kind)
}

fn is_ready(node: &Value) -> bool {
    let ready = condition_of(node, "Ready");
    is_settled(node) && ready.is_some_and(|ready| ready["status"] == "True")
}

/// Whether an AmbientNode's status speaks of its present spec and has this pod in the mesh.
fn enrolled(node: &Value, uid: &Value) -> bool {
    let has = |list: &Value| {
        let entries = list.as_array().into_iter().flatten();
        entries.into_iter().any(|entry| entry["uid"] == *uid)
    };
    is_settled(node) && has(&node["spec"]["workloads"]) && !has(&node["status"]["pending"])
}

/// What an AmbientNode says, in short.
fn summary(node: &Value) -> String {
    let status = &node["status"];
    let conditions = status["conditions"].as_array().into_iter().flatten();
    let wrong: Vec<String> = conditions
        .filter(|condition| condition["status"] != "True")
        .map(|condition| {
            let field = |name: &str| condition[name].as_str().unwrap_or_default();
            format!(
                "{}={}: {}",
                field("type"),
                field("reason"),
                field("message")
            )
        })
        .collect();
    format!(
        "generation {} observed {}, {} workloads, {} enrolled, pending {}; {}",
        node["metadata"]["generation"],
        status["observedGeneration"],
        node["spec"]["workloads"].as_array().map_or(0, Vec::len),
        status["enrolled"],
        status["pending"],
        wrong.join("; ")
    )
}

/// A setting that the script that runs these tests makes.
///
/// # Errors
/// If it is not set.
pub fn setting(name: &str) -> Result<String> {
    std::env::var(name).with_context(|| {
        format!(
            "{name} is not set: run these tests with tests/run-cluster-rings, they need its cluster"
        )
    })
}
