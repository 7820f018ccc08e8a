//! ambit-proxy: the HBONE proxy of a node.
//!
//! ```text
//!  agent (Unix socket) ──Configure──▶ listeners, local pods, wanted certificates ─┐
//!        ◀──Report── what listens, which pod is ready                             │
//!  controller ──delta xDS──▶ discovery ─▶ directory ──────────────────────────────┼─▶ hbone
//!        ◀──CSR── signer ──▶ certificates ────────────────────────────────────────┘
//!  admin :15000 ─ config_dump     health :15020 metrics, :15021 readiness
//! ```
//!
//! It reads no Kubernetes object and holds no right but to make transparent sockets. What it was
//! told last stays in force while agent or controller are away.

mod admin;
mod agent;
mod args;
mod control_plane;
mod discovery;
mod health;
mod log;
mod run;
mod signer;
mod status;

#[cfg(fuzzing)]
pub mod fuzzing;

use std::process::ExitCode;

use clap::Parser;

/// The whole program.
pub fn main() -> ExitCode {
    let args = args::Args::parse();
    let logs = log::start(args.log_format);
    let result = run::run(args, logs.levels());
    if let Err(error) = &result {
        tracing::error!(error = format!("{error:#}"), "ambit-proxy ends");
    }
    logs.finish();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}
