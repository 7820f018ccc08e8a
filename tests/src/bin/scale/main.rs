//! `scale`: a controller in a large cluster. The API server is real, and so is the controller; nodes and pods are objects
//! that no machine stands behind, and the proxies are clients of discovery that keep nothing.
//!
//! ```text
//!  fill the API server ─▶ proxies join ─▶ pods change ─▶ proxies come back ─▶ table, JSON
//!                                 │            │
//!        controller ──discovery──▶ fleet     watch of AmbientNodes: when each change was there
//! ```

mod ambient_nodes;
mod changes;
mod fill;
mod fleet;
mod process;
mod report;
mod wire;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use kube::Client;

use crate::ambient_nodes::AmbientNodes;
use crate::fill::{Size, filled};
use crate::fleet::{Fleet, Server};
use crate::process::Process;
use crate::report::Report;

#[derive(Parser)]
struct Arguments {
    #[command(flatten)]
    size: Size,
    /// Pod changes a second.
    #[arg(long, default_value_t = 100)]
    rate: u64,
    /// Seconds of changes.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// The controller's process.
    #[arg(long)]
    controller: u32,
    /// Where it serves discovery.
    #[arg(long)]
    address: SocketAddr,
    /// Where the result goes.
    #[arg(long, default_value = "target/bench/scale.json")]
    output: PathBuf,
}

/// Nothing takes longer than this, or the run fails.
const PATIENCE: Duration = Duration::from_secs(600);

#[tokio::main]
async fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let client = Client::try_default().await?;
    let controller = Process(arguments.controller);
    let mut report = Report::default();

    let start = Instant::now();
    let cluster = filled(&client, &arguments.size).await?;
    let nodes = AmbientNodes::watch(client.clone());
    let enrolled = cluster.enrolled();
    nodes.wait_for(enrolled, PATIENCE).await?;
    say(
        &format!(
            "{} pods are there and {enrolled} are written to AmbientNodes",
            cluster.pods.len()
        ),
        start,
    );

    let start = Instant::now();
    let server = Server::of(&client, arguments.address).await?;
    let tokens = fill::proxies(&client, &arguments.size).await?;
    let fleet = Arc::new(Fleet::new(server, tokens));
    say("the proxies have tokens", start);

    let load = controller.load()?;
    let start = Instant::now();
    let resources = cluster.resources();
    let clients = fleet.join(None);
    fleet.wait_told(resources, PATIENCE).await?;
    report.joins(start.elapsed(), &load.until(&controller)?);
    say("every proxy knows everything", start);

    let load = controller.load()?;
    let start = Instant::now();
    let changes = changes::run(
        &client,
        &cluster,
        &nodes,
        &fleet,
        (arguments.rate, Duration::from_secs(arguments.seconds)),
    )
    .await?;
    let cost = load.until(&controller)?;
    nodes.wait_settled(PATIENCE).await?;
    fleet.wait_quiet(PATIENCE).await?;
    report.changes(&changes, &fleet.arrivals(), &nodes.arrivals(), &cost)?;
    say("the pods have changed", start);

    let versions = fleet.versions().context("no client knows the versions")?;
    clients.disconnect().await;
    fleet.forget();
    let load = controller.load()?;
    let start = Instant::now();
    let clients = fleet.join(Some(versions));
    fleet.wait_answered(PATIENCE).await?;
    report.reconnects(start.elapsed(), fleet.told(), &load.until(&controller)?);
    say("every proxy came back", start);
    clients.disconnect().await;

    report.peak(controller.peak_memory()?);
    println!("{}", report.table());
    report.write(&arguments.output)?;
    let over = report.over();
    ensure!(over.is_empty(), "over the limit: {}", over.join("; "));
    Ok(())
}

fn say(what: &str, start: Instant) {
    eprintln!("scale: {what} ({:.1} s)", start.elapsed().as_secs_f64());
}
