//! Waits for a state of the cluster.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// How many times longer a node may take that is an emulated machine: it shows function, not speed.
const EMULATED: u32 = 4;

/// Within this time after its pods are ready a Service is served on every node: Kubernetes' own parts wait up to half a
/// minute before they turn to an API server again that an earlier test took away.
pub const SERVED: Duration = Duration::from_secs(90);

/// A limit for what happens on a node of the cluster, longer where nodes are guests.
#[must_use]
pub fn patient(limit: Duration) -> Duration {
    match std::env::var("AMBIT_CLUSTER_NODES").as_deref() {
        Ok("guests") => limit * EMULATED,
        _ => limit,
    }
}

/// Tries `check` until it succeeds, at most for `limit`; how long it took.
///
/// # Errors
/// The last failure, if it never succeeded.
pub fn eventually(
    limit: Duration,
    what: &str,
    mut check: impl FnMut() -> Result<()>,
) -> Result<Duration> {
    let start = Instant::now();
    loop {
        let failure = match check() {
            Ok(()) => return Ok(start.elapsed()),
            Err(failure) => failure,
        };
        if start.elapsed() >= limit {
            return Err(failure).with_context(|| format!("after {limit:?}: {what}"));
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}
