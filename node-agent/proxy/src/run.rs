//! Wires the parts.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

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
use crate::status::{Phase, Status};

/// How often unused tunnels are closed and our own addresses are read.
const SWEEP_EVERY: Duration = Duration::from_secs(5);
/// After how long without a connection nobody misses a proxy that ends.
const IDLE: Duration = Duration::from_secs(1);

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
    tokio::spawn(
        agent(
            &args,
            control_plane,
            shared.clone(),
            server.clone(),
            &status,
        )
        .run(),
    );

    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    end(&args, &shared, &server, &status).await;
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

/// Hands over to the node's next proxy, if there is one, and lets what is open come to its end.
async fn end(args: &Args, shared: &Shared, server: &Server, status: &Status) {
    let limit = args.drain_seconds;
    let end = Instant::now() + limit;
    tracing::info!(?limit, "ending");
    status.phase.send_replace(Phase::Ending);
    let why = hand_over(shared, status, limit).await;
    tracing::info!(why, "draining");
    status.phase.send_replace(Phase::Draining);
    match server
        .drain(end.saturating_duration_since(Instant::now()))
        .await
    {
        0 => tracing::info!("drained"),
        open => tracing::warn!(open, "connections are cut: they took too long"),
    }
}

/// Goes on taking connections, for without a successor they would be refused. Says why it ended.
async fn hand_over(shared: &Shared, status: &Status, limit: Duration) -> &'static str {
    let mut active = status.active.subscribe();
    tokio::select! {
        _ = active.wait_for(|active| !active) => "new connections go to another proxy",
        () = idle(shared) => "no connection is open",
        // The rest is for those that are open.
        () = tokio::time::sleep(limit * 3 / 4) => "no other proxy has come",
    }
}

/// Until no connection has been open, or has been opened, for some time.
async fn idle(shared: &Shared) {
    let mut every = tokio::time::interval(IDLE);
    let mut before = None;
    loop {
        every.tick().await;
        let now = (shared.connections(), shared.opened());
        if now.0 == 0 && before == Some(now) {
            return;
        }
        before = Some(now);
    }
}
