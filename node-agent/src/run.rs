//! Wires the parts together; the only file that knows them all.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use datapath::names::Names;
use datapath::netns::Netns;
use kube::Client;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tracing_subscriber::EnvFilter;

use crate::args::{AgentArguments, Arguments, Command};
use crate::metrics::Metrics;
use crate::pass::Node;
use crate::plugin::Plugin;
use crate::reconcile::Inputs;
use crate::roster::Roster;
use crate::session::{Doorman, Expected};
use crate::survey::Host;
use crate::watch::Known;
use crate::{cleanup, health, publish, reconcile, session, watch as object};

/// Messages of connections that may wait for the loop.
const SESSION_QUEUE: usize = 64;

/// How long an agent that is told to end may take to finish a removal; kubelet waits ten seconds.
const REMOVAL_LIMIT: Duration = Duration::from_secs(8);

/// What is logged: `RUST_LOG`, or what matters to people.
pub(crate) fn log_filter() -> EnvFilter {
    EnvFilter::try_from_default_env().unwrap_or_else(|_| {
        EnvFilter::new("info,kube_client=error,kube_runtime=error,netlink_proto=error")
    })
}

/// Runs the agent, or what it is told to do instead.
pub(crate) fn run(arguments: Arguments) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("start the runtime")?;
    let agent = arguments.agent;
    match arguments.command {
        Some(Command::Cleanup) => {
            let names = agent.names.check()?;
            let mut plugin = Plugin::new(agent.plugin, agent.namespace);
            let (sysctls, socket) = (&agent.sysctl_root, &agent.socket);
            let removed = cleanup::cleanup(Netns::own(), sysctls, socket, &names, &mut plugin);
            let steps = runtime.block_on(removed)?;
            tracing::info!(
                steps,
                "nothing of Ambit is left in the host's network namespace"
            );
            Ok(())
        }
        None => {
            let result = runtime.block_on(serve(agent));
            // What the kernel holds stays; a thread that waits for the kernel must not hold us up.
            runtime.shutdown_background();
            result
        }
    }
}

async fn serve(arguments: AgentArguments) -> Result<()> {
    ensure!(
        !arguments.node_name.is_empty(),
        "the name of the node is missing: set NODE_NAME or --node-name"
    );
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let client = Client::try_default()
        .await
        .context("find the API server (in a pod: the service account's token; else KUBECONFIG)")?;
    let (removing, removal) = watch::channel(false);
    let mut parts = start(arguments, client, removing).await?;
    tokio::select! {
        _ = terminate.recv() => finish(removal).await,
        _ = interrupt.recv() => finish(removal).await,
        ended = parts.join_next() => {
            let what = ended.transpose().context("a part of the agent died")?;
            anyhow::bail!("the agent's {} ended", what.unwrap_or("parts"))
        }
    }
}

/// Brings a removal that is under way to its end.
async fn finish(mut removal: watch::Receiver<bool>) -> Result<()> {
    let over = removal.wait_for(|removing| !removing);
    let over = tokio::time::timeout(REMOVAL_LIMIT, over).await;
    // Its sender ends only with the loop, and then there is nothing to wait for.
    over.context("what was to be removed from this node is not: run ambit-node-agent cleanup")
        .map(drop)
}

/// Starts every part.
async fn start(
    arguments: AgentArguments,
    client: Client,
    removing: watch::Sender<bool>,
) -> Result<JoinSet<&'static str>> {
    let names = arguments.names.clone().check()?;
    let metrics = Arc::new(Metrics::new());
    let listener = TcpListener::bind(&arguments.health_listen[..])
        .await
        .with_context(|| {
            format!(
                "listen on any of {:?} for health and metrics",
                arguments.health_listen
            )
        })?;
    let socket = session::bind(&arguments.socket)?;
    let (tell_known, known) = watch::channel(Known::Unread);
    let (tell_session, sessions) = mpsc::channel(SESSION_QUEUE);
    let (tell_outcome, outcomes) = watch::channel(None);
    let (wake, wakes) = mpsc::channel(1);
    let node_name = arguments.node_name.clone();
    let doorman = Arc::new(doorman(&arguments, &names, client.clone()));
    let host = Host {
        netns: Netns::own(),
        sysctl_root: arguments.sysctl_root,
        names,
    };
    let plugin = Plugin::new(arguments.plugin, arguments.namespace);
    let node = Node::new(host, plugin, metrics.clone(), wake);
    let inputs = Inputs {
        known: known.clone(),
        sessions,
        wakes,
        abandoned_after: reconcile::ABANDONED_AFTER,
        removing,
    };
    let roster = Roster::new(first_generation());
    tracing::info!(node = node_name, "the agent starts");

    let mut parts = JoinSet::new();
    parts.spawn(part(
        "watch",
        object::watch(client.clone(), node_name.clone(), tell_known),
    ));
    parts.spawn(part(
        "socket",
        session::serve(socket, doorman, tell_session),
    ));
    parts.spawn(part(
        "publisher",
        publish::publish(client, node_name, known, outcomes),
    ));
    parts.spawn(part(
        "loop",
        reconcile::run(node, inputs, roster, tell_outcome, metrics.clone()),
    ));
    parts.spawn(async move {
        if let Err(error) = health::serve(listener, metrics).await {
            tracing::error!("serve health and metrics: {error}");
        }
        "health server"
    });
    Ok(parts)
}

async fn part(name: &'static str, work: impl Future<Output = ()>) -> &'static str {
    work.await;
    name
}

fn doorman(arguments: &AgentArguments, names: &Names, client: Client) -> Doorman {
    Doorman {
        client,
        expected: Expected {
            namespace: arguments.namespace.clone(),
            node: arguments.node_name.clone(),
            service_account: arguments.proxy_service_account.clone(),
        },
        host: Netns::own(),
        sysctl_root: arguments.sysctl_root.clone(),
        names: names.clone(),
    }
}

/// Milliseconds since 1970: later than every generation of an earlier agent, which counts up far
/// slower.
fn first_generation() -> u64 {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or_default()
}
