//! Wires the parts.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Context;
use axum::Router;
use hbone::{Server, Settings, Shared};
use nix::ifaddrs::getifaddrs;
use prometheus_client::registry::Registry;
use protocol::node::Hello;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use crate::admin;
use crate::agent::Agent;
use crate::args::Args;
use crate::control_plane::ControlPlane;
use crate::discovery::{self, Discovery};
use crate::health::{self, OwnMetrics};
use crate::log::Levels;
use crate::signer::Signer;
use crate::status::Status;

/// How often unused tunnels are closed and our own addresses are read.
const SWEEP_EVERY: Duration = Duration::from_secs(5);

/// Runs the proxy until it is told to end.
pub(crate) fn run(args: Args, levels: Levels) -> anyhow::Result<()> {
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    if let Some(workers) = args.workers {
        runtime.worker_threads(workers.get());
    }
    let runtime = runtime.enable_all().build().context("start the runtime")?;
    let result = runtime.block_on(serve(args, levels));
    // What is still open has had its time.
    runtime.shutdown_background();
    result
}

async fn serve(args: Args, levels: Levels) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("watch for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("watch for SIGINT")?;
    let mut registry = Registry::default();
    let settings = Settings {
        trust_domain: args.trust_domain.clone(),
        cluster: args.cluster_id.clone(),
    };
    let shared = Shared::new(settings, &mut registry);
    let status = Status::new(shared.clone());
    let server = Arc::new(Server::new(shared.clone()));
    registry.register_collector(Box::new(OwnMetrics {
        shared: shared.clone(),
        status: status.clone(),
    }));

    listen("metrics", &args.metrics, health::metrics(registry)).await?;
    listen(
        "readiness",
        &args.readiness,
        health::readiness(status.clone()),
    )
    .await?;
    let admin = admin::router(shared.clone(), &args.node_name, levels);
    listen("admin", &[args.admin], admin).await?;

    tokio::spawn(keep_tidy(shared.clone(), args.pod_ip));
    let control_plane = control_plane(&args);
    tokio::spawn(discovery(&args, &control_plane, &shared, &status).run());
    tokio::spawn(agent(&args, control_plane, shared, server.clone(), &status).run());

    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    drain(&args, &server, &status).await;
    Ok(())
}

async fn listen(
    what: &'static str,
    addresses: &[SocketAddr],
    router: Router,
) -> anyhow::Result<()> {
    let listener = TcpListener::bind(addresses).await;
    let listener = listener.with_context(|| format!("listen on any of {addresses:?} ({what})"))?;
    tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, router).await {
            tracing::error!(%error, "serving {what} ended");
        }
    });
    Ok(())
}

fn control_plane(args: &Args) -> Arc<ControlPlane> {
    Arc::new(ControlPlane {
        url: args.controller.clone(),
        roots: args.root_cert.clone(),
        token: args.token.clone(),
        cluster: args.cluster_id.clone(),
        channel: Mutex::default(),
    })
}

fn discovery(
    args: &Args,
    control_plane: &Arc<ControlPlane>,
    shared: &Arc<Shared>,
    status: &Arc<Status>,
) -> Discovery {
    Discovery {
        control_plane: control_plane.clone(),
        node: discovery::node(args),
        shared: shared.clone(),
        status: status.clone(),
    }
}

fn agent(
    args: &Args,
    control_plane: Arc<ControlPlane>,
    shared: Arc<Shared>,
    server: Arc<Server>,
    status: &Arc<Status>,
) -> Agent {
    Agent {
        socket: args.agent_socket.clone(),
        hello: Hello {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pod_uid: args.pod_uid.clone(),
            pod_name: args.pod_name.clone(),
        },
        shared,
        server,
        signer: Arc::new(Signer { control_plane }),
        status: status.clone(),
    }
}

/// Closes tunnels that nobody uses, and knows the addresses that are our own: the agent makes
/// devices after we have started.
async fn keep_tidy(shared: Arc<Shared>, pod_ip: IpAddr) {
    let mut every = tokio::time::interval(SWEEP_EVERY);
    loop {
        every.tick().await;
        shared.sweep();
        let own = own_addresses(pod_ip);
        if **shared.own_addresses.load() != own {
            shared.own_addresses.store(Arc::new(own));
        }
    }
}

fn own_addresses(pod_ip: IpAddr) -> Vec<IpAddr> {
    let mut own = BTreeSet::from([pod_ip]);
    match getifaddrs() {
        Ok(found) => own.extend(found.filter_map(|interface| {
            let address = interface.address?;
            let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
            v4.or(address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
        })),
        Err(error) => tracing::warn!(%error, "read our own addresses"),
    }
    own.into_iter().collect()
}

async fn drain(args: &Args, server: &Server, status: &Status) {
    status.draining.store(true, Ordering::Relaxed);
    let limit = args.drain_seconds;
    tracing::info!(?limit, "draining");
    match server.drain(limit).await {
        0 => tracing::info!("drained"),
        open => tracing::warn!(open, "connections are cut: they took too long"),
    }
}
