//! Puts the parts together, in order, and takes them apart at the end.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context, Result};
use axum::Router;
use hbone::{Server, Settings, Shared};
use prometheus_client::registry::Registry;
use protocol::node::Hello;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tracing_appender::non_blocking::WorkerGuard;
use tracing_subscriber::EnvFilter;

use crate::admin;
use crate::agent::Agent;
use crate::args::{Arguments, LogFormat};
use crate::controller::Controller;
use crate::discovery::{self, Discovery};
use crate::health::{self, CertificateExpiry, Readiness};
use crate::signer::Signer;

/// Starts the log. Connections do not wait for it: a thread of its own writes.
pub(crate) fn start_logs(arguments: &Arguments) -> WorkerGuard {
    let (writer, guard) = tracing_appender::non_blocking(io::stdout());
    let logs = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(&arguments.log))
        .with_writer(writer)
        .with_ansi(false);
    match arguments.log_format {
        LogFormat::Text => logs.init(),
        LogFormat::Json => logs.json().init(),
    }
    guard
}

/// Runs until SIGTERM or SIGINT, then drains.
pub(crate) fn run(arguments: Arguments) -> Result<()> {
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    if let Some(threads) = arguments.threads {
        runtime.worker_threads(threads);
    }
    runtime
        .enable_all()
        .build()
        .context("start the runtime")?
        .block_on(serve(arguments))
}

async fn serve(arguments: Arguments) -> Result<()> {
    let mut registry = Registry::default();
    let shared = Shared::new(settings(&arguments), &mut registry);
    shared.own_addresses.store(Arc::new(vec![arguments.pod_ip]));
    registry.register_collector(Box::new(CertificateExpiry(shared.clone())));
    let server = Arc::new(Server::new(shared.clone()));
    let controller = Controller::new(
        arguments.controller.clone(),
        arguments.root_cert.clone(),
        arguments.token.clone(),
        arguments.cluster_id.clone(),
    );
    let discovery = Discovery::new(
        controller.clone(),
        discovery::node(&arguments),
        shared.clone(),
        &mut registry,
    );
    let agent = Agent::new(
        arguments.agent_socket.clone(),
        hello(&arguments),
        arguments.trust_domain.clone(),
        (
            shared.clone(),
            server.clone(),
            Arc::new(Signer::new(controller)),
        ),
    );
    let ending = watch::Sender::new(false);
    let readiness = Readiness {
        serving: agent.serving(),
        discovered: shared.discovered(),
        ending: ending.subscribe(),
    };
    http(arguments.admin, admin::router(shared)).await?;
    http(arguments.metrics, health::metrics(registry)).await?;
    http(arguments.readiness, health::readiness(readiness)).await?;
    let discovery = tokio::spawn(discovery.run());
    let agent = tokio::spawn(agent.run());
    tracing::info!(version = env!("CARGO_PKG_VERSION"), "ambit-proxy runs");

    terminated().await?;
    ending.send_replace(true);
    // From here on nobody may open listeners again.
    agent.abort();
    let cut = server.drain(arguments.drain()).await;
    discovery.abort();
    tracing::info!(cut, "drained");
    Ok(())
}

fn settings(arguments: &Arguments) -> Settings {
    Settings {
        trust_domain: arguments.trust_domain.clone(),
        cluster: arguments.cluster_id.clone(),
    }
}

fn hello(arguments: &Arguments) -> Hello {
    Hello {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pod_uid: arguments.pod_uid.clone(),
        pod_name: arguments.pod_name.clone(),
    }
}

async fn http(address: SocketAddr, router: Router) -> Result<()> {
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("listen on {address}"))?;
    tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, router).await {
            tracing::error!(%address, %error, "the HTTP server ended");
        }
    });
    Ok(())
}

async fn terminated() -> Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    tokio::select! {
        _ = terminate.recv() => tracing::info!("SIGTERM: draining"),
        _ = interrupt.recv() => tracing::info!("SIGINT: draining"),
    }
    Ok(())
}
