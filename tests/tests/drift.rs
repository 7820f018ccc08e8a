//! Whatever somebody deletes of the data path comes back in time, and nothing that mesh pods say leaves in the clear
//! meanwhile.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use mesh_tests::capture::{Capture, tcp_of};
use mesh_tests::cluster::Cluster;
use mesh_tests::drift::{Held, Kind, Piece, Side, pieces};
use mesh_tests::load::Party;
use mesh_tests::load::report::Totals;
use mesh_tests::soak::{Chance, count, recorded};
use mesh_tests::stage::{NODE_1, NODE_2};
use mesh_tests::wait::eventually;
use serde::Serialize;

/// What the kernel tells the agent about is back within this time.
const TOLD: Duration = Duration::from_secs(1);
/// Everything else is.
const UNTOLD: Duration = Duration::from_secs(30);
/// A pod that left is served for ten seconds more.
const SERVED_ON: Duration = Duration::from_secs(12);
/// Nothing of earlier tests is left within this time.
const SETTLED: Duration = Duration::from_secs(90);

const TOLD_ONES: [Kind; 5] = [Kind::Link, Kind::Up, Kind::Address, Kind::Rule, Kind::Route];
const UNTOLD_ONES: [Kind; 5] = [
    Kind::Chain,
    Kind::ChainRule,
    Kind::Tproxy,
    Kind::Jump,
    Kind::Setting,
];

/// Deletions, and how long it took until what was deleted was back, by kind.
#[derive(Default, Serialize)]
struct Numbers {
    deletions: usize,
    back: BTreeMap<String, Times>,
    #[serde(flatten)]
    traffic: Totals,
}

#[derive(Default, Serialize)]
struct Times {
    deleted: usize,
    mean_ms: u128,
    longest_ms: u128,
}

#[test]
fn whatever_somebody_deletes_comes_back_and_mesh_traffic_stays_out_of_the_clear() -> Result<()> {
    recorded("drift", |chance, numbers: &mut Numbers| {
        let cluster = Cluster::current()?;
        cluster.wait_recovered()?;
        let party = Party::gather(&cluster, "drift", Some("ambient"))?;
        party.wait_in_mesh(Duration::from_secs(20))?;
        let marker = format!("marker-of-drift-{}", std::process::id());
        let ips = party.ips()?;
        let mut drift = Drift::new(&cluster, ips, marker.clone())?;
        let done = party.under_load(&marker, |_| {
            // A round deletes every kind at least once.
            while drift.deletions() < count(1, 500) {
                drift.round(chance)?;
            }
            Ok(())
        });
        drift.tell(numbers);
        let ((), report) = done?;
        numbers.traffic.take(&report);
        // What is gone carries nothing, but is not gone for long.
        ensure!(
            report.failed * 2 < report.attempts,
            "{} of {} connections failed",
            report.failed,
            report.attempts
        );
        Ok(())
    })
}

/// What is deleted, and what came of it.
struct Drift {
    sides: Vec<(Side, Held)>,
    /// What mesh pods say, and who they are.
    marker: String,
    ips: Vec<IpAddr>,
    times: BTreeMap<Kind, Vec<Duration>>,
}

impl Drift {
    fn new(cluster: &Cluster, ips: Vec<IpAddr>, marker: String) -> Result<Self> {
        let mut sides = read(cluster)?;
        eventually(SETTLED, "earlier tests are gone", || {
            std::thread::sleep(SERVED_ON);
            let earlier = std::mem::replace(&mut sides, read(cluster)?);
            for ((side, before), (_, now)) in earlier.iter().zip(&sides) {
                ensure!(before == now, "{}: {}", side.node, difference(before, now));
            }
            Ok(())
        })?;
        Ok(Self {
            sides,
            marker,
            ips,
            times: BTreeMap::new(),
        })
    }

    fn deletions(&self) -> usize {
        self.times.values().map(Vec::len).sum()
    }

    /// One of every kind, one by one on each node or a few at once that do not stand in for each other.
    fn round(&mut self, chance: &mut Chance) -> Result<()> {
        for kind in TOLD_ONES.into_iter().chain([Kind::Socket]) {
            for node in [NODE_1, NODE_2] {
                let piece = self.one(chance, node, |piece| piece.kind == kind)?;
                self.delete(&[piece])?;
            }
        }
        // Half a minute each: on both nodes at once, one kind here and another there.
        let (mut here, mut there) = (NODE_1, NODE_2);
        if chance.coin() {
            std::mem::swap(&mut here, &mut there);
        }
        for kinds in UNTOLD_ONES.chunks(2) {
            let mut batch = Vec::new();
            for (kind, node) in kinds.iter().zip([here, there]) {
                batch.push(self.one(chance, node, |piece| piece.kind == *kind)?);
            }
            self.delete(&batch)?;
        }
        let mut batch = Vec::new();
        for (node, kinds) in [
            (NODE_1, [Kind::Set, Kind::Member]),
            (NODE_2, [Kind::Members, Kind::Member]),
        ] {
            for (kind, is_ipv6) in kinds.into_iter().zip([false, true]) {
                let fits = |piece: &Piece| piece.kind == kind && is_of_ipv6_set(piece) == is_ipv6;
                batch.push(self.one(chance, node, fits)?);
            }
        }
        self.delete(&batch)
    }

    /// Deletes these, and shows that nothing of what mesh pods say leaves in the clear meanwhile.
    fn delete(&mut self, batch: &[Piece]) -> Result<()> {
        let capture = Capture::start("drift", &tcp_of(&self.ips))?;
        self.delete_and_wait(batch)?;
        let seen = capture.stop()?.contains(&self.marker)?;
        ensure!(
            !seen,
            "what mesh pods say was on the wire in the clear: {batch:#?}"
        );
        Ok(())
    }

    /// One of the pieces of a node.
    fn one(
        &self,
        chance: &mut Chance,
        node: &str,
        which: impl Fn(&Piece) -> bool,
    ) -> Result<Piece> {
        let all = self.sides.iter().filter(|(side, _)| side.node == node);
        let fitting: Vec<Piece> = all
            .flat_map(|(side, held)| pieces(side, held))
            .filter(which)
            .collect();
        chance.one(&fitting).cloned()
    }

    /// Deletes these at once, and waits until all is as it was.
    fn delete_and_wait(&mut self, batch: &[Piece]) -> Result<()> {
        let mut gone = Vec::new();
        for piece in batch {
            let start = Instant::now();
            piece.side.run(&piece.delete)?;
            gone.push((piece, start));
        }
        while !gone.is_empty() {
            let mut left = Vec::new();
            for (piece, start) in gone {
                let missing = self.missing(piece)?;
                if missing.is_empty() {
                    self.times
                        .entry(piece.kind)
                        .or_default()
                        .push(start.elapsed());
                    continue;
                }
                let limit = if piece.kind.is_told() { TOLD } else { UNTOLD };
                let took = start.elapsed();
                ensure!(
                    took < limit,
                    "not back after {took:?}: {} {}\n{missing}",
                    piece.side.node,
                    piece.delete
                );
                left.push((piece, start));
            }
            gone = left;
        }
        // What else went with it is back too, and nothing more has come.
        eventually(Duration::from_secs(5), "everything is as it was", || {
            for (side, held) in &self.sides {
                let now = side.read_all()?;
                ensure!(&now == held, "{}: {}", side.node, difference(held, &now));
            }
            Ok(())
        })
        .with_context(|| format!("after {batch:#?}"))
        .map(drop)
    }

    /// How what the piece belongs to differs from what it was; nothing when it is back.
    fn missing(&self, piece: &Piece) -> Result<String> {
        let side = &piece.side;
        let of_it = |(other, _): &&(Side, Held)| {
            (&other.node, other.of_proxy) == (&side.node, side.of_proxy)
        };
        let (_, held) = self
            .sides
            .iter()
            .find(of_it)
            .context("a piece of no side")?;
        let (mut before, mut now) = (Held::new(), Held::new());
        for section in piece.sections {
            before.extend(held.get(section).map(|text| (*section, text.clone())));
            now.insert(*section, side.read(*section)?);
        }
        Ok(difference(&before, &now))
    }

    fn tell(&self, numbers: &mut Numbers) {
        numbers.deletions = self.deletions();
        for (kind, times) in &self.times {
            let sum: Duration = times.iter().sum();
            let times = Times {
                deleted: times.len(),
                mean_ms: sum.as_millis() / times.len().max(1) as u128,
                longest_ms: times.iter().max().map_or(0, Duration::as_millis),
            };
            numbers.back.insert(format!("{kind:?}"), times);
        }
    }
}

/// What all sides hold.
fn read(cluster: &Cluster) -> Result<Vec<(Side, Held)>> {
    let mut sides = Vec::new();
    for node in [NODE_1, NODE_2] {
        for side in [Side::host(node)?, Side::proxy(cluster, node)?] {
            let held = side.read_all()?;
            sides.push((side, held));
        }
    }
    Ok(sides)
}

/// `ipset flush ztunnel-pods-ips6` and the like.
fn is_of_ipv6_set(piece: &Piece) -> bool {
    let mut words = piece.delete.split_whitespace();
    words.any(|word| word.starts_with("ztunnel-pods-ips") && word.ends_with('6'))
}

fn difference(before: &Held, now: &Held) -> String {
    let mut text = String::new();
    for (section, before) in before {
        let now = now.get(section).map_or("", String::as_str);
        let lines = |text: &str, other: &str, sign: char| -> String {
            let lines = text
                .lines()
                .filter(|line| !other.lines().any(|known| known == *line));
            lines.map(|line| format!("{sign} {line}\n")).collect()
        };
        text += &lines(before, now, '-');
        text += &lines(now, before, '+');
    }
    text
}
