//! `ambit-node-agent`: what an AmbientNode says, in the kernel and in the proxy; and what is, in its
//! status.
//!
//! ```text
//!  API server ──watch──▶ AmbientNode ──desired──▶ Wanted ─┐
//!  proxy ──session: Hello + namespace, Report──▶ Roster ──┼─▶ reconcile: order ─▶ datapath (build, plan)
//!  kernel ──changes (netlink), every 20 s─────────────────┤        │        ─▶ kernel, both namespaces
//!  ambit-cni ──records: pods held back────────────────────┘        └─plugin: orders, the host's CNI chain
//!                 proxy ◀──Configure───────────────────────────────┤
//!  API server ◀──publish: status, Events◀──start◀──report◀──Outcome─┘
//! ```
//!
//! The agent holds the host's rights, so it reads no bytes of strangers: only the API server's, and
//! bounded frames of a proxy that the API server knows. It may end at any time: the kernel keeps what
//! it holds, and the next agent changes nothing that is as it should be.

mod args;
mod cleanup;
mod desired;
mod events;
mod failure;
mod health;
mod holds;
mod metrics;
mod order;
mod pass;
mod plugin;
mod pod_devices;
mod publish;
mod reconcile;
mod report;
mod roster;
mod run;
mod session;
mod start;
mod survey;
mod watch;

#[cfg(test)]
mod tests;

#[cfg(fuzzing)]
pub mod fuzzing;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;

/// The whole program.
pub fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(run::log_filter())
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    match run::run(args::Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}
