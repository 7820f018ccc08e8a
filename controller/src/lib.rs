//! ambit-controller: from Kubernetes objects to AmbientNodes, discovery and certificates.
//!
//! ```text
//!  API server                 pure                                         API server
//!  ──────────                 ────                                         ──────────
//!  watch ──▶ snapshot ──▶ desired (enrolment) ──▶ plan ──▶ apply ─────────▶ AmbientNode
//!                ├───────────────────────────▶ startup ──────┴▶ taint ──────▶ Node
//!                │                                         ▲ only the leader
//!                ▼                                                          proxies
//!            directory ───────────────────▶ discovery ─────────┐           ────────
//!                │                                              serve ◀──TLS──▶ proxy
//!            authenticate ▶ authorize ▶ ca ▶ certificates ──────┘
//!
//!  model: the one task that owns snapshot and directory        run: starts everything
//!  dirty_nodes: what the model has changed and apply has to write
//! ```

mod args;
mod run;

mod names;

mod watch;

mod snapshot;

mod desired;

mod plan;

mod startup;

mod apply;

mod taint;

mod directory;

mod dirty_nodes;
mod model;

mod discovery;

mod identity;

mod authenticate;

mod authorize;

mod ca;

mod certificates;

mod serve;

mod leader;

mod health;
mod metrics;
mod problems;

#[cfg(test)]
mod testing;

#[cfg(fuzzing)]
pub mod fuzzing;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;

/// Unless RUST_LOG says otherwise. The runtime's own words about failed watches repeat ours.
const DEFAULT_LOGS: &str = "info,kube_runtime=error";

/// The whole program.
#[tokio::main]
pub async fn main() -> ExitCode {
    let args = args::Args::parse();
    start_logs();
    match run::run(args).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start_logs() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(DEFAULT_LOGS));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stdout().is_terminal())
        .init();
}
