//! What the agent is told at its start.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Parser, Subcommand};

/// The node agent of Ambit.
#[derive(Clone, Debug, Parser)]
#[command(version)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) agent: AgentArguments,
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
}

/// What to do instead of running.
#[derive(Clone, Copy, Debug, Subcommand)]
pub(crate) enum Command {
    /// Remove everything of Ambit's from this host's network namespace.
    Cleanup,
}

/// How to run.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct AgentArguments {
    /// Name of the node that the agent runs on.
    #[arg(long, env = "NODE_NAME", default_value = "")]
    pub(crate) node_name: String,
    /// Namespace of the node's proxy.
    #[arg(long, env = "POD_NAMESPACE", default_value = crds::SYSTEM_NAMESPACE)]
    pub(crate) namespace: String,
    /// Socket on which the node's proxy says hello.
    #[arg(long, env = "AGENT_SOCKET", default_value = "/run/ambit/agent.sock")]
    pub(crate) socket: PathBuf,
    /// Where the host's /proc/sys/net can be written.
    #[arg(long, env = "SYSCTL_ROOT", default_value = "/proc/sys/net")]
    pub(crate) sysctl_root: PathBuf,
    /// Service account of the proxy's pods.
    #[arg(long, env = "PROXY_SERVICE_ACCOUNT", default_value = "ambit-proxy")]
    pub(crate) proxy_service_account: String,
    /// Where /healthz, /readyz and /metrics are served: the first of these that can be listened on.
    #[arg(
        long,
        env = "HEALTH_LISTEN",
        value_delimiter = ',',
        default_value = "[::]:15022,0.0.0.0:15022"
    )]
    pub(crate) health_listen: Vec<SocketAddr>,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        Arguments::command().debug_assert();
    }
}
