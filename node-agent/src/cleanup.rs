//! Removes everything of ours from the host's network namespace, without a cluster.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use datapath::datapath::{Route, Sysctl, Target};
use datapath::facts::{self, Earlier, FactsError};
use datapath::kernel::{ApplyError, Kernel, KernelError, LinuxKernel};
use datapath::names::Names;
use datapath::netns::Netns;
use datapath::pod_devices::HostDevices;
use datapath::{Datapath, Item, plan};
use guard::record::{self, RecordError};

use crate::plugin::{Plugin, PluginError};

/// The value that the data path gives to `rp_filter` of the host's devices.
const LOOSE: &str = "2";

/// Something that could not be removed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CleanupError {
    /// The kernel does not say what it can do.
    #[error("look at the kernel")]
    Facts(#[from] FactsError),
    /// What is there cannot be read.
    #[error("read what there is to remove")]
    Observe(#[from] KernelError),
    /// A step failed.
    #[error("remove what is left of Ambit")]
    Apply(#[from] ApplyError),
    /// The plugin cannot be taken out of the host's CNI chain.
    #[error("take the plugin out of the host's CNI chain")]
    Plugin(#[from] PluginError),
    /// The records of pods that were held cannot be removed.
    #[error("remove the records of pods that were held back")]
    Records(#[from] RecordError),
    /// The socket cannot be removed.
    #[error("remove {}", .0.display())]
    Socket(PathBuf, #[source] io::Error),
}

/// Removes it, and the agent's socket; how many steps that took.
pub(crate) async fn cleanup(
    host: Netns,
    sysctl_root: &Path,
    socket: &Path,
    names: &Names,
    plugin: &mut Plugin,
) -> Result<usize, CleanupError> {
    let steps = sweep(host, sysctl_root, names, plugin).await?;
    match std::fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(CleanupError::Socket(socket.to_owned(), error))
        }
        _ => Ok(steps),
    }
}

/// Removes it; how many steps that took.
pub(crate) async fn sweep(
    host: Netns,
    sysctl_root: &Path,
    names: &Names,
    plugin: &mut Plugin,
) -> Result<usize, CleanupError> {
    // First, so that nobody is held after holds were looked for.
    plugin.withdraw()?;
    let (facts, others) = facts::find(&host, names, Earlier::default()).await?;
    let kernel = |backend| {
        LinuxKernel::in_namespace(host.clone(), backend, sysctl_root.to_owned(), names.clone())
    };
    let mut steps = 0;
    // Somebody mixed the two; the set cannot go before all chains have.
    for backend in others.holding_ours() {
        if backend != facts.iptables {
            steps += remove(&host, &kernel(backend)?, |item| {
                matches!(item, Item::Chains(_))
            })
            .await?;
        }
    }
    steps += remove(&host, &kernel(facts.iptables)?, |_| true).await?;
    forget(plugin)?;
    Ok(steps)
}

/// Removes the records of pods that were held.
pub(crate) fn forget(plugin: &Plugin) -> Result<(), RecordError> {
    let records = record::all(plugin.records())?;
    records
        .iter()
        .try_for_each(|record| record.remove(plugin.records()))
}

/// Removes what the kernel holds of ours and `which` takes; how many steps that took.
async fn remove(
    host: &Netns,
    kernel: &LinuxKernel,
    which: impl Fn(&Item) -> bool,
) -> Result<usize, CleanupError> {
    let traces = kernel.observe(&Datapath::default()).await?;
    let restore = kernel.setting("ipv4/conf/default/rp_filter")?;
    let devices = pod_devices(host, &traces).await?;
    let interest = settings(&traces, &devices, restore.as_deref().unwrap_or("0"));
    let observed = kernel.observe(&interest).await?;
    let mut steps = plan(&Datapath::default(), &observed);
    steps.steps.retain(|step| which(step.change.item()));
    kernel.apply(&steps).await?;
    Ok(steps.steps.len())
}

/// The devices of the pods that the routes into the tunnel name; only IPv4 has a setting of them.
async fn pod_devices(host: &Netns, traces: &Datapath) -> Result<BTreeSet<String>, KernelError> {
    let host = HostDevices::list(host).await?;
    let mut found = BTreeSet::new();
    for item in &traces.host {
        if let Item::Route(route) = item
            && let Some(ip) = route.pod().filter(IpAddr::is_ipv4)
        {
            found.extend(host.towards(ip).await?);
        }
    }
    Ok(found)
}

/// The settings of the pods' devices and of the proxy's, which the route of answers names. Pure.
fn settings(traces: &Datapath, pods: &BTreeSet<String>, restore: &str) -> Datapath {
    let of_proxy = traces.host.iter().filter_map(|item| match item {
        Item::Route(Route {
            target:
                Target::Via {
                    device,
                    onlink: true,
                    ..
                },
            ..
        }) => Some(device),
        _ => None,
    });
    let mut interest = Datapath::default();
    interest.host.extend(of_proxy.chain(pods).map(|device| {
        Item::Sysctl(Sysctl {
            path: format!("ipv4/conf/{device}/rp_filter"),
            value: LOOSE.to_owned(),
            restore: restore.to_owned(),
        })
    }));
    interest
}
