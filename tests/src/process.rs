//! Processes of Ambit's programs, found on their node by the pod whose cgroup they are in.

use anyhow::{Context, Result};

use crate::cluster::{Cluster, SYSTEM};

/// Name of a program's DaemonSet or Deployment, of its container without `ambit-`, and of its file.
pub type Program = &'static str;

/// A process of a node.
#[derive(Clone, Debug)]
pub struct Process {
    /// The node's name.
    pub node: String,
    /// The id it has there.
    pub pid: u32,
}

/// The ids of the processes in the cgroups of a pod, and the file that each one runs.
const LIST: &str = r#"
for found in $(grep -l -e "$1" /proc/[0-9]*/cgroup 2>/dev/null); do
  process=${found%/cgroup}
  echo "${process#/proc/} $(readlink "$process/exe")"
done
"#;

/// The process of the program in a pod of Ambit's namespace.
///
/// # Errors
/// If none runs.
pub fn of_pod(cluster: &Cluster, program: Program, pod: &str) -> Result<Process> {
    in_pod(cluster, SYSTEM, program, pod)
}

/// The process of the program in a pod.
///
/// # Errors
/// If none runs.
pub fn in_pod(cluster: &Cluster, namespace: &str, program: &str, pod: &str) -> Result<Process> {
    let node = cluster.pod_field(namespace, pod, ".spec.nodeName")?;
    let uid = cluster.pod_field(namespace, pod, ".metadata.uid")?;
    let list = cluster.on_node(&node, &["sh", "-c", LIST, "sh", &uid])?;
    let pid = list
        .lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(_, file)| file.ends_with(&format!("/{program}")))
        .with_context(|| format!("no process of {program} runs in pod {pod}"))?
        .0
        .parse()?;
    Ok(Process { node, pid })
}

/// Kills the program of a pod, as the kernel would when memory runs out.
///
/// # Errors
/// If it does not run.
pub fn kill(cluster: &Cluster, program: Program, pod: &str) -> Result<()> {
    let process = of_pod(cluster, program, pod)?;
    kill_process(cluster, &process).with_context(|| format!("kill {program} of {pod}"))
}

/// Kills a process, as the kernel would when memory runs out. It needs no API server.
///
/// # Errors
/// If it does not run.
pub fn kill_process(cluster: &Cluster, Process { node, pid }: &Process) -> Result<()> {
    cluster
        .on_node(node, &["kill", "-KILL", &pid.to_string()])
        .map(drop)
}
