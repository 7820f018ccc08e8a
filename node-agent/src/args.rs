//! What the agent is told at its start.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Parser, Subcommand};
use datapath::names::{Names, NamesError};

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
    #[command(flatten)]
    pub(crate) names: NamesArguments,
    #[command(flatten)]
    pub(crate) plugin: PluginArguments,
    /// Where /healthz, /readyz and /metrics are served: the first of these that can be listened on.
    #[arg(
        long,
        env = "HEALTH_LISTEN",
        value_delimiter = ',',
        default_value = "[::]:15022,0.0.0.0:15022"
    )]
    pub(crate) health_listen: Vec<SocketAddr>,
}

/// Whether and how new pods are held back until they are enrolled.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Holding new pods back until they are enrolled")]
pub(crate) struct PluginArguments {
    /// Whether they are.
    #[arg(
        long,
        env = "HOLD_NEW_PODS",
        default_value_t = true,
        action = clap::ArgAction::Set
    )]
    pub(crate) hold_new_pods: bool,
    /// Where the container runtime takes CNI programs from (its bin_dir). Without it the host's CNI chain
    /// is left alone.
    #[arg(long, env = "CNI_BIN_DIR", requires = "cni_conf_dir")]
    pub(crate) cni_bin_dir: Option<PathBuf>,
    /// Where the container runtime reads CNI configurations (its conf_dir).
    #[arg(long, env = "CNI_CONF_DIR", requires = "cni_bin_dir")]
    pub(crate) cni_conf_dir: Option<PathBuf>,
    /// The plugin's program, to be copied there.
    #[arg(long, env = "CNI_PROGRAM", default_value = "/usr/local/bin/ambit-cni")]
    pub(crate) cni_program: PathBuf,
    /// File of orders for the plugin, here as on the host.
    #[arg(long, env = "GUARD_ORDERS", default_value = guard::ORDERS)]
    pub(crate) orders: PathBuf,
    /// Folder of the plugin's records, here as on the host.
    #[arg(long, env = "GUARD_RECORDS", default_value = guard::RECORDS)]
    pub(crate) records: PathBuf,
}

/// What Ambit's own is called in the host's kernel: another installation on the same nodes needs
/// other names and numbers.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Names and numbers in the host's kernel")]
pub(crate) struct NamesArguments {
    /// Set of the mesh pods' IPv4 addresses whose connections go to the proxy; that by which they are guarded has
    /// `-guard` behind it, those of IPv6 a 6 more.
    #[arg(long, env = "SET_NAME", default_value = "ztunnel-pods-ips")]
    set_name: String,
    /// Device towards the proxy for traffic to mesh pods.
    #[arg(long, env = "INBOUND_DEVICE", default_value = "istioin")]
    inbound_device: String,
    /// Device towards the proxy for traffic from mesh pods.
    #[arg(long, env = "OUTBOUND_DEVICE", default_value = "istioout")]
    outbound_device: String,
    /// Start of the names of iptables chains.
    #[arg(long, env = "CHAIN_PREFIX", default_value = "ztunnel-")]
    chain_prefix: String,
    /// First of three route tables in a row.
    #[arg(long, env = "FIRST_TABLE", default_value_t = 100)]
    first_table: u32,
    /// First of six priorities of ip rules in a row; the one before it holds new pods back.
    #[arg(long, env = "FIRST_PRIORITY", default_value_t = 100)]
    first_priority: u32,
}

impl NamesArguments {
    /// # Errors
    /// If one of them cannot be used.
    pub(crate) fn check(self) -> Result<Names, NamesError> {
        Names::default()
            .with_set(self.set_name)?
            .with_devices(self.inbound_device, self.outbound_device)?
            .with_chain_prefix(self.chain_prefix)?
            .with_first_table(self.first_table)?
            .with_first_priority(self.first_priority)
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn without_names_they_are_those_of_the_data_path() {
        let arguments = Arguments::parse_from(["ambit-node-agent"]);
        assert_eq!(arguments.agent.names.check(), Ok(Names::default()));
    }
}
