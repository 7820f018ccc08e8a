//! Ambit leaves a cluster whose pods talk all the time.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mesh_tests::cluster::{Cluster, setting};
use mesh_tests::command;
use mesh_tests::enrolment::enrol;
use mesh_tests::guard::Undo;
use mesh_tests::load::report::Totals;
use mesh_tests::load::{Party, tell};
use mesh_tests::soak::{count, recorded};
use mesh_tests::wait::eventually;
use serde::Serialize;

/// What a node holds, without counters and times, and without numbers that only count how often something was made.
const DUMP: &str = r"
for family in -4 -6; do
  ip $family rule | sed 's/^/rule /'
  ip $family route show table all | sed 's/ expires [0-9]*sec//; s/^/route /'
  ip $family -o address | sed 's/^[0-9]*: //; s/valid_lft.*//; s/^/address /'
done
ip -d -o link | sed 's/^[0-9]*: //; s/@if[0-9]*//; s/ifindex [0-9]*//; s/^/link /'
ipset list | sed 's/^/set /'
for save in iptables-nft-save iptables-legacy-save ip6tables-nft-save ip6tables-legacy-save; do
  $save 2>/dev/null | sed -E '/^#/d; s/\[[0-9]+:[0-9]+\]//' | sed s/^/$save' /'
done
sysctl -a 2>/dev/null | grep -E '^net\.(ipv[46]|core|bridge|netfilter)' |
  grep -vE 'nf_conntrack_count|tcp_mem|udp_mem|tcp_fastopen_key|stable_secret|neigh\.|\.dev_snmp|ipv6\.conf\..*\.base_reachable|flow_limit|ns_last|route\.gc|ip_local_port'
";

#[derive(Default, Serialize)]
struct Numbers {
    uninstalls: usize,
    #[serde(flatten)]
    traffic: Totals,
}

/// Everything that each node holds.
type Dump = BTreeMap<String, Vec<String>>;

fn dump(cluster: &Cluster) -> Result<Dump> {
    let mut all = Dump::new();
    for node in cluster.nodes()? {
        let printed = cluster.on_node(&node, &["sh", "-c", DUMP])?;
        let mut lines: Vec<String> = printed.lines().map(str::to_owned).collect();
        lines.sort();
        all.insert(node, lines);
    }
    Ok(all)
}

/// Lines that are only in one of both.
fn differences(before: &Dump, after: &Dump) -> Vec<String> {
    let mut all = Vec::new();
    for (node, before) in before {
        let after = after.get(node).map_or(&[][..], Vec::as_slice);
        let gone = before.iter().filter(|line| !after.contains(line));
        all.extend(gone.map(|line| format!("{node} - {line}")));
        let new = after.iter().filter(|line| !before.contains(line));
        all.extend(new.map(|line| format!("{node} + {line}")));
    }
    all
}

/// Runs one of the scripts of `tests` for this cluster, with the programs that are built already.
fn script(name: &str) -> Result<()> {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| tests.join("../target"), PathBuf::from);
    let binaries =
        std::env::var_os("AMBIT_BINARIES").map_or_else(|| target.join("release"), PathBuf::from);
    let mut command = Command::new(tests.join(name));
    command
        .arg(setting("AMBIT_CLUSTER_NAME")?)
        .env("AMBIT_BINARIES", binaries);
    command::run(&mut command, "")?
        .success()
        .with_context(|| format!("tests/{name}"))
        .map(drop)
}

/// What the nodes hold once that no longer changes.
fn settled_dump(cluster: &Cluster) -> Result<Dump> {
    let mut last = dump(cluster)?;
    eventually(Duration::from_secs(40), "the nodes settle", || {
        std::thread::sleep(Duration::from_secs(2));
        let before = std::mem::replace(&mut last, dump(cluster)?);
        let found = differences(&before, &last);
        ensure!(found.is_empty(), "{found:#?}");
        Ok(())
    })?;
    Ok(last)
}

/// Waits until the nodes hold what they did: kube-proxy and kubelet need a moment after the last object is gone.
fn wait_same(cluster: &Cluster, before: &Dump) -> Result<()> {
    eventually(Duration::from_secs(40), "as before", || {
        let found = differences(before, &dump(cluster)?);
        ensure!(found.is_empty(), "{found:#?}");
        Ok(())
    })
    .map(drop)
}

#[test]
fn uninstalled_under_load_it_leaves_the_nodes_as_before_and_fails_no_new_connection() -> Result<()>
{
    recorded("uninstall", |_, numbers: &mut Numbers| {
        let cluster = Cluster::current()?;
        cluster.wait_recovered()?;
        let party = Party::gather(&cluster, "leave", None)?;
        let installed = Undo::new(|| script("install"));
        script("uninstall")?;
        let before = settled_dump(&cluster)?;
        installed.now()?;
        for _ in 0..count(1, 10) {
            enrol(&cluster, &party.namespace.name)?;
            let installed = Undo::new(|| script("install"));
            // What is open when the last rule goes, goes with it: only new connections are looked at.
            let ((), report) = party.under_load("leave", |_| {
                script("uninstall")?;
                wait_same(&cluster, &before)
            })?;
            numbers.uninstalls += 1;
            numbers.traffic.take(&report);
            ensure!(report.failed == 0, "{}", tell(&report));
            installed.now()?;
        }
        cluster.wait_recovered()
    })
}
