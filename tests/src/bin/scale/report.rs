//! The numbers, and what they may be.

use std::collections::HashMap;
use std::fmt::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use mesh_tests::json_file;
use serde::Serialize;

use crate::changes::{Change, Number};
use crate::process::Cost;

const MIB: f64 = 1024.0 * 1024.0;

/// A number, and the limit below which it has to stay, if it has one.
#[derive(Clone, Debug, Serialize)]
struct Row {
    what: String,
    value: f64,
    unit: &'static str,
    limit: Option<f64>,
}

/// All of them.
#[derive(Debug, Default)]
pub(crate) struct Report(Vec<Row>);

impl Report {
    /// All clients connected at once, and knew nothing.
    pub(crate) fn joins(&mut self, took: Duration, cost: &Cost) {
        self.add("all join: time", took.as_secs_f64(), "s", None);
        self.cost("all join", cost);
    }

    /// The pods changed.
    pub(crate) fn changes(
        &mut self,
        changes: &[Change],
        fleet: &[Vec<(Number, Instant)>],
        nodes: &HashMap<Number, Instant>,
        cost: &Cost,
    ) -> Result<()> {
        let answered: HashMap<Number, Instant> = changes
            .iter()
            .map(|change| (change.number, change.answered))
            .collect();
        let took = changes.iter().map(|change| change.took).collect();
        self.times("a change: the API server's answer", took, None)?;
        let to_nodes = nodes
            .iter()
            .filter_map(|(number, at)| Some(since(*at, *answered.get(number)?)));
        self.times(
            "a change: to its AmbientNode",
            to_nodes.collect(),
            Some(1.0),
        )?;
        let mut to_proxies = Vec::new();
        for (index, arrivals) in fleet.iter().enumerate() {
            let mut first: HashMap<Number, Instant> = HashMap::new();
            for (number, at) in arrivals {
                first.entry(*number).or_insert(*at);
            }
            let missing = changes.len() - first.len();
            ensure!(
                missing == 0,
                "client {index} was not told of {missing} of {} changes",
                changes.len()
            );
            let told = first
                .iter()
                .filter_map(|(number, at)| Some(since(*at, *answered.get(number)?)));
            to_proxies.extend(told);
        }
        self.times("a change: to a proxy's directory", to_proxies, Some(1.0))?;
        self.add(
            "changes: controller's processors",
            cost.processors,
            "cores",
            Some(1.0),
        );
        self.cost("changes", cost);
        Ok(())
    }

    /// All clients came back at once with what they had.
    pub(crate) fn reconnects(&mut self, took: Duration, told: usize, cost: &Cost) {
        self.add("all come back: time", took.as_secs_f64(), "s", None);
        // A count far below what a float holds exactly.
        self.add(
            "all come back: resources told again",
            told as f64,
            "",
            Some(1.0),
        );
        self.cost("all come back", cost);
    }

    /// The most memory that the controller ever had.
    pub(crate) fn peak(&mut self, bytes: u64) {
        self.add(
            "controller's memory, at most",
            bytes as f64 / MIB,
            "MiB",
            Some(600.0),
        );
    }

    fn cost(&mut self, when: &str, cost: &Cost) {
        let (used, memory) = (cost.used.as_secs_f64(), cost.memory as f64 / MIB);
        self.add(
            &format!("{when}: controller's processor time"),
            used,
            "s",
            None,
        );
        self.add(
            &format!("{when}: controller's memory then"),
            memory,
            "MiB",
            None,
        );
    }

    fn times(&mut self, what: &str, mut times: Vec<Duration>, limit: Option<f64>) -> Result<()> {
        ensure!(!times.is_empty(), "{what}: nothing was measured");
        times.sort_unstable();
        let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize].as_secs_f64();
        for (name, share) in [("median", 0.5), ("99th percentile", 0.99), ("longest", 1.0)] {
            let limit = limit.filter(|_| share == 0.99);
            self.add(&format!("{what}, {name}"), at(share), "s", limit);
        }
        Ok(())
    }

    fn add(&mut self, what: &str, value: f64, unit: &'static str, limit: Option<f64>) {
        let what = what.to_owned();
        self.0.push(Row {
            what,
            value,
            unit,
            limit,
        });
    }

    /// For a person.
    pub(crate) fn table(&self) -> String {
        let mut text = String::new();
        for Row {
            what,
            value,
            unit,
            limit,
        } in &self.0
        {
            let limit = limit.map_or_else(String::new, |limit| format!("below {limit}"));
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{what:<52} {value:>12.3} {unit:<6} {limit}");
        }
        text
    }

    /// For a program.
    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        json_file::write(path, &self.0)
    }

    /// What is not below its limit.
    pub(crate) fn over(&self) -> Vec<String> {
        let over = |row: &&Row| row.limit.is_some_and(|limit| row.value >= limit);
        let rows = self.0.iter().filter(over);
        rows.map(|row| format!("{} is {:.3} {}", row.what, row.value, row.unit))
            .collect()
    }
}

/// A watch may show a change before the API server's answer to it is here.
fn since(arrived: Instant, answered: Instant) -> Duration {
    arrived.saturating_duration_since(answered)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_sorted_times_and_limits_of_the_99th() -> Result<()> {
        let mut report = Report::default();
        let times = (0..=100)
            .rev()
            .map(|ms| Duration::from_millis(ms * 20))
            .collect();
        report.times("x", times, Some(1.0))?;
        let values: Vec<f64> = report.0.iter().map(|row| row.value).collect();
        assert_eq!(values, [1.0, 1.98, 2.0]);
        assert_eq!(report.over(), ["x, 99th percentile is 1.980 s"]);
        Ok(())
    }

    #[test]
    fn a_client_that_misses_a_change_is_an_error() {
        let now = Instant::now();
        let change = |number| Change {
            number,
            answered: now,
            took: Duration::ZERO,
        };
        let cost = Cost {
            processors: 0.5,
            used: Duration::ZERO,
            memory: 0,
        };
        let nodes = HashMap::from([(0, now), (1, now)]);
        let of = |fleet: &[Vec<(Number, Instant)>]| {
            Report::default().changes(&[change(0), change(1)], fleet, &nodes, &cost)
        };
        assert!(of(&[vec![(0, now), (1, now)]]).is_ok());
        assert!(of(&[vec![(0, now), (0, now)]]).is_err());
    }
}
