//! What this node's kernel can do, and what of it others use already.

use std::io;
use std::path::Path;

use netlink_packet_route::link::InfoKind;
use rtnetlink::LinkGeneve;

use crate::datapath::Table;
use crate::family::Family;
use crate::input::{IptablesBackend, Marks};
use crate::kernel::iptables::{Iptables, IptablesError};
use crate::kernel::netlink::{self, Netlink, NetlinkError, foreign_mark};
use crate::names::{ISTIOIN, ISTIOOUT};
use crate::netns::Netns;

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// As `uname -r` prints it.
    pub release: String,
    /// Whether geneve devices can be made.
    pub geneve: bool,
    /// The backend that the host's own rules are in.
    pub iptables: IptablesBackend,
    /// kube-proxy runs in IPVS mode: ClusterIPs are local addresses, no rule of ours sees them.
    pub ipvs: bool,
}

/// A fact that could not be found out.
#[derive(Debug, thiserror::Error)]
pub enum FactsError {
    /// uname failed.
    #[error("ask for the kernel's release")]
    Uname(#[source] nix::Error),
    /// The namespace cannot be entered.
    #[error("enter the host's network namespace")]
    Enter(#[source] io::Error),
    /// Netlink failed.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// iptables failed.
    #[error(transparent)]
    Iptables(#[from] IptablesError),
}

/// Looks.
///
/// # Errors
/// If something cannot be read; a missing iptables is named.
pub async fn find(host: &Netns) -> Result<Facts, FactsError> {
    let release = nix::sys::utsname::uname().map_err(FactsError::Uname)?;
    let netlink = Netlink::open(host).map_err(FactsError::Enter)?;
    let links = netlink.links().await?;
    Ok(Facts {
        release: release.release().to_string_lossy().into_owned(),
        geneve: geneve(&netlink).await?,
        iptables: backend(host)?,
        ipvs: links.iter().any(|link| netlink::name(link) == "kube-ipvs0"),
    })
}

/// Whether the kernel has the geneve driver, loading it where it may: a device that cannot exist is
/// asked for. With the driver the kernel complains about the device, without it about its kind.
async fn geneve(netlink: &Netlink) -> Result<bool, NetlinkError> {
    let links = netlink.links().await?;
    if links
        .iter()
        .any(|link| netlink::kind(link) == Some(InfoKind::Geneve))
    {
        return Ok(true);
    }
    // Two remotes at once: refused by the driver's own check (EINVAL), so nothing is ever made.
    let message = LinkGeneve::new("ambit-probe", u32::MAX).build();
    Ok(!netlink.is_unsupported(message).await)
}

/// The backend that kube-proxy and the CNI use: mixing the two breaks ClusterIPs.
fn backend(host: &Netns) -> Result<IptablesBackend, FactsError> {
    // Reading the legacy tables would load them where they are not in use.
    let legacy_in_use = host
        .run(|| std::fs::read_to_string(Path::new("/proc/thread-self/net/ip_tables_names")))
        .map_err(FactsError::Enter)?
        .is_ok_and(|names| !names.trim().is_empty());
    if !legacy_in_use {
        // A missing program is found here and not in the middle of a plan.
        Iptables::new(IptablesBackend::Nft).save(Family::V4, Table::Nat, host)?;
        return Ok(IptablesBackend::Nft);
    }
    let legacy = rules(IptablesBackend::Legacy, host)?;
    let nft = rules(IptablesBackend::Nft, host)?;
    Ok(if legacy > nft {
        IptablesBackend::Legacy
    } else {
        IptablesBackend::Nft
    })
}

fn rules(backend: IptablesBackend, host: &Netns) -> Result<usize, FactsError> {
    let mut count = 0;
    for table in [Table::Mangle, Table::Nat] {
        let saved = Iptables::new(backend).save(Family::V4, table, host)?;
        count += saved
            .lines()
            .filter(|line| line.starts_with("-A") && !line.contains("ztunnel-"))
            .count();
    }
    Ok(count)
}

/// A use of something that we need for ourselves, by somebody else on this node.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Conflict {
    /// A rule of `ip rule` reads bits of our marks.
    #[error(
        "an ip rule of another program uses the mark bits {0:#x}: set spec.marks to other bits"
    )]
    RuleMark(u32),
    /// Somebody's rule of iptables touches bits of our marks.
    #[error(
        "a rule of iptables uses the mark bits {bits:#x}: set spec.marks to other bits ({rule})"
    )]
    ChainMark {
        /// The bits.
        bits: u32,
        /// The rule.
        rule: String,
    },
    /// A geneve device that is not ours.
    #[error(
        "another geneve device ({0}) is on this node: if it uses the same UDP port, set spec.tunnel.port"
    )]
    Geneve(String),
}

/// Who else uses our marks or our kind of device.
///
/// # Errors
/// If something cannot be read.
pub async fn conflicts(
    host: &Netns,
    backend: IptablesBackend,
    marks: &Marks,
) -> Result<Vec<Conflict>, FactsError> {
    let netlink = Netlink::open(host).map_err(FactsError::Enter)?;
    let ours = marks.outbound.mask()
        | marks.skip.mask()
        | marks.proxied.mask()
        | marks.own.mask()
        | marks.return_.mask();
    let mut found = Vec::new();
    let foreign = netlink.rules().await?;
    found.extend(
        foreign
            .iter()
            .filter_map(foreign_mark)
            .map(|mask| mask & ours)
            .filter(|bits| *bits != 0)
            .map(Conflict::RuleMark),
    );
    for table in [Table::Mangle, Table::Nat] {
        let saved = Iptables::new(backend).save(Family::V4, table, host)?;
        for rule in saved
            .lines()
            .filter(|line| line.starts_with("-A") && !line.contains("ztunnel-"))
        {
            let bits = mark_bits(rule) & ours;
            if bits != 0 {
                found.push(Conflict::ChainMark {
                    bits,
                    rule: rule.to_owned(),
                });
            }
        }
    }
    for link in netlink.links().await? {
        let name = netlink::name(&link);
        if netlink::kind(&link) == Some(InfoKind::Geneve)
            && ![ISTIOIN, ISTIOOUT].contains(&name.as_str())
        {
            found.push(Conflict::Geneve(name));
        }
    }
    Ok(found)
}

/// The bits of the packet mark that a rule compares or writes.
fn mark_bits(rule: &str) -> u32 {
    let words: Vec<&str> = rule.split_whitespace().collect();
    let mut bits = 0;
    for pair in words.windows(2) {
        let [name, value] = pair else { continue };
        let reads = *name == "--mark" && !rule.contains("-m connmark");
        let writes = ["--set-xmark", "--set-mark"].contains(name) && rule.contains("-j MARK");
        if reads || writes {
            bits |= mask_of(value);
        }
    }
    bits
}

fn mask_of(value: &str) -> u32 {
    let number =
        |text: &str| u32::from_str_radix(text.trim_start_matches("0x"), 16).unwrap_or(u32::MAX);
    match value.split_once('/') {
        // `--set-xmark 0x0/0xffffffff` clears a mark on its way out; nothing of ours is read after it.
        Some((_, mask)) => number(mask),
        None => u32::MAX,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_uses_the_bits_of_its_mask() {
        assert_eq!(
            mark_bits("-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000"),
            0x4000
        );
        assert_eq!(mark_bits("-A X -m mark --mark 0x100/0x300 -j DROP"), 0x300);
        assert_eq!(mark_bits("-A X -m connmark --mark 0x100/0x300 -j DROP"), 0);
        assert_eq!(mark_bits("-A X -j RETURN"), 0);
    }
}
