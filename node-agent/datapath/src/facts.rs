//! What this node's kernel can do, and what stands in the way of a data path on it.
//!
//! ```text
//!  capabilities, uname, geneve, who uses which iptables ──find──▶ Facts
//!  devices, ip rule, iptables-save, UDP sockets ──────────find──▶ Others ─┐
//!  settings, programs on the proxy's device ──────────────────────────────┴─obstacles─▶ Obstacle…
//!  an error of the kernel ──lack──▶ Lack: a right, a module, a port
//! ```

mod backend;
mod ebpf;
#[cfg(fuzzing)]
pub mod fuzzing;
pub mod lack;
mod marks;
pub mod obstacle;
mod port;
mod rights;
mod saved;
mod settings;
mod source_check;

use std::collections::BTreeSet;
use std::io;
use std::path::Path;

use netlink_packet_route::link::{InfoKind, LinkMessage};
use rtnetlink::LinkGeneve;

use crate::datapath::{Datapath, Item, Link};
use crate::family::Family;
use crate::input::{IptablesBackend, Marks};
use crate::kernel::generation::Generation;
use crate::kernel::iptables::{Dump, Iptables, IptablesError};
use crate::kernel::netfilter::Netfilter;
use crate::kernel::netlink::{self, Netlink, NetlinkError, foreign_mark};
use crate::kernel::sysctl::SysctlError;
use crate::kernel::xtables;
use crate::names::Names;
use crate::netns::Netns;

pub use obstacle::{Obstacle, Severity};

use saved::Saved;

/// Where the kernel tells this boot from every other; kubelet reads it, too.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// What this node's kernel can do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// As `uname -r` prints it.
    pub release: String,
    /// What tells this boot from every other.
    pub boot: String,
    /// Whether geneve devices can be made.
    pub geneve: bool,
    /// The backend for our rules: that of the host's own, or the one that holds ours already.
    pub iptables: IptablesBackend,
}

/// What others hold in the host's network namespace.
#[derive(Clone, Debug)]
pub struct Others {
    links: Vec<LinkMessage>,
    /// Bits of the mark that rules of `ip rule` read.
    rule_marks: Vec<u32>,
    /// What `iptables-save` prints; the kernel runs the rules of both backends.
    saved: Vec<Saved>,
    /// UDP sockets, also the kernel's own.
    sockets: Vec<std::net::SocketAddr>,
    /// The host's own rules are in the other backend than ours.
    moved: bool,
}

/// What is known from before.
#[derive(Clone, Copy, Debug, Default)]
pub struct Earlier<'a> {
    /// The backend that this agent, or an earlier one of this node, uses.
    pub backend: Option<IptablesBackend>,
    /// What was found last.
    pub others: Option<&'a Others>,
}

/// What the data path is going to need, as far as others may stand in its way.
#[derive(Clone, Copy, Debug)]
pub struct Interest<'a> {
    /// Our marks.
    pub marks: &'a Marks,
    /// What is wanted.
    pub desired: &'a Datapath,
    /// The proxy's device in the host's namespace.
    pub device: Option<&'a str>,
    /// Whether IPv6 is forwarded, too.
    pub ipv6: bool,
}

/// A fact that could not be found out.
#[derive(Debug, thiserror::Error)]
pub enum FactsError {
    /// This process may not do what it is for.
    #[error(
        "the agent lacks {}: add it to securityContext.capabilities of its container (config/node-agent does)",
        .0.join(", ")
    )]
    Rights(Vec<&'static str>),
    /// The capabilities are not told.
    #[error("read this process's capabilities")]
    Status(#[source] io::Error),
    /// uname failed.
    #[error("ask for the kernel's release")]
    Uname(#[source] nix::Error),
    /// The kernel does not say which boot this is.
    #[error("read {BOOT_ID}")]
    Boot(#[source] io::Error),
    /// The namespace cannot be entered.
    #[error("enter the host's network namespace")]
    Enter(#[source] io::Error),
    /// The UDP sockets are not told.
    #[error("read the host's UDP sockets")]
    Sockets(#[source] io::Error),
    /// Netlink failed.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// iptables failed.
    #[error(transparent)]
    Iptables(#[from] IptablesError),
    /// A setting could not be read.
    #[error(transparent)]
    Sysctl(#[from] SysctlError),
    /// The thread that looked died.
    #[error("the thread that looks at the host died")]
    Thread(#[source] io::Error),
}

/// Looks; what `names` says is ours.
///
/// # Errors
/// If something cannot be read; a missing right and a missing iptables are named.
pub async fn find(
    host: &Netns,
    names: &Names,
    earlier: Earlier<'_>,
) -> Result<(Facts, Others), FactsError> {
    let missing = rights::missing().map_err(FactsError::Status)?;
    if !missing.is_empty() {
        return Err(FactsError::Rights(missing));
    }
    let release = nix::sys::utsname::uname().map_err(FactsError::Uname)?;
    let boot = std::fs::read_to_string(BOOT_ID).map_err(FactsError::Boot)?;
    let netlink = Netlink::open(host).map_err(FactsError::Enter)?;
    let known = earlier.others.map_or(&[][..], |others| &others.saved);
    let list = async { Ok((netlink.links().await?, netlink.rules().await?)) };
    let ((links, rules), saved) = tokio::try_join!(list, save(host, names, known))?;
    let choice = backend::choose(
        earlier.backend,
        backend::usage(IptablesBackend::Nft, &saved),
        backend::usage(IptablesBackend::Legacy, &saved),
    );
    let facts = Facts {
        release: release.release().to_string_lossy().into_owned(),
        boot: boot.trim().to_owned(),
        geneve: geneve(&netlink, &links).await,
        iptables: choice.backend,
    };
    let others = Others {
        rule_marks: rules.iter().filter_map(foreign_mark).collect(),
        saved,
        sockets: port::sockets(host)?,
        moved: choice.moved,
        links,
    };
    Ok((facts, others))
}

/// What of that, and of the host's settings, keeps the data path from working.
///
/// # Errors
/// If something cannot be read.
pub async fn obstacles(
    host: &Netns,
    proc_root: &Path,
    (facts, others): (&Facts, &Others),
    interest: Interest<'_>,
) -> Result<Vec<Obstacle>, FactsError> {
    let mut found = Vec::new();
    found.extend(port::taken(
        &others.links,
        &others.sockets,
        &geneve_links(interest.desired),
    ));
    found.extend(marks::used(
        &others.rule_marks,
        &others.saved,
        interest.marks,
    ));
    if others.moved {
        found.push(Obstacle::BackendChanged(facts.iptables));
    }
    if others.has("kube-ipvs0") {
        found.push(Obstacle::Ipvs);
    }
    found.extend(settings::forwarding(
        host,
        proc_root,
        interest.device,
        interest.ipv6,
    )?);
    let Some(device) = interest.device else {
        return Ok(found);
    };
    found.extend(source_check::dropping(&others.saved, device));
    let netlink = Netlink::open(host).map_err(FactsError::Enter)?;
    let programs = match others.index(device) {
        Some(index) => netlink.bpf_programs(index).await?,
        None => Vec::new(),
    };
    found.extend(ebpf::judge(others.has("cilium_host"), device, &programs));
    Ok(found)
}

impl Others {
    /// What `iptables-save` printed.
    pub fn dumps(&self) -> impl Iterator<Item = Dump<'_>> {
        self.saved.iter().map(|saved| Dump {
            backend: saved.backend,
            family: saved.family,
            generation: saved.generation.clone(),
            text: &saved.text,
        })
    }

    /// The backends that hold chains of ours: none, one, or both after somebody mixed them.
    #[must_use]
    pub fn holding_ours(&self) -> BTreeSet<IptablesBackend> {
        self.saved
            .iter()
            .filter(|saved| saved.usage.is_ours())
            .map(|saved| saved.backend)
            .collect()
    }

    fn has(&self, device: &str) -> bool {
        self.index(device).is_some()
    }

    fn index(&self, device: &str) -> Option<u32> {
        let link = self
            .links
            .iter()
            .find(|link| netlink::name(link) == device)?;
        Some(link.header.index)
    }
}

/// The host's ends of geneve tunnels.
fn geneve_links(desired: &Datapath) -> Vec<&Link> {
    desired
        .host
        .iter()
        .filter_map(|item| match item {
            Item::Link(link @ Link::Geneve { .. }) => Some(link),
            _ => None,
        })
        .collect()
}

/// Whether the kernel has the geneve driver, loading it where it may: a device that cannot exist is
/// asked for. With the driver the kernel complains about the device, without it about its kind.
async fn geneve(netlink: &Netlink, links: &[LinkMessage]) -> bool {
    if links
        .iter()
        .any(|link| netlink::kind(link) == Some(InfoKind::Geneve))
    {
        return true;
    }
    // Two remotes at once: refused by the driver's own check (EINVAL), so nothing is ever made.
    let message = LinkGeneve::new("ambit-probe", u32::MAX).build();
    !netlink.is_unsupported(message).await
}

/// What both backends hold, of every family; nothing of legacy where it is not in use. What is known
/// and has not changed is not read again: with thousands of rules it takes long to print.
async fn save(host: &Netns, names: &Names, known: &[Saved]) -> Result<Vec<Saved>, FactsError> {
    let of_one = |family: &Family| {
        let (host, names, family) = (host.clone(), names.clone(), *family);
        let known = known.iter().filter(|saved| saved.family == family);
        let known: Vec<Saved> = known.cloned().collect();
        let save = move || save_family(&host, &names, family, known);
        async {
            tokio::task::spawn_blocking(save)
                .await
                .unwrap_or_else(|error| Err(FactsError::Thread(io::Error::other(error))))
        }
    };
    let families = host.families().map_err(FactsError::Enter)?;
    let found = futures::future::join_all(families.iter().map(of_one)).await;
    let found: Vec<_> = found.into_iter().collect::<Result<_, _>>()?;
    Ok(found.concat())
}

/// What both backends hold of one family; that of either may be known.
fn save_family(
    host: &Netns,
    names: &Names,
    family: Family,
    known: Vec<Saved>,
) -> Result<Vec<Saved>, FactsError> {
    // Reading the legacy tables would load them where they are not in use.
    let in_use = xtables::in_use(host, family).map_err(FactsError::Enter)?;
    let netfilter = Netfilter::open(host).map_err(FactsError::Enter)?;
    let dump = |backend| {
        let rules = (backend, family);
        let generation = Generation::of(rules, None, host, &netfilter);
        let same = |saved: &&Saved| {
            saved.backend == backend && generation.is_some() && saved.generation == generation
        };
        if let Some(known) = known.iter().find(same) {
            return Ok(known.clone());
        }
        let text = Iptables::new(backend).dump(family, host)?;
        Ok(Saved::new(rules, generation, text, names.clone()))
    };
    let mut found = match dump(IptablesBackend::Nft) {
        // An old kernel without nf_tables, whose host makes do with legacy.
        Err(error) if in_use && lack::is_of_kernel(&error) => Vec::new(),
        nft => vec![nft?],
    };
    if in_use {
        found.push(dump(IptablesBackend::Legacy)?);
    }
    Ok(found)
}
