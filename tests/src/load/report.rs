//! What came of a load: written by podtool, read by the tests.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// So many failures are told one by one; all are counted.
const TOLD: usize = 200;

/// What came of the connections of one pod or, summed, of several.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// New connections that have ended, well or not.
    pub attempts: u64,
    /// Those that failed.
    pub failed: u64,
    /// The first of them.
    pub failures: Vec<Failure>,
    /// Longest time from opening a connection that did not fail to its end.
    pub longest_ms: u64,
    /// How often each pod answered.
    pub answers: BTreeMap<String, u64>,
    /// The connections that are kept in use, and those that were.
    pub held: Vec<Held>,
}

/// The numbers of one or several reports, for the record of a test.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Totals {
    connections: u64,
    failed: u64,
    cut: usize,
    longest_ms: u64,
}

/// A new connection that failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Where to.
    pub to: SocketAddr,
    /// When it was begun, in milliseconds since 1970.
    pub started_ms: u64,
    /// After how long it failed.
    pub after_ms: u64,
    /// What the client says.
    pub error: String,
}

/// A connection that is kept in use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// Where to.
    pub to: SocketAddr,
    /// The pod that answers.
    pub pod: String,
    /// When it was opened, in milliseconds since 1970.
    pub opened_ms: u64,
    /// Lines that came back.
    pub exchanges: u64,
    /// Longest time that one took.
    pub longest_ms: u64,
    /// When it was cut, in milliseconds since 1970.
    pub cut_ms: Option<u64>,
    /// What the client says about that.
    pub error: Option<String>,
}

impl Totals {
    /// Takes a report in.
    pub fn take(&mut self, report: &Report) {
        self.connections += report.attempts;
        self.failed += report.failed;
        self.cut += report.cuts().count();
        self.longest_ms = self.longest_ms.max(report.longest_ms);
    }
}

impl Report {
    /// Takes note of a failure.
    pub fn fail(&mut self, failure: Failure) {
        self.failed += 1;
        if self.failures.len() < TOLD {
            self.failures.push(failure);
        }
    }

    /// Takes another pod's report into this one.
    pub fn add(&mut self, other: Self) {
        self.attempts += other.attempts;
        self.failed += other.failed;
        self.failures.extend(other.failures);
        self.longest_ms = self.longest_ms.max(other.longest_ms);
        for (pod, count) in other.answers {
            *self.answers.entry(pod).or_default() += count;
        }
        self.held.extend(other.held);
    }

    /// The kept connections that were cut.
    pub fn cuts(&self) -> impl Iterator<Item = &Held> {
        self.held.iter().filter(|held| held.cut_ms.is_some())
    }
}
