//! Waits for a state of the cluster.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

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
