//! Our chains as they were last read: programs read them, which takes long where rules are many.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::generation::Generation;
use crate::datapath::{Chains, Table};
use crate::family::Family;

/// The chains of one namespace as they were last read.
#[derive(Debug, Default)]
pub(super) struct Seen {
    readings: Mutex<BTreeMap<(Family, Table), Reading>>,
}

#[derive(Debug)]
struct Reading {
    /// That of the rules before the reading.
    generation: Option<Generation>,
    chains: Option<Chains>,
    /// Read a moment ago by somebody else, and not used yet.
    fresh: bool,
}

/// How much a former reading is worth.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Trust {
    /// Nobody has written since, as far as is known.
    Any,
    /// Nobody has written since if this is still the generation.
    Generation(Option<Generation>),
}

impl Seen {
    /// What somebody else has read of a table's chains a moment ago; it is news once.
    pub(super) fn news(&self, of: (Family, Table)) -> Option<Option<Chains>> {
        let mut readings = self.readings();
        let reading = readings.get_mut(&of)?;
        std::mem::take(&mut reading.fresh).then(|| reading.chains.clone())
    }

    /// What was read of a table's chains, if that can be trusted.
    pub(super) fn recall(&self, of: (Family, Table), trust: &Trust) -> Option<Option<Chains>> {
        let readings = self.readings();
        let reading = readings.get(&of)?;
        let holds = match trust {
            Trust::Any => true,
            Trust::Generation(now) => now.is_some() && *now == reading.generation,
        };
        holds.then(|| reading.chains.clone())
    }

    /// Keeps what was read, with the generation from before.
    pub(super) fn keep(
        &self,
        of: (Family, Table),
        generation: Option<Generation>,
        chains: Option<Chains>,
    ) {
        let fresh = false;
        let reading = Reading {
            generation,
            chains,
            fresh,
        };
        self.readings().insert(of, reading);
    }

    /// Takes over what somebody else has just read; whatever is not in it counts as unread.
    pub(super) fn learn(
        &self,
        read: impl Iterator<Item = ((Family, Table), Option<Generation>, Option<Chains>)>,
    ) {
        let fresh = true;
        let readings = read.map(|(of, generation, chains)| {
            let reading = Reading {
                generation,
                chains,
                fresh,
            };
            (of, reading)
        });
        *self.readings() = readings.collect();
    }

    /// The table is about to be written.
    pub(super) fn forget(&self, of: (Family, Table)) {
        self.readings().remove(&of);
    }

    fn readings(&self) -> MutexGuard<'_, BTreeMap<(Family, Table), Reading>> {
        self.readings.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counted(count: u32) -> Option<Generation> {
        Some(Generation::counted(count))
    }

    const OF: (Family, Table) = (Family::V4, Table::Mangle);

    #[test]
    fn a_reading_is_worth_as_much_as_its_generation() {
        let seen = Seen::default();
        assert_eq!(seen.recall(OF, &Trust::Any), None);
        seen.keep(OF, counted(7), None);
        assert_eq!(seen.recall(OF, &Trust::Any), Some(None));
        assert_eq!(seen.recall(OF, &Trust::Generation(counted(7))), Some(None));
        assert_eq!(seen.recall(OF, &Trust::Generation(counted(8))), None);
        seen.forget(OF);
        assert_eq!(seen.recall(OF, &Trust::Any), None);
    }

    #[test]
    fn what_was_just_read_is_news_once() {
        let seen = Seen::default();
        seen.keep((Family::V6, Table::Nat), counted(7), None);
        seen.learn([(OF, None, None)].into_iter());
        assert_eq!(seen.news(OF), Some(None));
        assert_eq!(seen.news(OF), None);
        assert_eq!(seen.recall(OF, &Trust::Any), Some(None));
        assert_eq!(seen.recall((Family::V6, Table::Nat), &Trust::Any), None);
    }

    #[test]
    fn without_a_generation_everything_is_read_again() {
        let seen = Seen::default();
        seen.keep(OF, None, None);
        assert_eq!(seen.recall(OF, &Trust::Generation(None)), None);
        assert_eq!(seen.recall(OF, &Trust::Any), Some(None));
    }
}
