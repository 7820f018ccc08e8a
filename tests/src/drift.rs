//! What Ambit keeps in a node's kernel, piece by piece: read with the kernel's own tools, deleted with them, and read
//! again.
//!
//! ```text
//!  Side (a node's namespace, or that of its proxy) ──read──▶ Sections ──pieces──▶ Piece ──delete──▶ kernel
//! ```

mod normal;
mod pieces;

use std::collections::BTreeMap;
use std::process::Command;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::cluster::{Cluster, node_words};
use crate::command;
use crate::process;

pub use pieces::pieces;

/// A network namespace of a node.
#[derive(Clone, Debug)]
pub struct Side {
    /// The node.
    pub node: String,
    /// Whether it is the proxy's, and not the node's own.
    pub of_proxy: bool,
    words: Vec<String>,
}

/// A part of what the kernel of a side holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Section {
    /// Devices.
    Links,
    /// Addresses of devices.
    Addresses,
    /// Policy routing rules.
    Rules,
    /// Routes of all tables.
    Routes,
    /// Sets with their members.
    Sets,
    /// Chains of iptables and ip6tables.
    Chains,
    /// Settings under `/proc/sys/net`.
    Settings,
    /// Sockets that listen.
    Listeners,
}

/// What kind of thing is deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A device.
    Link,
    /// That a device is up.
    Up,
    /// An address of a device.
    Address,
    /// A policy routing rule.
    Rule,
    /// A route.
    Route,
    /// A set; the chain that names it has to go first.
    Set,
    /// All members of a set.
    Members,
    /// A member of a set.
    Member,
    /// A chain, with the jump to it.
    Chain,
    /// A rule of a chain.
    ChainRule,
    /// A rule that hands packets to the proxy's listeners.
    Tproxy,
    /// The jump to a chain.
    Jump,
    /// The value of a setting.
    Setting,
    /// A listener of the proxy.
    Socket,
}

/// Something that can be deleted.
#[derive(Clone, Debug)]
pub struct Piece {
    /// Its kind.
    pub kind: Kind,
    /// Where it is.
    pub side: Side,
    /// Where its absence shows.
    pub sections: &'static [Section],
    /// What deletes it, a shell script.
    pub delete: String,
}

/// What a side holds, normalised.
pub type Held = BTreeMap<Section, String>;

impl Section {
    const HOST: [Self; 7] = [
        Self::Links,
        Self::Addresses,
        Self::Rules,
        Self::Routes,
        Self::Sets,
        Self::Chains,
        Self::Settings,
    ];

    fn script(self) -> &'static str {
        match self {
            Self::Links => "ip -d -o link",
            Self::Addresses => "ip -o addr",
            Self::Rules => "ip -4 rule | sed 's/^/-4 /'; ip -6 rule | sed 's/^/-6 /'",
            Self::Routes => {
                "ip -4 route show table all | sed 's/^/-4 /'; ip -6 route show table all | sed 's/^/-6 /'"
            }
            Self::Sets => "ipset list",
            Self::Chains => "iptables-save | sed 's/^/-4 /'; ip6tables-save | sed 's/^/-6 /'",
            Self::Settings => {
                "cd /proc/sys/net; grep . ipv4/conf/*/rp_filter ipv4/ip_forward ipv4/ip_local_port_range \
                 ipv6/conf/all/forwarding ipv6/conf/*istio*/disable_ipv6 ipv6/conf/*istio*/addr_gen_mode"
            }
            Self::Listeners => "ss -Hltn",
        }
    }
}

impl Side {
    /// A node's own namespace.
    ///
    /// # Errors
    /// If there is no cluster.
    pub fn host(node: &str) -> Result<Self> {
        Ok(Self {
            node: node.to_owned(),
            of_proxy: false,
            words: node_words(node)?,
        })
    }

    /// The namespace of a node's proxy.
    ///
    /// # Errors
    /// If none runs.
    pub fn proxy(cluster: &Cluster, node: &str) -> Result<Self> {
        let pod = cluster.system_pod("ambit-proxy", node)?;
        let process = process::of_pod(cluster, "ambit-proxy", &pod)?;
        let mut words = node_words(node)?;
        let net = format!("--net=/proc/{}/ns/net", process.pid);
        words.extend(["nsenter".to_owned(), net]);
        Ok(Self {
            node: node.to_owned(),
            of_proxy: true,
            words,
        })
    }

    /// Runs a shell script there; what it printed.
    ///
    /// # Errors
    /// If it fails.
    pub fn run(&self, script: &str) -> Result<String> {
        let mut command = Command::new(&self.words[0]);
        command.args(&self.words[1..]).args(["sh", "-ec", script]);
        let place = if self.of_proxy { " (proxy)" } else { "" };
        command::run(&mut command, "")?
            .success()
            .with_context(|| format!("on {}{place}: {script}", self.node))
    }

    /// Reads a part of what it holds.
    ///
    /// # Errors
    /// If a tool fails.
    pub fn read(&self, section: Section) -> Result<String> {
        Ok(normal::of(section, &self.run(section.script())?))
    }

    /// Reads all that it holds.
    ///
    /// # Errors
    /// If a tool fails.
    pub fn read_all(&self) -> Result<Held> {
        let own = self.of_proxy.then_some(Section::Listeners);
        let sections = Section::HOST.into_iter().chain(own);
        sections
            .map(|section| Ok((section, self.read(section)?)))
            .collect()
    }
}

impl Kind {
    /// Whether the kernel tells who listens that it is gone.
    #[must_use]
    pub fn is_told(self) -> bool {
        matches!(
            self,
            Self::Link | Self::Up | Self::Address | Self::Rule | Self::Route
        )
    }
}
