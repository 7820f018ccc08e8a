//! `ambit-proxy`: the HBONE proxy of a node.
//!
//! ```text
//!  agent socket ──Configure──▶ agent ──▶ local workloads, listeners ─┐
//!        ▲───────Report──────────┘                                   │
//!  controller ──delta xDS──▶ discovery ──parse──▶ directory ─────────┼──▶ hbone (every connection)
//!        ◀──CSR── signer ──chain──▶ certificates ────────────────────┘
//!  people, kubelet ──▶ admin (15000) · health (15020, 15021)
//! ```
//!
//! The proxy parses bytes from strangers, so it holds no right but NET_RAW and reads no Kubernetes
//! object. While agent or controller are away it keeps serving from what it was told last.

mod admin;
mod agent;
mod args;
mod configuration;
mod controller;
mod discovery;
mod health;
mod parse;
mod run;
mod signer;
mod subscription;

use std::process::ExitCode;

use clap::Parser;

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    let arguments = args::Arguments::parse();
    // Held until the end: it writes what is still in the queue.
    let _logs = run::start_logs(&arguments);
    match run::run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}
