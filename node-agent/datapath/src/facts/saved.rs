//! What `iptables-save` prints, line by line.

use std::sync::Arc;

use super::backend::Usage;
use crate::family::Family;
use crate::input::IptablesBackend;
use crate::kernel::generation::Generation;
use crate::names::Names;

/// The whole of it, of one backend and one family.
#[derive(Clone, Debug)]
pub(super) struct Saved {
    pub(super) backend: IptablesBackend,
    pub(super) family: Family,
    /// Megabytes on a host with many Services, and kept from pass to pass.
    pub(super) text: Arc<str>,
    /// What is ours in it.
    pub(super) names: Names,
    /// Who uses the backend, counted once.
    pub(super) usage: Usage,
    /// That of the rules before they were printed.
    pub(super) generation: Option<Generation>,
}

/// A rule of somebody else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rule<'a> {
    pub(super) table: &'a str,
    pub(super) chain: &'a str,
    /// The line, as one would type it.
    pub(super) text: &'a str,
}

impl Saved {
    /// What was just printed.
    pub(super) fn new(
        (backend, family): (IptablesBackend, Family),
        generation: Option<Generation>,
        text: String,
        names: Names,
    ) -> Self {
        let saved = Self {
            backend,
            family,
            text: text.into(),
            names,
            usage: Usage::default(),
            generation,
        };
        let usage = Usage::of(&saved);
        Self { usage, ..saved }
    }

    /// Rules that are not ours and do not lead to ours.
    pub(super) fn foreign_rules(&self) -> impl Iterator<Item = Rule<'_>> {
        let mut table = "";
        self.text.lines().filter_map(move |line| {
            if let Some(name) = line.strip_prefix('*') {
                table = name;
            }
            let chain = line.strip_prefix("-A ")?.split(' ').next()?;
            let rule = Rule {
                table,
                chain,
                text: line,
            };
            // Taking thousands of lines into words takes long.
            let ours = line.contains(self.names.chain_prefix())
                && (self.is_ours(chain) || rule.target().is_some_and(|to| self.is_ours(to)));
            (!ours).then_some(rule)
        })
    }

    pub(super) fn is_ours(&self, chain: &str) -> bool {
        self.names.hook(chain).is_some()
    }

    /// Chains that somebody made: they have no policy.
    pub(super) fn chains(&self) -> impl Iterator<Item = &str> {
        self.text
            .lines()
            .filter_map(|line| line.strip_prefix(':')?.split_once(" - ["))
            .map(|(name, _)| name)
    }
}

impl<'a> Rule<'a> {
    pub(super) fn words(self) -> impl Iterator<Item = &'a str> + Clone {
        self.text.split_whitespace()
    }

    /// The word after an option.
    pub(super) fn value(self, option: &str) -> Option<&'a str> {
        self.words().skip_while(|word| *word != option).nth(1)
    }

    /// Where a packet goes that meets the rule.
    pub(super) fn target(self) -> Option<&'a str> {
        self.value("-j").or_else(|| self.value("-g"))
    }
}
