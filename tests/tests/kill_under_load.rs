//! Ambit's programs are killed at random moments while a namespace joins and leaves, under load.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mesh_tests::capture::{Capture, tcp_of};
use mesh_tests::cluster::Cluster;
use mesh_tests::enrolment::{label, unlabel, wait_withdrawn};
use mesh_tests::load::report::Totals;
use mesh_tests::load::{Party, ensure_none_failed};
use mesh_tests::process::{self, Program};
use mesh_tests::soak::{Chance, count, recorded};
use mesh_tests::stage::{NODE_1, NODE_2};
use mesh_tests::state;
use mesh_tests::wait::eventually;
use serde::Serialize;

/// A namespace has joined, or left, in less.
const JOINING: Duration = Duration::from_millis(1500);

/// Until a killed program has done its work again. Kubelet may wait before it starts it.
const CONVERGED: Duration = Duration::from_secs(90);

#[derive(Default, Serialize)]
struct Numbers {
    kills: usize,
    slowest_convergence_ms: u128,
    #[serde(flatten)]
    traffic: Totals,
}

/// The namespace that stays in the mesh, and the one that joins and leaves.
struct Parties {
    cluster: Cluster,
    inside: Party,
    joins: Party,
}

impl Parties {
    fn gather() -> Result<Self> {
        let cluster = Cluster::current()?;
        cluster.wait_recovered()?;
        let inside = Party::gather(&cluster, "inside", Some("ambient"))?;
        let joins = Party::gather(&cluster, "joins", None)?;
        inside.wait_in_mesh(CONVERGED)?;
        Ok(Self {
            cluster,
            inside,
            joins,
        })
    }

    /// What both nodes hold while the one namespace is in and the other is out.
    fn state(&self) -> Result<Vec<String>> {
        state::ensure_all_whole(&self.cluster)?;
        let nodes = [NODE_1, NODE_2].iter();
        nodes.map(|node| state::ours(&self.cluster, node)).collect()
    }

    /// Has the namespace join and leave, and kills at a random moment of one of both; how long it then took until
    /// everything was as it should be.
    fn round(
        &self,
        chance: &mut Chance,
        kill: &impl Fn(&mut Chance) -> Result<()>,
    ) -> Result<Duration> {
        let name = &self.joins.namespace.name;
        let at_joining = chance.coin();
        label(&self.cluster, name)?;
        if at_joining {
            std::thread::sleep(chance.moment(JOINING));
            kill(chance)?;
        }
        let joined = self.cluster.wait_in_mesh(name, CONVERGED)?;
        self.settled("joined")?;
        unlabel(&self.cluster, name)?;
        if !at_joining {
            std::thread::sleep(chance.moment(JOINING));
            kill(chance)?;
        }
        let left = wait_withdrawn(&self.cluster, name, CONVERGED)?;
        self.settled("left")?;
        Ok(if at_joining { joined } else { left })
    }

    fn settled(&self, what: &str) -> Result<()> {
        eventually(CONVERGED, what, || state::ensure_all_whole(&self.cluster)).map(drop)
    }

    /// Kills so often; between two of them the kernel is as before, and nothing was on the wire in the clear.
    fn kill_again_and_again(
        &self,
        chance: &mut Chance,
        numbers: &mut Numbers,
        marker: &str,
        kill: impl Fn(&mut Chance) -> Result<()>,
    ) -> Result<()> {
        let before = self.state()?;
        let filter = tcp_of(&self.inside.ips()?);
        for _ in 0..count(1, 100) {
            let capture = Capture::start("kill", &filter)?;
            let took = self.round(chance, &kill)?;
            numbers.kills += 1;
            numbers.slowest_convergence_ms = numbers.slowest_convergence_ms.max(took.as_millis());
            self.cluster.wait_recovered()?;
            let captured = capture.stop()?;
            captured.ensure_encrypted(marker)?;
            let packets = captured.packets("tcp port 15008")?.len();
            ensure!(packets > 100, "only {packets} packets were encrypted");
            let now = self.state()?;
            ensure!(
                now == before,
                "before: {before:#?}\nafter the kill: {now:#?}"
            );
        }
        Ok(())
    }
}

/// A test of one program: `strict` if not one connection may fail.
fn test(
    topic: &'static str,
    strict: bool,
    kill: impl Fn(&Cluster, &mut Chance) -> Result<()>,
) -> Result<()> {
    recorded(topic, |chance, numbers: &mut Numbers| {
        let parties = Parties::gather()?;
        let marker = format!("marker-of-{topic}-{}", std::process::id());
        let kill = |chance: &mut Chance| kill(&parties.cluster, chance);
        let ((), report) = parties.inside.under_load(&marker, |_| {
            let ((), joining) = parties.joins.under_load("joins", |_| {
                parties.kill_again_and_again(chance, numbers, &marker, kill)
            })?;
            numbers.traffic.take(&joining);
            if strict {
                ensure_none_failed(&joining).context("of the namespace that joins and leaves")?;
            }
            Ok(())
        })?;
        numbers.traffic.take(&report);
        if strict {
            ensure_none_failed(&report).context("of the namespace that stays in the mesh")?;
        }
        Ok(())
    })
}

fn kill_on_a_node(cluster: &Cluster, program: Program, chance: &mut Chance) -> Result<()> {
    let node = *chance.one(&[NODE_1, NODE_2])?;
    let pod = cluster.system_pod(program, node)?;
    println!("kills {program} on {node}");
    process::kill(cluster, program, &pod)
}

#[test]
fn agents_killed_at_random_moments_leave_nothing_half_done_and_fail_no_connection() -> Result<()> {
    test("kill_agent", true, |cluster, chance| {
        kill_on_a_node(cluster, "ambit-node-agent", chance)
    })
}

#[test]
fn leaders_killed_at_random_moments_leave_nothing_half_done_and_fail_no_connection() -> Result<()> {
    test("kill_controller", true, |cluster, _| {
        let pod = cluster.leader()?;
        println!("kills the leader {pod}");
        process::kill(cluster, "ambit-controller", &pod)
    })
}

#[test]
fn proxies_killed_at_random_moments_leave_nothing_half_done_and_leak_nothing() -> Result<()> {
    test("kill_proxy", false, |cluster, chance| {
        kill_on_a_node(cluster, "ambit-proxy", chance)
    })
}
