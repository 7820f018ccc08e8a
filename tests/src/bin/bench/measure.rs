//! One measurement: `load run` in the client pod, the proxies' CPU and memory beside it.

use std::fs;

use anyhow::{Context, Result, bail};
use mesh_tests::cluster::{Cluster, setting};
use serde_json::Value;

use crate::deploy::{MESH, PLAIN, Places};
use crate::work::{Variant, Work};

/// A number that was measured once.
#[derive(Clone, Debug)]
pub(crate) struct Sample {
    pub(crate) work: &'static str,
    pub(crate) variant: Variant,
    pub(crate) metric: &'static str,
    pub(crate) unit: &'static str,
    pub(crate) value: f64,
}

/// Clock ticks a second of `/proc/PID/stat` (proc(5); fixed at 100 on Linux for user space).
const TICKS: f64 = 100.0;

/// Memory of each proxy before any traffic.
pub(crate) fn idle_memory() -> Result<Vec<Sample>> {
    let proxies = proxies()?;
    if proxies.is_empty() {
        bail!("no ambit-proxy process of this cluster runs on this machine");
    }
    let mut samples = Vec::new();
    for proxy in proxies {
        samples.push(Sample {
            work: "idle proxy",
            variant: Variant::Mesh,
            metric: "memory",
            unit: "MiB",
            value: resident_kib(proxy)? / 1024.0,
        });
    }
    Ok(samples)
}

/// Runs one variant of one work.
pub(crate) fn measure(
    cluster: &Cluster,
    places: &Places,
    work: &Work,
    variant: Variant,
    seconds: u64,
) -> Result<Vec<Sample>> {
    let (from, to) = match variant {
        Variant::Plain | Variant::Tls => (PLAIN, PLAIN),
        Variant::Mesh => (MESH, MESH),
        Variant::Passthrough => (MESH, PLAIN),
    };
    let port = if variant == Variant::Tls { 7443 } else { 7000 };
    let target = format!("{}:{port}", places.server(to, work.same_node));
    let (connections, length) = (work.connections.to_string(), seconds.to_string());
    let mut call = vec!["load", "run", "--work", work.kind, "--target", &target];
    call.extend(["--connections", &connections, "--seconds", &length]);
    if variant == Variant::Tls {
        call.push("--tls");
    }
    if work.kind == "idle" {
        return idle(cluster, from, work, variant, &call);
    }
    let before = cpu_seconds()?;
    let printed = cluster.exec(from, "client", &call)?.success()?;
    let cpu = cpu_seconds()? - before;
    let measured: Value = serde_json::from_str(&printed).context("what load run printed")?;
    samples(work, variant, &measured, cpu)
}

fn samples(work: &Work, variant: Variant, measured: &Value, cpu: f64) -> Result<Vec<Sample>> {
    let number = |name: &str| {
        measured[name]
            .as_f64()
            .with_context(|| format!("{name} of load run: {measured}"))
    };
    let sample = |metric, unit, value| Sample {
        work: work.name,
        variant,
        metric,
        unit,
        value,
    };
    let seconds = number("seconds")?;
    let proxied = matches!(variant, Variant::Mesh | Variant::Passthrough);
    let mut all = Vec::new();
    if work.kind == "bulk" {
        let bytes = number("bytes")?;
        all.push(sample("throughput", "Gbit/s", bytes * 8.0 / seconds / 1e9));
        if proxied {
            all.push(sample("proxy CPU", "s/GB", cpu / (bytes / 1e9)));
        }
        return Ok(all);
    }
    let exchanges = number("exchanges")?;
    all.push(sample("rate", "1/s", exchanges / seconds));
    all.push(sample("p50", "µs", number("p50_us")?));
    all.push(sample("p99", "µs", number("p99_us")?));
    if proxied {
        all.push(sample("proxy CPU", "s/100k", cpu / (exchanges / 1e5)));
    }
    Ok(all)
}

/// Memory that open connections cost, on the proxy that they cost most.
fn idle(
    cluster: &Cluster,
    from: &str,
    work: &Work,
    variant: Variant,
    call: &[&str],
) -> Result<Vec<Sample>> {
    let proxies = proxies()?;
    let before: Vec<f64> = proxies
        .iter()
        .map(|pid| resident_kib(*pid))
        .collect::<Result<_>>()?;
    let mut peak: f64 = 0.0;
    std::thread::scope(|scope| -> Result<()> {
        let load = scope.spawn(|| cluster.exec(from, "client", call));
        while !load.is_finished() {
            for (pid, before) in proxies.iter().zip(&before) {
                peak = peak.max(resident_kib(*pid)? - before);
            }
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        match load.join() {
            Ok(outcome) => outcome?.success().map(drop),
            Err(_) => bail!("the thread of load run died"),
        }
    })?;
    Ok(vec![Sample {
        work: work.name,
        variant,
        metric: "memory a connection",
        unit: "KiB",
        value: peak / work.connections as f64,
    }])
}

/// CPU time that all proxies of this machine have used.
fn cpu_seconds() -> Result<f64> {
    let mut ticks = 0.0;
    for pid in proxies()? {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        // The second field is the program's name in parentheses, which may hold spaces.
        let (_, rest) = stat
            .rsplit_once(')')
            .context("a stat line without a name")?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        for at in [11, 12] {
            let field = fields.get(at).context("a stat line that is too short")?;
            ticks += field.parse::<f64>()?;
        }
    }
    Ok(ticks / TICKS)
}

fn resident_kib(pid: u32) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line
        .and_then(|line| line.split_whitespace().next())
        .context("no VmRSS")?;
    Ok(kib.parse()?)
}

/// The proxies of this cluster: other clusters may stand beside it on this machine.
fn proxies() -> Result<Vec<u32>> {
    let nodes = setting("AMBIT_NETNS_PREFIX")?;
    let mut pids = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        let Some(pid) = name.and_then(|name| name.parse().ok()) else {
            continue;
        };
        // A process may end between the listing and the reading.
        let read = |file: &str| fs::read_to_string(path.join(file)).unwrap_or_default();
        if read("comm").trim_end() == "ambit-proxy" && read("cgroup").contains(&nodes) {
            pids.push(pid);
        }
    }
    Ok(pids)
}
