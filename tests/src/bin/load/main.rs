//! `load`: makes one kind of traffic at a time and measures it; runs inside the benchmark's pods.
//!
//! ```text
//!  load run (client pod) ── one byte: the kind of exchange ──▶ load serve (server pod)
//!                        ◀── bytes back, or none ──
//! ```
//!
//! The same program makes plain TCP and TLS 1.3, so that ratios compare the path and nothing else.

mod client;
mod exchange;
mod serve;
mod tls;

use std::net::SocketAddr;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::exchange::Work;

#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Answers every kind of exchange.
    Serve {
        /// Port of plain TCP.
        #[arg(long, default_value_t = 7000)]
        plain: u16,
        /// Port of TLS 1.3.
        #[arg(long, default_value_t = 7443)]
        tls: u16,
    },
    /// Makes traffic and prints what it measured as one JSON object.
    Run {
        /// Kind of traffic.
        #[arg(long, value_enum)]
        work: Work,
        /// Where the server listens.
        #[arg(long)]
        target: SocketAddr,
        /// Speak TLS 1.3 to it.
        #[arg(long)]
        tls: bool,
        /// Connections at a time.
        #[arg(long, default_value_t = 1)]
        connections: usize,
        /// How long, in seconds.
        #[arg(long, default_value_t = 3)]
        seconds: u64,
    },
}

fn main() -> Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    match Arguments::parse().command {
        Command::Serve { plain, tls } => runtime.block_on(serve::serve(plain, tls)),
        Command::Run {
            work,
            target,
            tls,
            connections,
            seconds,
        } => {
            let plan = client::Plan {
                work,
                target,
                tls,
                connections,
                seconds,
            };
            let measured = runtime.block_on(client::run(plan))?;
            println!("{}", serde_json::to_string(&measured)?);
            Ok(())
        }
    }
}
