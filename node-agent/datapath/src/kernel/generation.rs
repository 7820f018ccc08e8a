//! What tells the rules of a backend from those that were there before: programs that print thousands of them take
//! long, and so run only when something has changed.

use std::collections::BTreeMap;
use std::io;

use super::netfilter::Netfilter;
use super::xtables;
use crate::datapath::Table;
use crate::family::Family;
use crate::input::IptablesBackend;
use crate::netns::Netns;

/// Another one after every change of the rules that it is of. To be asked for before they are read: a change
/// meanwhile is then seen the next time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Generation(Numbers);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Numbers {
    /// nftables counts its changes, of all tables and families together.
    Count(u32),
    /// Hashes of legacy's tables, by name.
    Tables(BTreeMap<String, u64>),
}

impl Generation {
    /// That of one table, or of all; none where the kernel does not tell: then the rules have to be read.
    pub(crate) fn of(
        (backend, family): (IptablesBackend, Family),
        table: Option<Table>,
        netns: &Netns,
        netfilter: &Netfilter,
    ) -> Option<Self> {
        let numbers = match backend {
            IptablesBackend::Nft => netfilter
                .generation()
                .map(|count| count.map(Numbers::Count)),
            IptablesBackend::Legacy => {
                xtables::hashes(netns, family, table).map(|hashes| Some(Numbers::Tables(hashes)))
            }
        };
        let unknown = |error: &io::Error| {
            tracing::debug!("ask whether the rules of {backend:?} have changed: {error}");
        };
        numbers.inspect_err(unknown).ok().flatten().map(Self)
    }

    /// That of one of the tables.
    pub(super) fn of_table(&self, table: Table) -> Self {
        Self(match &self.0 {
            Numbers::Count(count) => Numbers::Count(*count),
            Numbers::Tables(hashes) => {
                let hash = hashes.get_key_value(table.name());
                Numbers::Tables(
                    hash.map(|(name, hash)| (name.clone(), *hash))
                        .into_iter()
                        .collect(),
                )
            }
        })
    }

    #[cfg(test)]
    pub(super) fn counted(count: u32) -> Self {
        Self(Numbers::Count(count))
    }
}
