//! Processes of Ambit's programs on this machine, found by the pod whose cgroup they are in.

use std::fs;

use anyhow::{Context, Result};

use crate::cluster::{Cluster, SYSTEM};
use crate::command;

/// Name of a program's DaemonSet or Deployment, of its container without `ambit-`, and of its file.
pub type Program = &'static str;

/// Process id of the program in a pod of Ambit's namespace.
///
/// # Errors
/// If none runs.
pub fn of_pod(cluster: &Cluster, program: Program, pod: &str) -> Result<u32> {
    let uid = cluster.pod_field(SYSTEM, pod, ".metadata.uid")?;
    for entry in fs::read_dir("/proc")? {
        let path = entry?.path();
        let name = path
            .file_name()
            .map(|name| name.to_string_lossy().into_owned());
        let Some(pid) = name.and_then(|name| name.parse().ok()) else {
            continue;
        };
        // A process may end between the listing and the reading.
        let read = |file: &str| fs::read_to_string(path.join(file)).unwrap_or_default();
        let file = fs::read_link(path.join("exe")).unwrap_or_default();
        if file.ends_with(program) && read("cgroup").contains(&uid) {
            return Ok(pid);
        }
    }
    anyhow::bail!("no process of {program} runs in pod {pod}")
}

/// Kills the program of a pod, as the kernel would when memory runs out.
///
/// # Errors
/// If it does not run.
pub fn kill(cluster: &Cluster, program: Program, pod: &str) -> Result<()> {
    let pid = of_pod(cluster, program, pod)?;
    command::output("kill", &["-KILL", &pid.to_string()])
        .with_context(|| format!("kill {program} of {pod}"))
        .map(drop)
}
