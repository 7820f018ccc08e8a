//! Flags and environment.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use hbone::identity::TrustDomain;
use tonic::transport::Uri;

/// The HBONE proxy of a node.
#[derive(Clone, Debug, Parser)]
#[command(version)]
pub(crate) struct Args {
    /// Where discovery and signing are served.
    #[arg(
        long,
        env = "CONTROLLER",
        default_value = "https://ambit-controller.ambit-system.svc:15012"
    )]
    pub(crate) controller: Uri,
    /// PEM file with the roots that the controller's certificate must lead to.
    #[arg(
        long,
        env = "ROOT_CERT",
        default_value = "/etc/ambit/root/root-cert.pem"
    )]
    pub(crate) root_cert: PathBuf,
    /// File with the token that says to the controller who we are.
    #[arg(
        long,
        env = "TOKEN",
        default_value = "/var/run/secrets/tokens/istio-token"
    )]
    pub(crate) token: PathBuf,
    /// Unix socket of the node's agent.
    #[arg(long, env = "AGENT_SOCKET", default_value = "/run/ambit/agent.sock")]
    pub(crate) agent_socket: PathBuf,
    /// Trust domain of every identity here.
    #[arg(long, env = "TRUST_DOMAIN", default_value = "cluster.local", value_parser = trust_domain)]
    pub(crate) trust_domain: TrustDomain,
    /// Name of the cluster.
    #[arg(long, env = "CLUSTER_ID", default_value = "Kubernetes")]
    pub(crate) cluster_id: String,
    /// Name of this pod.
    #[arg(long, env = "POD_NAME")]
    pub(crate) pod_name: String,
    /// Namespace of this pod.
    #[arg(long, env = "POD_NAMESPACE", default_value = "ambit-system")]
    pub(crate) pod_namespace: String,
    /// UID of this pod.
    #[arg(long, env = "POD_UID")]
    pub(crate) pod_uid: String,
    /// Address of this pod.
    #[arg(long, env = "POD_IP")]
    pub(crate) pod_ip: IpAddr,
    /// Name of this node.
    #[arg(long, env = "NODE_NAME")]
    pub(crate) node_name: String,
    /// Where /config_dump is served.
    #[arg(long, env = "ADMIN", default_value = "127.0.0.1:15000")]
    pub(crate) admin: SocketAddr,
    /// Where /metrics is served: the first of these that can be listened on.
    #[arg(
        long,
        env = "METRICS",
        value_delimiter = ',',
        default_value = "[::]:15020,0.0.0.0:15020"
    )]
    pub(crate) metrics: Vec<SocketAddr>,
    /// Where /healthz/ready is served: the first of these that can be listened on.
    #[arg(
        long,
        env = "READINESS",
        value_delimiter = ',',
        default_value = "[::]:15021,0.0.0.0:15021"
    )]
    pub(crate) readiness: Vec<SocketAddr>,
    /// How long open connections may go on after SIGTERM.
    #[arg(long, env = "DRAIN_SECONDS", default_value = "30", value_parser = seconds)]
    pub(crate) drain_seconds: Duration,
    /// Threads that carry traffic; by default as many as there are CPUs.
    #[arg(long, env = "WORKERS")]
    pub(crate) workers: Option<std::num::NonZeroUsize>,
    /// How log lines look. What is logged says RUST_LOG, for example `info,access=off`.
    #[arg(long, env = "LOG_FORMAT", default_value = "text")]
    pub(crate) log_format: LogFormat,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum LogFormat {
    Text,
    Json,
}

fn trust_domain(text: &str) -> Result<TrustDomain, String> {
    TrustDomain::new(text).map_err(|error| error.to_string())
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().map_err(|_| "not a number of seconds")?;
    Ok(Duration::from_secs(seconds))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_flags_are_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn the_environment_of_the_manifest_is_enough() {
        let args = Args::try_parse_from([
            "ambit-proxy",
            "--pod-name=p",
            "--pod-uid=u",
            "--pod-ip=10.0.0.1",
            "--node-name=n",
            "--drain-seconds=5",
        ])
        .unwrap();
        assert_eq!(args.drain_seconds, Duration::from_secs(5));
        assert_eq!(args.trust_domain.as_str(), "cluster.local");
        assert_eq!(
            args.controller.host(),
            Some("ambit-controller.ambit-system.svc")
        );
    }
}
