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
use tokio::runtime::Runtime;

use crate::args::{Arguments, Command};

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let runtime = Runtime::new()?;
    match arguments.command {
        Command::Serve(ports) => {
            runtime.block_on(serve::serve(ports))?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Obey => {
            for line in std::io::stdin().lines() {
                print(obey(&runtime, &line?));
            }
            Ok(ExitCode::SUCCESS)
        }
        _ => {
            let outcome = run(&runtime, arguments);
            // A lookup or a read of standard input that still waits must not hold the program up.
            runtime.shutdown_background();
            Ok(print(outcome))
        }
    }
}

/// Runs the client that a line of standard input asks for.
fn obey(runtime: &Runtime, line: &str) -> Result<Value> {
    let words: Vec<String> = serde_json::from_str(line).context("read the arguments")?;
    let all = std::iter::once("podtool".to_owned()).chain(words);
    run(runtime, Arguments::try_parse_from(all)?)
}

fn run(runtime: &Runtime, arguments: Arguments) -> Result<Value> {
    let limit = Duration::from_secs(arguments.timeout);
    runtime.block_on(client::run(arguments.command, limit))
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
