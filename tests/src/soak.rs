//! Tests that do the same many times: as often as `make soak` wants, or as few times as `make test` has time for; at
//! moments that a seed chooses; and what came of it, for a reader.

use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::Serialize;
use serde_json::json;

use crate::json_file;

/// How often something is done: `full` times where `AMBIT_SOAK` is set.
#[must_use]
pub fn count(short: usize, full: usize) -> usize {
    if is_full() { full } else { short }
}

/// Whether `make soak` runs.
#[must_use]
pub fn is_full() -> bool {
    std::env::var_os("AMBIT_SOAK").is_some()
}

/// All that one test leaves to chance. The same seed and topic give the same choices.
#[derive(Debug)]
pub struct Chance {
    seed: u64,
    choices: StdRng,
}

impl Chance {
    fn new(topic: &'static str, seed: u64) -> Self {
        // Each topic has a sequence of its own, so that one test alone does what it does among others.
        let own = topic.bytes().fold(seed, |own, byte| {
            own.wrapping_mul(31).wrapping_add(u64::from(byte))
        });
        Self {
            seed,
            choices: StdRng::seed_from_u64(own),
        }
    }

    /// A moment up to this long from now.
    pub fn moment(&mut self, longest: Duration) -> Duration {
        longest.mul_f64(self.choices.random())
    }

    /// One of these.
    ///
    /// # Errors
    /// If there is none.
    pub fn one<'a, T>(&mut self, of: &'a [T]) -> Result<&'a T> {
        let index = self.choices.random_range(0..of.len().max(1));
        of.get(index).context("nothing to choose from")
    }

    /// True as often as not.
    pub fn coin(&mut self) -> bool {
        self.choices.random()
    }
}

/// Runs a test that counts what it does, with the seed from `AMBIT_SEED` or from the clock; says the seed and the
/// numbers, and writes them to a file of the topic's name in the folder that `AMBIT_SOAK_REPORTS` names.
///
/// # Errors
/// Those of the test, or if the seed cannot be read or the file not written.
pub fn recorded<N: Default + Serialize>(
    topic: &'static str,
    test: impl FnOnce(&mut Chance, &mut N) -> Result<()>,
) -> Result<()> {
    let mut chance = Chance::new(topic, seed()?);
    println!("{topic}: AMBIT_SEED={}", chance.seed);
    let (start, mut numbers) = (Instant::now(), N::default());
    let outcome = test(&mut chance, &mut numbers);
    let report = json!({
        "topic": topic,
        "seed": chance.seed,
        "seconds": start.elapsed().as_secs(),
        "passed": outcome.is_ok(),
        "error": outcome.as_ref().err().map(|error| format!("{error:#}")),
        "numbers": numbers,
    });
    println!("{topic}: {report}");
    if let Some(folder) = std::env::var_os("AMBIT_SOAK_REPORTS") {
        let file = Path::new(&folder).join(format!("{topic}.json"));
        json_file::write(&file, &report)?;
    }
    outcome
}

fn seed() -> Result<u64> {
    match std::env::var("AMBIT_SEED") {
        Ok(text) if !text.is_empty() => text.parse().context("AMBIT_SEED is no number"),
        _ => Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_and_a_topic_give_the_same_choices_again() {
        let second = Duration::from_secs(1);
        let choices = |topic, seed| {
            let mut chance = Chance::new(topic, seed);
            (0..10).map(|_| chance.moment(second)).collect::<Vec<_>>()
        };
        assert_eq!(choices("a", 1), choices("a", 1));
        assert_ne!(choices("a", 1), choices("a", 2));
        assert_ne!(choices("a", 1), choices("b", 1));
    }

    #[test]
    fn there_is_nothing_to_choose_from_nothing() {
        let mut chance = Chance::new("a", 1);
        assert!(chance.one::<u8>(&[]).is_err());
        assert_eq!(chance.one(&[7]).unwrap(), &7);
    }
}
