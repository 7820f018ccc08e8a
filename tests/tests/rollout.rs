//! All proxies are replaced while traffic flows.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use mesh_tests::cluster::{Cluster, SYSTEM, items};
use mesh_tests::load::report::{Held, Totals};
use mesh_tests::load::{Load, Party, tell};
use mesh_tests::soak::{count, recorded};
use mesh_tests::wait::eventually;
use serde::Serialize;

const PROXIES: &str = "daemonset/ambit-proxy";
const LABEL: &str = "app.kubernetes.io/name=ambit-proxy";

/// How much sooner or later than its drain time says a proxy may cut what it carries, in milliseconds: the times of
/// objects are whole seconds, and a machine is busy.
const SLACK_MS: u64 = 3_000;

/// When each proxy that ended was told to, by the name of its pod, in milliseconds since 1970.
type Endings = BTreeMap<String, u64>;

#[derive(Default, Serialize)]
struct Numbers {
    rollouts: usize,
    kept: usize,
    #[serde(flatten)]
    traffic: Totals,
}

#[test]
fn no_connection_fails_while_all_proxies_are_replaced_under_load() -> Result<()> {
    recorded("rollout", |_, numbers: &mut Numbers| {
        let cluster = Cluster::current()?;
        cluster.wait_recovered()?;
        let party = Party::gather(&cluster, "rollout", Some("ambient"))?;
        party.wait_in_mesh(Duration::from_secs(30))?;
        let drain_ms = drain_ms(&cluster)?;
        let enough = count(5_000, 100_000) as u64;
        let (endings, report) = party.under_load("rollout", |load| {
            roll_until(&cluster, load, enough, numbers)
        })?;
        numbers.traffic.take(&report);
        numbers.kept = report.held.len();
        ensure!(report.failed == 0, "{}", tell(&report));
        ensure!(report.attempts >= enough, "{}", tell(&report));
        for held in report.cuts() {
            ensure_drained(held, &endings, drain_ms)?;
        }
        // There were some that lasted from before a proxy's end to its drain time.
        ensure!(report.cuts().next().is_some(), "{}", tell(&report));
        Ok(())
    })
}

/// Replaces all proxies, again and again until there were enough connections.
fn roll_until(
    cluster: &Cluster,
    load: &mut Load,
    enough: u64,
    numbers: &mut Numbers,
) -> Result<Endings> {
    let mut endings = Endings::new();
    loop {
        cluster.kubectl(&["-n", SYSTEM, "rollout", "restart", PROXIES])?;
        // A proxy is known to end only while it does: look all the time.
        eventually(Duration::from_secs(150), "the rollout", || {
            note_endings(cluster, &mut endings)?;
            let ended = cluster.try_kubectl(
                &["-n", SYSTEM, "rollout", "status", PROXIES, "--watch=false"],
                "",
            )?;
            let said = ended.success()?;
            ensure!(said.contains("successfully rolled out"), "{said}");
            let pods = cluster.get(&["-n", SYSTEM, "pods", "-l", LABEL])?;
            let nodes = cluster.nodes()?.len();
            ensure!(items(&pods).count() == nodes, "an old proxy still drains");
            Ok(())
        })?;
        cluster.wait_mesh_ready(Duration::from_secs(30))?;
        numbers.rollouts += 1;
        if load.report()?.attempts >= enough {
            return Ok(endings);
        }
    }
}

fn note_endings(cluster: &Cluster, endings: &mut Endings) -> Result<()> {
    let pods = cluster.get(&["-n", SYSTEM, "pods", "-l", LABEL])?;
    for pod in items(&pods) {
        let meta = &pod["metadata"];
        let Some(deletion) = meta["deletionTimestamp"].as_str() else {
            continue;
        };
        let name = meta["name"].as_str().context("a pod without a name")?;
        let grace = meta["deletionGracePeriodSeconds"].as_u64();
        let told = seconds(deletion)? - grace.context("no grace period")?;
        endings.insert(name.to_owned(), told * 1000);
    }
    Ok(())
}

/// The seconds since 1970 of a time as objects have it.
fn seconds(time: &str) -> Result<u64> {
    let printed = mesh_tests::command::output("date", &["-d", time, "+%s"])?;
    Ok(printed.trim().parse()?)
}

/// The drain time of the proxies' manifest.
fn drain_ms(cluster: &Cluster) -> Result<u64> {
    let path = "jsonpath={.spec.template.spec.containers[0].env[?(@.name=='DRAIN_SECONDS')].value}";
    let seconds = cluster.kubectl(&["-n", SYSTEM, "get", PROXIES, "-o", path])?;
    let seconds: u64 = seconds.trim().parse().context("DRAIN_SECONDS")?;
    Ok(seconds * 1000)
}

/// Fails unless the connection was cut by a proxy that had drained for as long as it should.
fn ensure_drained(held: &Held, endings: &Endings, drain_ms: u64) -> Result<()> {
    let Some(cut) = held.cut_ms else {
        bail!("not cut: {held:?}");
    };
    let drained = endings.values().any(|told| {
        let end = told + drain_ms;
        (end - SLACK_MS..end + SLACK_MS).contains(&cut) && held.opened_ms < told + SLACK_MS
    });
    ensure!(
        drained,
        "cut before a proxy had drained: {held:#?}, proxies were told to end at {endings:?}"
    );
    Ok(())
}
