//! What of others stands in the way of the data path, each with what to do about it.

use crate::input::IptablesBackend;

/// One of them.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Obstacle {
    /// Somebody else has the UDP port of our geneve devices.
    #[error("UDP port {port} is taken on this node by {by}: set spec.tunnel.port to a free port")]
    GenevePort {
        /// The port.
        port: u16,
        /// Who has it.
        by: String,
    },
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
    /// The host's rules are in another backend of iptables than ours.
    #[error(
        "Ambit's chains are in iptables-{}, and this host's own rules are in iptables-{} now; together they \
         break ClusterIPs: run ambit-node-agent cleanup on this node and restart its agent, which then takes \
         the host's", name(*.0), name(other(*.0))
    )]
    BackendChanged(IptablesBackend),
    /// kube-proxy runs in IPVS mode: ClusterIPs are local addresses, no rule of ours sees them.
    #[error(
        "kube-proxy runs in IPVS mode (device kube-ipvs0), so traffic to ClusterIPs cannot be redirected; \
         set kube-proxy's mode to iptables or nftables"
    )]
    Ipvs,
    /// The host does not forward packets; the path below `/proc/sys/net`.
    #[error(
        "this node does not forward packets (net/{0} is 0): set it to 1, with sysctl -w now and in \
         /etc/sysctl.d for the next start"
    )]
    ForwardingDisabled(String),
    /// A rule drops what the proxy sends from its clients' addresses.
    #[error(
        "what the proxy sends from pods' addresses by {device} is dropped by a check of the source ({rule}): \
         with Calico set workloadSourceSpoofing: Any in FelixConfiguration default, then annotate the \
         proxy's pods with cni.projectcalico.org/allowedSourcePrefixes (config/calico does)"
    )]
    SourceCheck {
        /// The proxy's device.
        device: String,
        /// The rule.
        rule: String,
    },
    /// A CNI's programs carry packets past netfilter.
    #[error("{}", .0.message(.1))]
    Ebpf(EbpfOwner, String),
    /// Somebody's program is on the proxy's device; it may leave packets alone or not.
    #[error(
        "a BPF program of tc ({program}) is attached to the proxy's device {device}: if mesh traffic is not \
         redirected, it carries packets past netfilter, and must be detached there"
    )]
    EbpfProgram {
        /// The proxy's device.
        device: String,
        /// Its name.
        program: String,
    },
}

/// A CNI with a data path of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EbpfOwner {
    /// Cilium, not chained behind another plugin.
    Cilium,
    /// Calico with its BPF data plane.
    Calico,
}

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// Nothing may be begun: it would break what others do, or the kernel refuses it.
    Forbids,
    /// The data path can stand and does not work.
    Breaks,
    /// It may work.
    MayBreak,
}

impl Obstacle {
    /// How bad it is.
    #[must_use]
    pub fn severity(&self) -> Severity {
        match self {
            Self::GenevePort { .. } | Self::RuleMark(_) | Self::ChainMark { .. } => {
                Severity::Forbids
            }
            Self::BackendChanged(_)
            | Self::Ipvs
            | Self::ForwardingDisabled(_)
            | Self::SourceCheck { .. }
            | Self::Ebpf(..) => Severity::Breaks,
            Self::EbpfProgram { .. } => Severity::MayBreak,
        }
    }
}

impl EbpfOwner {
    fn message(self, device: &str) -> String {
        match self {
            Self::Cilium => format!(
                "Cilium's BPF programs carry the packets of pods past netfilter (device {device}), where they \
                 cannot be redirected: chain Cilium behind a CNI plugin that makes veth pairs \
                 (cni.chainingMode=generic-veth, cni.exclusive=false) with kube-proxy \
                 (kubeProxyReplacement=false)"
            ),
            Self::Calico => format!(
                "Calico's BPF data plane carries the packets of pods past netfilter (device {device}), where \
                 they cannot be redirected: set linuxDataplane: Iptables in the Installation (bpfEnabled: \
                 false in FelixConfiguration) and run kube-proxy"
            ),
        }
    }
}

fn name(backend: IptablesBackend) -> &'static str {
    match backend {
        IptablesBackend::Nft => "nft",
        IptablesBackend::Legacy => "legacy",
    }
}

fn other(backend: IptablesBackend) -> IptablesBackend {
    match backend {
        IptablesBackend::Nft => IptablesBackend::Legacy,
        IptablesBackend::Legacy => IptablesBackend::Nft,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_that_has_moved_is_told_from_where_to_where() {
        let said = Obstacle::BackendChanged(IptablesBackend::Nft).to_string();
        assert!(
            said.starts_with(
                "Ambit's chains are in iptables-nft, and this host's own rules are in iptables-legacy now"
            ),
            "{said}"
        );
    }
}
