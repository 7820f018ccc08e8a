//! What the proxy is told at its start.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use hbone::identity::TrustDomain;
use http::Uri;

/// The HBONE proxy of a node.
#[derive(Clone, Debug, Parser)]
#[command(version)]
pub(crate) struct Arguments {
    /// Where discovery and certificates come from.
    #[arg(
        long,
        env = "CONTROLLER",
        default_value = "https://ambit-controller.ambit-system.svc:15012"
    )]
    pub(crate) controller: Uri,
    /// PEM file of the roots that the controller's certificate is checked with; read for every
    /// connection.
    #[arg(
        long,
        env = "ROOT_CERT",
        default_value = "/var/run/ambit/root/root-cert.pem"
    )]
    pub(crate) root_cert: PathBuf,
    /// File of the token that the proxy shows the controller; read for every request.
    #[arg(
        long,
        env = "TOKEN",
        default_value = "/var/run/secrets/tokens/istio-token"
    )]
    pub(crate) token: PathBuf,
    /// Socket of the node's agent.
    #[arg(long, env = "AGENT_SOCKET", default_value = "/run/ambit/agent.sock")]
    pub(crate) agent_socket: PathBuf,
    /// Trust domain of every identity.
    #[arg(long, env = "TRUST_DOMAIN", default_value = "cluster.local", value_parser = TrustDomain::new)]
    pub(crate) trust_domain: TrustDomain,
    /// Name of the cluster.
    #[arg(long, env = "CLUSTER_ID", default_value = "Kubernetes")]
    pub(crate) cluster_id: String,
    /// Name of the proxy's pod.
    #[arg(long, env = "POD_NAME")]
    pub(crate) pod_name: String,
    /// Namespace of the proxy's pod.
    #[arg(long, env = "POD_NAMESPACE")]
    pub(crate) pod_namespace: String,
    /// UID of the proxy's pod.
    #[arg(long, env = "POD_UID")]
    pub(crate) pod_uid: String,
    /// Address of the proxy's pod.
    #[arg(long, env = "POD_IP")]
    pub(crate) pod_ip: IpAddr,
    /// Node that the proxy runs on.
    #[arg(long, env = "NODE_NAME")]
    pub(crate) node_name: String,
    /// Where people look at what the proxy knows (`/config_dump`).
    #[arg(long, env = "ADMIN", default_value = "127.0.0.1:15000")]
    pub(crate) admin: SocketAddr,
    /// Where metrics are read (`/metrics`).
    #[arg(long, env = "METRICS", default_value = "0.0.0.0:15020")]
    pub(crate) metrics: SocketAddr,
    /// Where kubelet asks for readiness (`/healthz/ready`).
    #[arg(long, env = "READINESS", default_value = "0.0.0.0:15021")]
    pub(crate) readiness: SocketAddr,
    /// How long open connections may go on after SIGTERM, in seconds.
    #[arg(long, env = "DRAIN_SECONDS", default_value_t = 30)]
    drain_seconds: u64,
    /// Worker threads; by default one a processor.
    #[arg(long, env = "THREADS")]
    pub(crate) threads: Option<usize>,
    /// What is logged, as tracing-subscriber's filters; `access=off` silences the access log.
    #[arg(long, env = "LOG", default_value = "info")]
    pub(crate) log: String,
    /// Form of the log.
    #[arg(long, env = "LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub(crate) log_format: LogFormat,
}

/// Form of the log.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum LogFormat {
    /// Lines for people.
    Text,
    /// An object a line.
    Json,
}

impl Arguments {
    /// How long open connections may go on after SIGTERM.
    pub(crate) fn drain(&self) -> Duration {
        Duration::from_secs(self.drain_seconds)
    }
}
