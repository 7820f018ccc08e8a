//! The API server goes away and comes back.

use std::time::Duration;

use anyhow::{Result, ensure};

use crate::cluster::{Cluster, setting};
use crate::command;
use crate::guard::Undo;
use crate::wait::eventually;

/// Stops the API server; it is back, and answers, once the returned step is done.
///
/// # Errors
/// If the cluster has none.
pub fn stop(cluster: &Cluster) -> Result<Undo> {
    let (command, name) = (setting("AMBIT_API_SERVER")?, setting("AMBIT_CLUSTER_NAME")?);
    let also = cluster.clone();
    let (again, of) = (command.clone(), name.clone());
    let undo = Undo::new(move || {
        command::output(&again, &[&of, "start"])?;
        eventually(Duration::from_secs(60), "the API server answers", || {
            let ready = also.kubectl(&["get", "--raw", "/readyz"])?;
            ensure!(ready == "ok", "{ready}");
            Ok(())
        })
        .map(drop)
    });
    command::output(&command, &[&name, "stop"])?;
    ensure!(
        cluster.kubectl(&["get", "--raw", "/readyz"]).is_err(),
        "the API server still answers"
    );
    Ok(undo)
}
