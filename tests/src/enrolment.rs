//! A namespace joins the mesh and leaves it.

use std::time::Duration;

use anyhow::{Result, ensure};

use crate::cluster::{Cluster, MODE_LABEL};
use crate::wait::{eventually, patient};

const LIMIT: Duration = Duration::from_secs(20);

/// Labels the namespace.
///
/// # Errors
/// If the API server refuses that.
pub fn label(cluster: &Cluster, namespace: &str) -> Result<()> {
    let label = format!("{MODE_LABEL}=ambient");
    cluster
        .kubectl(&["label", "namespace", namespace, &label, "--overwrite"])
        .map(drop)
}

/// Takes the label away.
///
/// # Errors
/// If the API server refuses that.
pub fn unlabel(cluster: &Cluster, namespace: &str) -> Result<()> {
    let label = format!("{MODE_LABEL}-");
    cluster
        .kubectl(&["label", "namespace", namespace, &label])
        .map(drop)
}

/// Labels the namespace and waits until its pods are in the mesh; how long that took.
///
/// # Errors
/// If one is not after 20 s, or the time that a guest may take.
pub fn enrol(cluster: &Cluster, namespace: &str) -> Result<Duration> {
    label(cluster, namespace)?;
    cluster.wait_in_mesh(namespace, patient(LIMIT))
}

/// Takes the namespace out of the mesh and waits until no node knows its pods; how long that took.
///
/// # Errors
/// If one does after 20 s, or the time that a guest may take.
pub fn withdraw(cluster: &Cluster, namespace: &str) -> Result<Duration> {
    unlabel(cluster, namespace)?;
    wait_withdrawn(cluster, namespace, patient(LIMIT))
}

/// Waits until no node knows pods of the namespace; how long that took.
///
/// # Errors
/// If one does after this limit.
pub fn wait_withdrawn(cluster: &Cluster, namespace: &str, limit: Duration) -> Result<Duration> {
    let known_as = format!("\"namespace\":\"{namespace}\"");
    eventually(limit, "withdrawn", || {
        for node in cluster.nodes()? {
            let object = cluster.ambient_node(&node)?;
            let settled =
                object["status"]["observedGeneration"] == object["metadata"]["generation"];
            let known = object["spec"]["workloads"].to_string().contains(&known_as);
            ensure!(settled && !known, "{node}: {object:#}");
        }
        Ok(())
    })
}
