//! `podtool`: the servers and clients that tests and the demo run in pods.
//!
//! ```text
//!  podtool CLIENT (pod, or outside the cluster) ── plain TCP, HTTP, UDP ──▶ podtool serve (pod)
//!        │                                      ── mutual TLS, CONNECT ──▶ a node's proxy
//!        └──▶ one line of JSON: what it saw, or {"error": …} and exit code 1
//! ```
//!
//! Every server says which address it sees its client at, so that a test can tell who spoke to it.

mod args;
mod client;
mod pattern;
mod seen;
mod serve;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use serde_json::{Value, json};

use crate::args::{Arguments, Command};

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let runtime = tokio::runtime::Runtime::new()?;
    if let Command::Serve(ports) = arguments.command {
        runtime.block_on(serve::serve(ports))?;
        return Ok(ExitCode::SUCCESS);
    }
    let limit = Duration::from_secs(arguments.timeout);
    let outcome = runtime.block_on(async {
        tokio::time::timeout(limit, client::run(arguments.command))
            .await
            .with_context(|| format!("not done after {limit:?}"))?
    });
    // A lookup or a read of standard input that still waits must not hold the program up.
    runtime.shutdown_background();
    Ok(print(outcome))
}

fn print(outcome: Result<Value>) -> ExitCode {
    match outcome {
        Ok(seen) => {
            println!("{seen}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("{}", json!({"error": format!("{error:#}")}));
            ExitCode::FAILURE
        }
    }
}
