//! Our chains, read by `iptables-save` and replaced by one `iptables-restore --noflush` a table; those
//! of IPv6 by the same programs of ip6tables.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::process::{Command, Output, Stdio};

use super::generation::Generation;
use crate::datapath::{Chain, Chains, Item, Table};
use crate::family::Family;
use crate::input::IptablesBackend;
use crate::names::Names;
use crate::netns::Netns;

/// The programs of one backend.
#[derive(Clone, Copy, Debug)]
pub struct Iptables {
    backend: IptablesBackend,
}

/// All tables of one backend and one family, as `iptables-save` prints them.
#[derive(Clone, Debug)]
pub struct Dump<'a> {
    /// The backend.
    pub backend: IptablesBackend,
    /// The family.
    pub family: Family,
    /// That of the rules before they were read.
    pub generation: Option<Generation>,
    /// The text.
    pub text: &'a str,
}

impl Dump<'_> {
    /// Our chains of a table, none if there are none.
    pub(super) fn chains(&self, table: Table, names: &Names) -> Option<Chains> {
        let start = format!("*{}\n", table.name());
        let place = self.text.find(&start)?;
        let text = self.text.get(place..)?;
        let end = text.find("\nCOMMIT").unwrap_or(text.len());
        chains(self.family, table, names, text.get(..end)?)
    }
}

/// Chains that could not be read or replaced.
#[derive(Debug, thiserror::Error)]
pub enum IptablesError {
    /// The program is not there.
    #[error(
        "{0} is missing: install the package iptables in the agent's image, or on the host for a bare agent"
    )]
    Missing(&'static str),
    /// The program could not be run.
    #[error("run {0}")]
    Run(&'static str, #[source] io::Error),
    /// The thread that ran the program died.
    #[error("the thread that runs iptables died")]
    Thread(#[source] io::Error),
    /// The program said no.
    #[error("{program} of table {table}: {message}")]
    Failed {
        /// The program.
        program: &'static str,
        /// The table.
        table: &'static str,
        /// What it printed.
        message: String,
    },
}

impl Iptables {
    pub(crate) fn new(backend: IptablesBackend) -> Self {
        Self { backend }
    }

    pub(super) fn backend(self) -> IptablesBackend {
        self.backend
    }

    fn save_program(self, family: Family) -> &'static str {
        match (self.backend, family) {
            (IptablesBackend::Nft, Family::V4) => "iptables-nft-save",
            (IptablesBackend::Nft, Family::V6) => "ip6tables-nft-save",
            (IptablesBackend::Legacy, Family::V4) => "iptables-legacy-save",
            (IptablesBackend::Legacy, Family::V6) => "ip6tables-legacy-save",
        }
    }

    fn restore_program(self, family: Family) -> &'static str {
        match (self.backend, family) {
            (IptablesBackend::Nft, Family::V4) => "iptables-nft-restore",
            (IptablesBackend::Nft, Family::V6) => "ip6tables-nft-restore",
            (IptablesBackend::Legacy, Family::V4) => "iptables-legacy-restore",
            (IptablesBackend::Legacy, Family::V6) => "ip6tables-legacy-restore",
        }
    }

    /// Our chains of a table, none if there are none.
    ///
    /// # Errors
    /// If the program is missing or fails.
    pub(super) fn observe(
        self,
        (family, table): (Family, Table),
        names: &Names,
        netns: &Netns,
    ) -> Result<Option<Chains>, IptablesError> {
        let printed = self.save(family, table, netns)?;
        Ok(chains(family, table, names, &printed))
    }

    /// What `iptables-save` prints of a table.
    ///
    /// # Errors
    /// If the program is missing or fails.
    pub fn save(
        self,
        family: Family,
        table: Table,
        netns: &Netns,
    ) -> Result<String, IptablesError> {
        let program = self.save_program(family);
        run(netns, program, &["-t", table.name()], table.name(), "")
    }

    /// What `iptables-save` prints of all tables that are there; it makes none.
    ///
    /// # Errors
    /// If the program is missing or fails.
    pub fn dump(self, family: Family, netns: &Netns) -> Result<String, IptablesError> {
        run(netns, self.save_program(family), &[], "(all)", "")
    }

    /// Puts `new` in the place of `old`, in one transaction.
    pub(super) fn replace(
        self,
        old: Option<&Item>,
        new: Option<&Item>,
        netns: &Netns,
    ) -> Result<(), IptablesError> {
        let as_chains = |item: Option<&Item>| match item {
            Some(Item::Chains(chains)) => Some(chains.clone()),
            _ => None,
        };
        let (old, new) = (as_chains(old), as_chains(new));
        let Some(Chains {
            family,
            table,
            prefix,
            ..
        }) = new.as_ref().or(old.as_ref())
        else {
            return Ok(());
        };
        let (family, table) = (*family, *table);
        let none = BTreeMap::new();
        let text = transaction(
            table,
            prefix,
            old.as_ref().map_or(&none, |chains| &chains.chains),
            new.as_ref().map_or(&none, |chains| &chains.chains),
        );
        let program = self.restore_program(family);
        // -w: the lock may be held by kube-proxy.
        run(
            netns,
            program,
            &["--noflush", "-w", "5"],
            table.name(),
            &text,
        )
        .map(drop)
    }
}

fn run(
    netns: &Netns,
    program: &'static str,
    arguments: &[&str],
    table: &'static str,
    input: &str,
) -> Result<String, IptablesError> {
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => IptablesError::Missing(program),
        _ => IptablesError::Run(program, error),
    };
    // A child inherits the network namespace of the thread that starts it.
    let output = netns
        .run(|| child(program, arguments, input))
        .map_err(failed)?
        .map_err(failed)?;
    if !output.status.success() {
        let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(IptablesError::Failed {
            program,
            table,
            message,
        });
    }
    // Megabytes, which are rarely not text.
    Ok(String::from_utf8(output.stdout)
        .unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned()))
}

fn child(program: &str, arguments: &[&str], input: &str) -> io::Result<Output> {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input.as_bytes())?;
    }
    child.wait_with_output()
}

fn chains(family: Family, table: Table, names: &Names, saved: &str) -> Option<Chains> {
    let chains = parse(saved, names);
    (!chains.is_empty()).then(|| Chains {
        family,
        table,
        prefix: names.chain_prefix().to_owned(),
        chains,
    })
}

/// Our chains in what `iptables-save` printed, by built-in chain.
pub(crate) fn parse(saved: &str, names: &Names) -> BTreeMap<String, Chain> {
    let mut chains: BTreeMap<String, Chain> = BTreeMap::new();
    let mut places: BTreeMap<&str, usize> = BTreeMap::new();
    for line in saved.lines() {
        if let Some(name) = line
            .strip_prefix(':')
            .and_then(|rest| rest.split(' ').next())
        {
            if let Some(hook) = names.hook(name) {
                chains.entry(hook.to_owned()).or_default();
            }
            continue;
        }
        let Some((name, rule)) = line
            .strip_prefix("-A ")
            .and_then(|rest| rest.split_once(' '))
        else {
            continue;
        };
        if let Some(hook) = names.hook(name) {
            chains
                .entry(hook.to_owned())
                .or_default()
                .rules
                .push(rule.to_owned());
            continue;
        }
        let place = places.entry(name).or_default();
        let jump = rule.strip_prefix("-j ");
        if jump.is_some_and(|to| names.is_neighbour(to, name)) {
            continue;
        }
        if jump.and_then(|to| names.hook(to)) == Some(name) {
            chains
                .entry(name.to_owned())
                .or_default()
                .jumps
                .push(*place);
        }
        *place += 1;
    }
    chains
}

/// The input of `iptables-restore --noflush` that leads from `old` to `new`.
fn transaction(
    table: Table,
    prefix: &str,
    old: &BTreeMap<String, Chain>,
    new: &BTreeMap<String, Chain>,
) -> String {
    let mut text = format!("*{}\n", table.name());
    // Writing to a String cannot fail. Declaring a chain empties it.
    for hook in old.keys().chain(new.keys()) {
        let _ = writeln!(text, ":{prefix}{hook} - [0:0]");
    }
    for (hook, chain) in new {
        for rule in &chain.rules {
            let _ = writeln!(text, "-A {prefix}{hook} {rule}");
        }
    }
    for (hook, chain) in old {
        let keeps = new.get(hook).is_some_and(|new| new.jumps == chain.jumps);
        for _ in chain.jumps.iter().filter(|_| !keeps) {
            let _ = writeln!(text, "-D {hook} -j {prefix}{hook}");
        }
    }
    for (hook, chain) in new {
        if old.get(hook).is_none_or(|old| old.jumps != chain.jumps) {
            let _ = writeln!(text, "-I {hook} 1 -j {prefix}{hook}");
        }
    }
    for hook in old.keys().filter(|hook| !new.contains_key(*hook)) {
        let _ = writeln!(text, "-X {prefix}{hook}");
    }
    text + "COMMIT\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAVED: &str = "\
*mangle
:PREROUTING ACCEPT [0:0]
:KUBE-KUBELET-CANARY - [0:0]
:ztunnel-PREROUTING - [0:0]
:ztunnel-INPUT - [0:0]
-A PREROUTING -j KUBE-SOMETHING
-A PREROUTING -j ztunnel-PREROUTING
-A ztunnel-PREROUTING -i istioin -j MARK --set-xmark 0x200/0x200
-A ztunnel-PREROUTING -j RETURN
COMMIT
";

    #[test]
    fn only_our_chains_and_the_jumps_to_them_are_read() {
        let chains = parse(SAVED, &Names::default());
        assert_eq!(chains.keys().collect::<Vec<_>>(), ["INPUT", "PREROUTING"]);
        assert_eq!(chains["PREROUTING"].jumps, [1]);
        assert_eq!(chains["PREROUTING"].rules.len(), 2);
        assert!(chains["INPUT"].jumps.is_empty());
    }

    #[test]
    fn of_a_dump_only_the_table_that_is_asked_for_is_read() {
        let other = "*nat\n:PREROUTING ACCEPT [0:0]\n:ztunnel-POSTROUTING - [0:0]\nCOMMIT\n";
        let text = format!("{other}{SAVED}*raw\n:ztunnel-OUTPUT - [0:0]\nCOMMIT\n");
        let dump = Dump {
            backend: IptablesBackend::Legacy,
            family: Family::V4,
            generation: None,
            text: &text,
        };
        let names = Names::default();
        let mangle = dump.chains(Table::Mangle, &names).unwrap();
        assert_eq!(mangle.chains, parse(SAVED, &names));
        let nat = dump.chains(Table::Nat, &names).unwrap();
        assert_eq!(nat.chains.keys().collect::<Vec<_>>(), ["POSTROUTING"]);
    }

    #[test]
    fn a_jump_in_the_wrong_place_is_moved_to_the_first() {
        let old = parse(SAVED, &Names::default());
        let mut new = old.clone();
        new.insert(
            "PREROUTING".to_owned(),
            Chain {
                jumps: vec![0],
                rules: vec!["-j RETURN".to_owned()],
            },
        );
        let text = transaction(Table::Mangle, "ztunnel-", &old, &new);
        assert!(text.contains(
            "-D PREROUTING -j ztunnel-PREROUTING\n-I PREROUTING 1 -j ztunnel-PREROUTING"
        ));
    }

    #[test]
    fn removal_leaves_neither_jump_nor_chain() {
        let text = transaction(
            Table::Mangle,
            "ztunnel-",
            &parse(SAVED, &Names::default()),
            &BTreeMap::new(),
        );
        assert!(text.contains("-D PREROUTING -j ztunnel-PREROUTING"));
        assert!(text.contains("-X ztunnel-PREROUTING"));
        assert!(text.contains("-X ztunnel-INPUT"));
        assert!(!text.contains("KUBE"));
    }
}
