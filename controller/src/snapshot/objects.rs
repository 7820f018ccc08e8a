//! Plain copies of the parts of Kubernetes objects that matter here.
//!
//! The border: what an object says is parsed here, once. What cannot be parsed is left out.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use crds::{AmbientNode, FailureMode};
use jiff::Timestamp;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::owner::Owner;
use crate::names::{NamespaceName, NodeName, PodKey, PodUid};

/// Containers by these names carry a pod's traffic themselves.
const SIDECARS: [&str; 2] = ["istio-proxy", "linkerd-proxy"];

/// Where something runs.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Locality {
    pub(crate) region: String,
    pub(crate) zone: String,
    pub(crate) subzone: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Node {
    pub(crate) name: NodeName,
    pub(crate) uid: Arc<str>,
    pub(crate) created: Option<Timestamp>,
    pub(crate) linux: bool,
    /// What tells the boot that its kubelet runs in from every other.
    pub(crate) boot: Option<Arc<str>>,
    /// Keys of its taints.
    pub(crate) taints: BTreeSet<Arc<str>>,
    pub(crate) locality: Locality,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Namespace {
    pub(crate) name: NamespaceName,
    /// Value of the enrolment label.
    pub(crate) mode: Option<Arc<str>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Pod {
    pub(crate) uid: PodUid,
    pub(crate) key: PodKey,
    pub(crate) created: Option<Timestamp>,
    pub(crate) node: Option<NodeName>,
    pub(crate) service_account: Arc<str>,
    pub(crate) ips: Vec<IpAddr>,
    pub(crate) host_network: bool,
    /// Succeeded or Failed: its address may belong to another pod by now.
    pub(crate) terminal: bool,
    /// Deletion was asked for.
    pub(crate) terminating: bool,
    pub(crate) ready: bool,
    /// Value of the enrolment label.
    pub(crate) mode: Option<Arc<str>>,
    /// The container that is a sidecar proxy.
    pub(crate) sidecar: Option<&'static str>,
    pub(crate) owner: Owner,
    pub(crate) canonical_name: Arc<str>,
    pub(crate) canonical_revision: Arc<str>,
}

/// What an AmbientNode holds of what the controller writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct WrittenNode {
    pub(crate) name: NodeName,
    pub(crate) created: Option<Timestamp>,
    /// UID of the Node that owns it.
    pub(crate) owner: Option<Arc<str>>,
    pub(crate) deleting: bool,
    /// Its `failureMode` is `Open`.
    pub(crate) fails_open: bool,
    /// The boot in which its node became ready.
    pub(crate) ready_boot: Option<Arc<str>>,
    pub(crate) workloads: Vec<crds::Workload>,
    pub(crate) excluded: Vec<crds::WorkloadNote>,
    pub(crate) mesh_namespaces: Vec<String>,
    pub(crate) outside: Vec<String>,
}

// === impl Node ===

impl Node {
    pub(crate) fn parse(node: &core::Node) -> Option<Self> {
        let meta = &node.metadata;
        let label = |key: &str| label(meta, key).unwrap_or_default().to_owned();
        let info = node.status.as_ref().and_then(|it| it.node_info.as_ref());
        let taints = node
            .spec
            .iter()
            .flat_map(|spec| spec.taints.iter().flatten());
        Some(Self {
            name: meta.name.as_deref()?.into(),
            uid: meta.uid.as_deref()?.into(),
            created: created(meta),
            boot: info
                .map(|info| info.boot_id.as_str().into())
                .filter(|boot: &Arc<str>| !boot.is_empty()),
            taints: taints.map(|taint| taint.key.as_str().into()).collect(),
            // Every kubelet sets it; a Node made by hand without it gets the benefit of the doubt.
            linux: matches!(label("kubernetes.io/os").as_str(), "" | "linux"),
            locality: Locality {
                region: label("topology.kubernetes.io/region"),
                zone: label("topology.kubernetes.io/zone"),
                subzone: label("topology.istio.io/subzone"),
            },
        })
    }
}

// === impl Namespace ===

impl Namespace {
    pub(crate) fn parse(meta: &ObjectMeta, enrolment_label: &str) -> Option<Self> {
        Some(Self {
            name: meta.name.as_deref()?.into(),
            mode: label(meta, enrolment_label).map(Into::into),
        })
    }
}

// === impl Pod ===

impl Pod {
    pub(crate) fn parse(pod: &core::Pod, enrolment_label: &str) -> Option<Self> {
        let meta = &pod.metadata;
        let spec = pod.spec.as_ref()?;
        let status = pod.status.as_ref();
        let name = meta.name.as_deref()?;
        let owner = Owner::parse(meta);
        let label = |keys: &[&str]| keys.iter().find_map(|key| label(meta, key));
        Some(Self {
            uid: meta.uid.as_deref()?.into(),
            key: PodKey::new(meta.namespace.as_deref()?, name),
            created: created(meta),
            node: spec.node_name.as_deref().map(Into::into),
            service_account: spec
                .service_account_name
                .as_deref()
                .unwrap_or("default")
                .into(),
            ips: status.map(pod_ips).unwrap_or_default(),
            host_network: spec.host_network.unwrap_or(false),
            terminal: matches!(
                status.and_then(|status| status.phase.as_deref()),
                Some("Succeeded" | "Failed")
            ),
            terminating: meta.deletion_timestamp.is_some(),
            ready: status.is_some_and(is_ready),
            mode: label(&[enrolment_label]).map(Into::into),
            sidecar: sidecar(spec),
            canonical_name: label(&[
                "service.istio.io/canonical-name",
                "app.kubernetes.io/name",
                "app",
            ])
            .unwrap_or(&owner.name)
            .into(),
            canonical_revision: label(&[
                "service.istio.io/canonical-revision",
                "app.kubernetes.io/version",
                "version",
            ])
            .unwrap_or("latest")
            .into(),
            owner,
        })
    }
}

fn pod_ips(status: &core::PodStatus) -> Vec<IpAddr> {
    let mut ips: Vec<IpAddr> = status
        .pod_ips
        .iter()
        .flatten()
        .map(|entry| entry.ip.as_str())
        .chain(status.pod_ip.as_deref())
        .filter_map(address)
        .collect();
    ips.sort_unstable();
    ips.dedup();
    ips
}

/// An IPv4-mapped address is the IPv4 address that it stands for.
pub(super) fn address(text: &str) -> Option<IpAddr> {
    text.parse()
        .ok()
        .map(|address: IpAddr| address.to_canonical())
}

fn is_ready(status: &core::PodStatus) -> bool {
    status
        .conditions
        .iter()
        .flatten()
        .any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

fn sidecar(spec: &core::PodSpec) -> Option<&'static str> {
    let containers = spec
        .init_containers
        .iter()
        .flatten()
        .chain(&spec.containers);
    containers
        .filter_map(|container| SIDECARS.into_iter().find(|name| *name == container.name))
        .next()
}

// === impl WrittenNode ===

impl WrittenNode {
    pub(crate) fn parse(object: &AmbientNode) -> Option<Self> {
        let meta = &object.metadata;
        let owners = meta.owner_references.iter().flatten();
        Some(Self {
            name: meta.name.as_deref()?.into(),
            created: created(meta),
            owner: owners
                .filter(|owner| owner.kind == "Node")
                .map(|owner| owner.uid.as_str().into())
                .next(),
            deleting: meta.deletion_timestamp.is_some(),
            fails_open: object.spec.failure_mode == FailureMode::Open,
            ready_boot: object
                .status
                .as_ref()
                .and_then(|status| status.ready_boot_id.as_deref())
                .map(Into::into),
            workloads: object.spec.workloads.clone(),
            excluded: object.spec.excluded.clone(),
            mesh_namespaces: object.spec.mesh_namespaces.clone(),
            outside: object.spec.outside.clone(),
        })
    }
}

fn created(meta: &ObjectMeta) -> Option<Timestamp> {
    meta.creation_timestamp.as_ref().map(|time| time.0)
}

pub(super) fn label<'a>(meta: &'a ObjectMeta, key: &str) -> Option<&'a str> {
    let labels: &BTreeMap<String, String> = meta.labels.as_ref()?;
    labels.get(key).map(String::as_str)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(change: impl Fn(&mut Value)) -> Pod {
        let mut object = json!({
            "metadata": {
                "name": "web-1", "namespace": "shop", "uid": "u1",
                "creationTimestamp": "2026-01-02T03:04:05Z",
                "labels": {"app": "web", "version": "v2", "mesh": "in"},
            },
            "spec": {
                "nodeName": "n1", "serviceAccountName": "web",
                "containers": [{"name": "web"}],
            },
            "status": {
                "phase": "Running", "podIP": "10.0.0.1",
                "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}],
                "conditions": [{"type": "Ready", "status": "True"}],
            },
        });
        change(&mut object);
        Pod::parse(&serde_json::from_value(object).unwrap(), "mesh").unwrap()
    }

    #[test]
    fn a_pod_is_read_with_all_its_addresses() {
        let pod = pod(|_| {});
        assert_eq!(pod.uid, "u1".into());
        assert_eq!(pod.node, Some("n1".into()));
        let ips: Vec<String> = pod.ips.iter().map(ToString::to_string).collect();
        assert_eq!(ips, ["10.0.0.1", "fd00::1"]);
        assert!(pod.ready && !pod.terminal && !pod.terminating && !pod.host_network);
        assert_eq!(pod.mode.as_deref(), Some("in"));
        assert_eq!(&*pod.canonical_name, "web");
        assert_eq!(&*pod.canonical_revision, "v2");
    }

    #[test]
    fn a_pod_that_was_just_made_is_read_too() {
        let pod = pod(|object| {
            object["status"] = json!({});
            object["spec"] = json!({"containers": []});
            object["metadata"]["labels"] = json!({});
        });
        assert!(pod.ips.is_empty() && pod.node.is_none() && !pod.ready);
        assert_eq!(&*pod.service_account, "default");
        assert_eq!(&*pod.canonical_name, "web-1");
        assert_eq!(&*pod.canonical_revision, "latest");
    }

    #[test]
    fn a_sidecar_is_seen_among_containers_and_init_containers() {
        assert_eq!(pod(|_| {}).sidecar, None);
        for place in ["containers", "initContainers"] {
            let pod = pod(|object| {
                object["spec"][place] = json!([{"name": "x"}, {"name": "istio-proxy"}]);
            });
            assert_eq!(pod.sidecar, Some("istio-proxy"), "{place}");
        }
    }

    #[test]
    fn a_failed_or_succeeded_pod_is_terminal() {
        for phase in ["Failed", "Succeeded"] {
            assert!(pod(|object| object["status"]["phase"] = json!(phase)).terminal);
        }
    }

    #[test]
    fn a_node_of_another_system_is_no_linux_node() {
        let node = |labels: Value| {
            let node = json!({"metadata": {"name": "n1", "uid": "u", "labels": labels}});
            Node::parse(&serde_json::from_value(node).unwrap()).unwrap()
        };
        assert!(node(json!({"kubernetes.io/os": "linux"})).linux);
        assert!(!node(json!({"kubernetes.io/os": "windows"})).linux);
        let zone = node(json!({"topology.kubernetes.io/zone": "z1"}))
            .locality
            .zone;
        assert_eq!(zone, "z1");
    }

    #[test]
    fn a_node_is_read_with_its_boot_and_its_taints() {
        let node = |boot: &str| {
            let mut info = json!({"bootID": boot});
            for field in [
                "architecture",
                "containerRuntimeVersion",
                "kernelVersion",
                "kubeProxyVersion",
                "kubeletVersion",
                "machineID",
                "operatingSystem",
                "osImage",
                "systemUUID",
            ] {
                info[field] = json!("");
            }
            let node = json!({
                "metadata": {"name": "n1", "uid": "u"},
                "spec": {"taints": [{"key": "a", "effect": "NoSchedule"}]},
                "status": {"nodeInfo": info},
            });
            Node::parse(&serde_json::from_value(node).unwrap()).unwrap()
        };
        assert_eq!(node("b1").boot.as_deref(), Some("b1"));
        assert_eq!(node("").boot, None);
        assert_eq!(node("b1").taints, [Arc::from("a")].into());
    }
}
