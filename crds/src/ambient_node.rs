//! `AmbientNode`: what one node should do for the mesh, and what it does.
#![allow(
    clippy::duplicated_attributes,
    reason = "clippy takes the columns of one kube attribute for duplicates"
)]

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::validation;

/// Desired state of the mesh on one node. Named like the Node and owned by it.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "ambit.mesh",
    version = "v1alpha1",
    kind = "AmbientNode",
    plural = "ambientnodes",
    shortname = "an",
    status = "AmbientNodeStatus",
    derive = "PartialEq",
    doc = "What one node should do for the mesh, and what it does. Named like the Node and owned by it.",
    printcolumn(name = "Tunnel", type_ = "string", json_path = ".spec.tunnel.type"),
    printcolumn(name = "Workloads", type_ = "integer", json_path = ".status.workloads"),
    printcolumn(name = "Enrolled", type_ = "integer", json_path = ".status.enrolled"),
    printcolumn(
        name = "Ready",
        type_ = "string",
        json_path = r#".status.conditions[?(@.type=="Ready")].status"#
    ),
    printcolumn(
        name = "Reason",
        type_ = "string",
        json_path = r#".status.conditions[?(@.type=="Ready")].reason"#
    ),
    printcolumn(
        name = "Age",
        type_ = "date",
        json_path = ".metadata.creationTimestamp"
    )
)]
#[serde(rename_all = "camelCase")]
pub struct AmbientNodeSpec {
    /// The devices that join the host's network namespace and the proxy's.
    #[serde(default)]
    pub tunnel: TunnelSpec,
    /// The proxy's listeners.
    #[serde(default)]
    pub ports: PortsSpec,
    /// Packet marks, each `value/mask` in hexadecimal.
    #[serde(default)]
    pub marks: MarksSpec,
    /// What enrolled pods' traffic does while the node has no working proxy.
    #[serde(default)]
    pub failure_mode: FailureMode,
    /// How two mesh pods of this node reach each other.
    #[serde(default)]
    pub local_traffic: LocalTraffic,
    /// The node's pods that are in the mesh. Written by the controller, as a whole: what others add goes again, and the
    /// API server need not know who wrote which of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 1000))]
    #[schemars(extend("x-kubernetes-list-type" = "atomic"))]
    pub workloads: Vec<Workload>,
    /// Pods of the node that are labelled for the mesh and stay out, at most 50 of them, each with
    /// its reason. Written by the controller; the agent repeats them in its status.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 50))]
    pub excluded: Vec<WorkloadNote>,
    /// Namespaces whose new pods are held back on this node until they are enrolled. Written by the
    /// controller.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 10000), inner(length(max = 63)))]
    #[schemars(extend("x-kubernetes-list-type" = "atomic"))]
    pub mesh_namespaces: Vec<String>,
    /// UIDs of the node's pods of these namespaces that stay out of the mesh: they are not held back.
    /// Written by the controller.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 1000), inner(length(max = 64)))]
    #[schemars(extend("x-kubernetes-list-type" = "atomic"))]
    pub outside: Vec<String>,
}

/// The two tunnels between host and proxy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("x-kubernetes-validations" = validation::tunnels()))]
pub struct TunnelSpec {
    /// Kind of device.
    #[serde(rename = "type")]
    pub kind: TunnelType,
    /// UDP destination port of geneve.
    #[schemars(range(min = 1, max = 65535))]
    pub port: u16,
    /// The tunnel of traffic towards mesh pods.
    pub inbound: TunnelEndSpec,
    /// The tunnel of traffic from mesh pods.
    pub outbound: TunnelEndSpec,
    /// MTU of the devices in bytes. Default: the link's MTU less the encapsulation.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1280, max = 65535))]
    pub mtu: Option<u16>,
}

/// One tunnel.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TunnelEndSpec {
    /// Virtual network identifier, 24 bits (RFC 8926).
    #[schemars(range(min = 1, max = 16_777_215))]
    pub vni: u32,
    /// Inner network of IPv4; its first host address is the host's, its second the proxy's.
    #[schemars(length(max = 18))]
    #[schemars(extend("x-kubernetes-validations" = validation::network()))]
    pub cidr: String,
    /// Inner network of IPv6, where pods have such addresses; its addresses as those of `cidr`.
    /// Default: fd61:6d62:6974:126::/126 (inbound), fd61:6d62:6974:127::/126 (outbound).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 43))]
    #[schemars(extend("x-kubernetes-validations" = validation::ipv6_network()))]
    pub ipv6_cidr: Option<String>,
}

/// Kind of tunnel device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum TunnelType {
    /// Geneve (RFC 8926); the kernel needs its driver.
    #[default]
    Geneve,
    /// A veth pair; works on every kernel and costs no MTU.
    Veth,
}

/// Ports of the proxy's listeners.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("x-kubernetes-validations" = validation::ports()))]
pub struct PortsSpec {
    /// Connections from mesh pods.
    #[schemars(range(min = 1024, max = 65535))]
    pub outbound: u16,
    /// HBONE from other proxies.
    #[schemars(range(min = 1024, max = 65535))]
    pub inbound: u16,
    /// Plaintext towards mesh pods.
    #[schemars(range(min = 1024, max = 65535))]
    pub inbound_plaintext: u16,
}

/// Packet marks, each `value/mask` in hexadecimal; only the mask's bits are read or written.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct MarksSpec {
    /// Host: send to the proxy by the outbound tunnel.
    #[schemars(length(max = 21))]
    #[schemars(extend("x-kubernetes-validations" = validation::mark()))]
    pub outbound: String,
    /// Host: route by the main table.
    #[schemars(length(max = 21))]
    #[schemars(extend("x-kubernetes-validations" = validation::mark()))]
    pub skip: String,
    /// Host: dialled by the proxy from a pod's address.
    #[schemars(length(max = 21))]
    #[schemars(extend("x-kubernetes-validations" = validation::mark()))]
    pub proxied: String,
    /// Host: the same by its successor, while there are two.
    #[schemars(length(max = 21))]
    #[schemars(extend("x-kubernetes-validations" = validation::mark()))]
    pub proxied_second: String,
    /// Host: the proxy's own traffic.
    #[schemars(length(max = 21))]
    #[schemars(extend("x-kubernetes-validations" = validation::mark()))]
    pub own: String,
    /// Host: answer to a proxied connection.
    #[schemars(length(max = 21))]
    #[schemars(extend("x-kubernetes-validations" = validation::mark()))]
    #[serde(rename = "return")]
    pub return_: String,
    /// Host: answer to a connection of its successor, while there are two.
    #[schemars(length(max = 21))]
    #[schemars(extend("x-kubernetes-validations" = validation::mark()))]
    pub return_second: String,
    /// Proxy's namespace: deliver locally (TPROXY).
    #[schemars(length(max = 21))]
    #[schemars(extend("x-kubernetes-validations" = validation::mark()))]
    pub tproxy: String,
    /// Proxy's namespace: deliver locally (answers to transparent sockets).
    #[schemars(length(max = 21))]
    #[schemars(extend("x-kubernetes-validations" = validation::mark()))]
    pub proxy_return: String,
}

/// What enrolled pods' traffic does while the node has no working proxy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum FailureMode {
    /// It fails at once; nothing leaves in the clear.
    #[default]
    Closed,
    /// It goes directly, in the clear.
    Open,
}

/// How two mesh pods of one node reach each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum LocalTraffic {
    /// Identity and policy are checked, then the two sockets are joined.
    #[default]
    Direct,
    /// Through a tunnel, as across nodes.
    Hbone,
}

/// A pod of the node that is in the mesh.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Workload {
    /// UID of the pod.
    #[schemars(length(min = 1, max = 64))]
    pub uid: String,
    /// Namespace of the pod.
    pub namespace: String,
    /// Name of the pod.
    pub name: String,
    /// Service account of the pod.
    pub service_account: String,
    /// Addresses of the pod.
    #[schemars(length(max = 4))]
    pub ips: Vec<String>,
}

/// What the node's agent observed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct AmbientNodeStatus {
    /// Generation of the spec that this status speaks of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// `Ready` and, for each part of it, what is and what is not.
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
    /// The host's address towards its pods.
    #[serde(skip_serializing_if = "Option::is_none", rename = "hostIP")]
    pub host_ip: Option<String>,
    /// The attached proxy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub proxy: Option<ProxyStatus>,
    /// The node's kernel.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<KernelStatus>,
    /// Boot of the node, as in `status.nodeInfo.bootID` of the Node, in which it became ready. While
    /// the node runs in another one, it keeps its startup taint.
    #[serde(skip_serializing_if = "Option::is_none", rename = "readyBootID")]
    #[schemars(length(max = 64))]
    pub ready_boot_id: Option<String>,
    /// Number of workloads in the spec.
    pub workloads: i64,
    /// Number of workloads whose traffic the mesh carries.
    pub enrolled: i64,
    /// Workloads that are not enrolled, at most 50 of them.
    #[schemars(length(max = 50))]
    pub pending: Vec<WorkloadNote>,
    /// Pods that are labelled for the mesh and stay out, at most 50 of them.
    #[schemars(length(max = 50))]
    pub excluded: Vec<WorkloadNote>,
}

/// The attached proxy.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ProxyStatus {
    /// Name of the proxy's pod.
    pub pod_name: String,
    /// UID of the proxy's pod.
    #[serde(rename = "podUID")]
    pub pod_uid: String,
    /// Address of the proxy's pod.
    pub ip: String,
    /// The proxy's network device in the host's namespace.
    pub device: String,
    /// Version of the proxy program.
    pub version: String,
}

/// The node's kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct KernelStatus {
    /// As `uname -r` prints it.
    pub release: String,
    /// Whether geneve devices can be made.
    pub geneve: bool,
    /// The backend that the host's rules are in.
    pub iptables: IptablesBackend,
}

/// Backend of iptables.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum IptablesBackend {
    /// nf_tables.
    #[default]
    Nft,
    /// The older xtables interface.
    Legacy,
}

/// A pod that is not (or not yet) in the mesh, and why.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct WorkloadNote {
    /// UID of the pod.
    pub uid: String,
    /// Namespace of the pod.
    pub namespace: String,
    /// Name of the pod.
    pub name: String,
    /// One word from a fixed list.
    pub reason: String,
    /// What keeps it out, and what to do.
    pub message: String,
}

// === impl TunnelSpec ===

impl Default for TunnelSpec {
    fn default() -> Self {
        Self {
            kind: TunnelType::Geneve,
            port: 6081,
            inbound: TunnelEndSpec {
                vni: 1000,
                cidr: "192.168.126.0/30".to_owned(),
                ipv6_cidr: None,
            },
            outbound: TunnelEndSpec {
                vni: 1001,
                cidr: "192.168.127.0/30".to_owned(),
                ipv6_cidr: None,
            },
            mtu: None,
        }
    }
}

// === impl PortsSpec ===

impl Default for PortsSpec {
    fn default() -> Self {
        Self {
            outbound: 15001,
            inbound: 15008,
            inbound_plaintext: 15006,
        }
    }
}

// === impl MarksSpec ===

impl Default for MarksSpec {
    fn default() -> Self {
        Self {
            outbound: "0x100/0x100".to_owned(),
            skip: "0x200/0x200".to_owned(),
            proxied: "0x210/0x210".to_owned(),
            proxied_second: "0x208/0x208".to_owned(),
            own: "0x220/0x220".to_owned(),
            return_: "0x40/0x40".to_owned(),
            return_second: "0x80/0x80".to_owned(),
            tproxy: "0x400/0xfff".to_owned(),
            proxy_return: "0x4d3/0xfff".to_owned(),
        }
    }
}
