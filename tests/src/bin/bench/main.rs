//! `bench`: the mesh against plain TCP and raw TLS, over the same nodes, in one interleaved run.
//!
//! ```text
//!  deploy pods ─▶ rounds × works × variants: load run in the client pod ─▶ samples ─▶ table, JSON
//! ```
//!
//! Only ratios carry over from machine to machine.

mod deploy;
mod measure;
mod report;
mod work;

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use mesh_tests::cluster::Cluster;

#[derive(Parser)]
struct Arguments {
    /// Rounds; every variant of every work runs once in each.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Length of one measurement in seconds.
    #[arg(long, default_value_t = 3)]
    seconds: u64,
    /// Only works whose name contains this.
    #[arg(long, default_value = "")]
    only: String,
    /// Image of the pods; it holds the `load` program.
    #[arg(long)]
    image: String,
    /// Where the result goes.
    #[arg(long, default_value = "target/bench/latest.json")]
    output: PathBuf,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let cluster = Cluster::current()?;
    let places = deploy::deploy(&cluster, &arguments.image).context("deploy the pods")?;
    let mut samples = measure::idle_memory()?;
    let works: Vec<_> = work::WORKS
        .iter()
        .filter(|work| work.name.contains(&arguments.only))
        .collect();
    for round in 1..=arguments.rounds {
        for work in &works {
            for variant in work.variants {
                samples.extend(
                    measure::measure(&cluster, &places, work, *variant, arguments.seconds)
                        .with_context(|| format!("round {round}: {} {variant:?}", work.name))?,
                );
            }
        }
        eprintln!("round {round} of {} done", arguments.rounds);
    }
    let rows = report::rows(&samples);
    println!("{}", report::table(&rows));
    report::write(&rows, &arguments.output)?;
    let slow = report::too_slow(&rows);
    ensure!(slow.is_empty(), "too slow: {}", slow.join("; "));
    Ok(())
}
