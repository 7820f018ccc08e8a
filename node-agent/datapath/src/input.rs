//! What the data path of a node is built from: checked facts, no wrong values.

mod marks;

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::family::Family;
use crate::names::Names;
use crate::slot::{PerSlot, Slot};

pub use marks::{Mark, MarkError, Marks, MarksError};

/// Everything [`crate::build()`] needs to know about a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeInput {
    /// What ours is called on the host.
    pub names: Names,
    /// Devices between host and proxy.
    pub tunnel: Tunnel,
    /// The proxy's listeners.
    pub ports: Ports,
    /// Packet marks.
    pub marks: Marks,
    /// What happens without a proxy.
    pub failure_mode: FailureMode,
    /// The attached proxies, as long as their network namespaces live.
    pub proxies: PerSlot<Option<Proxy>>,
    /// The slot whose proxy takes new connections: its listeners are bound.
    pub serving: Option<Slot>,
    /// Pods whose traffic the proxy is to carry.
    pub pods: Vec<MeshPod>,
    /// Devices of the host that packets of mesh pods come in by.
    pub pod_devices: BTreeSet<String>,
}

/// An address of a pod that waits to be carried.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Hold {
    /// Device of the host that its packets come in by.
    pub device: String,
    /// The address.
    pub ip: IpAddr,
}

/// Devices between host and proxy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tunnel {
    /// Kind of device.
    pub kind: TunnelKind,
    /// UDP port of geneve.
    pub port: u16,
    /// Towards mesh pods.
    pub inbound: TunnelEnd,
    /// From mesh pods.
    pub outbound: TunnelEnd,
}

/// Kind of device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TunnelKind {
    /// Geneve (RFC 8926).
    Geneve,
    /// A veth pair.
    Veth,
}

/// One tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TunnelEnd {
    /// Virtual network identifier, 24 bits.
    pub vni: u32,
    ipv4: InnerNetwork,
    ipv6: InnerNetwork,
}

impl TunnelEnd {
    /// # Errors
    /// If one of the networks has fewer than two host addresses.
    pub fn new(vni: u32, ipv4: Ipv4Net, ipv6: Ipv6Net) -> Result<Self, NetworkTooSmall> {
        Ok(Self {
            vni,
            ipv4: InnerNetwork::new(ipv4.into())?,
            ipv6: InnerNetwork::new(ipv6.into())?,
        })
    }

    /// Its inner network.
    #[must_use]
    pub fn network(&self, family: Family) -> InnerNetwork {
        match family {
            Family::V4 => self.ipv4,
            Family::V6 => self.ipv6,
        }
    }
}

/// Inner network of a tunnel: the first host address is the host's, the second the proxy's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InnerNetwork(IpNet);

/// An inner network that cannot hold two hosts.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0} has no room for two addresses: use a network of /30 (IPv4) or /126 (IPv6) or larger, \
     for example 192.168.126.0/30"
)]
pub struct NetworkTooSmall(pub IpNet);

impl InnerNetwork {
    fn new(network: IpNet) -> Result<Self, NetworkTooSmall> {
        if network.max_prefix_len() - network.prefix_len() < 2 {
            Err(NetworkTooSmall(network))
        } else {
            Ok(Self(network.trunc()))
        }
    }

    /// The network itself.
    #[must_use]
    pub fn network(self) -> IpNet {
        self.0
    }

    /// Length of the prefix in bits.
    #[must_use]
    pub fn prefix_len(self) -> u8 {
        self.0.prefix_len()
    }

    /// Address of the host's end.
    #[must_use]
    pub fn host(self) -> IpAddr {
        self.address(1)
    }

    /// Address of the proxy's end.
    #[must_use]
    pub fn proxy(self) -> IpAddr {
        self.address(2)
    }

    fn address(self, host: u8) -> IpAddr {
        match self.0.network() {
            IpAddr::V4(network) => Ipv4Addr::from_bits(network.to_bits() + u32::from(host)).into(),
            IpAddr::V6(network) => Ipv6Addr::from_bits(network.to_bits() + u128::from(host)).into(),
        }
    }
}

/// The proxy's listeners, as TCP ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ports {
    /// Connections from mesh pods.
    pub outbound: u16,
    /// HBONE from other proxies.
    pub inbound: u16,
    /// Plaintext towards mesh pods.
    pub inbound_plaintext: u16,
}

/// What enrolled pods' traffic does while the node has no working proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureMode {
    /// It fails at once.
    Closed,
    /// It goes directly.
    Open,
}

/// The attached proxy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proxy {
    /// Where it and the host are on the network between them.
    pub ends: Ends,
    /// The proxy's network device in the host's namespace.
    pub host_device: String,
    /// The same device in the proxy's own namespace.
    pub device: String,
    /// MTU of its tunnels in bytes.
    pub mtu: u32,
    /// Value of `rp_filter` that devices of the host start with (`conf/default`).
    pub default_rp_filter: String,
}

/// Addresses of proxy and host towards each other: of one family or of both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ends {
    /// IPv4 only.
    V4(Pair<Ipv4Addr>),
    /// IPv6 only.
    V6(Pair<Ipv6Addr>),
    /// Both.
    Dual(Pair<Ipv4Addr>, Pair<Ipv6Addr>),
}

/// An address of the proxy's pod, and the host's address towards its pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pair<A> {
    /// The proxy's.
    pub proxy: A,
    /// The host's.
    pub host: A,
}

impl Ends {
    /// The addresses of one family, if it has them.
    #[must_use]
    pub fn of(&self, family: Family) -> Option<Pair<IpAddr>> {
        match (self, family) {
            (Self::V4(pair) | Self::Dual(pair, _), Family::V4) => Some(pair.into_any()),
            (Self::V6(pair) | Self::Dual(_, pair), Family::V6) => Some(pair.into_any()),
            (Self::V4(_), Family::V6) | (Self::V6(_), Family::V4) => None,
        }
    }

    /// The addresses that geneve packets go between: those of IPv4 where there are some.
    #[must_use]
    pub fn outer(&self) -> Pair<IpAddr> {
        match self {
            Self::V4(pair) | Self::Dual(pair, _) => pair.into_any(),
            Self::V6(pair) => pair.into_any(),
        }
    }
}

impl<A: Copy + Into<IpAddr>> Pair<A> {
    fn into_any(self) -> Pair<IpAddr> {
        Pair {
            proxy: self.proxy.into(),
            host: self.host.into(),
        }
    }
}

/// A pod whose traffic the proxy is to carry, by one of its addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct MeshPod {
    /// Address of the pod.
    pub ip: IpAddr,
}

impl NodeInput {
    /// The families that there is anything to do in: IPv6 once the proxy or a pod has it.
    #[must_use]
    pub fn families(&self) -> Vec<Family> {
        let mut proxies = self.proxies.taken();
        let of_proxy = proxies.any(|(_, proxy)| proxy.ends.of(Family::V6).is_some());
        if of_proxy || self.pods.iter().any(|pod| pod.ip.is_ipv6()) {
            Family::ALL.to_vec()
        } else {
            vec![Family::V4]
        }
    }

    /// The proxy that takes new connections, and its slot.
    #[must_use]
    pub fn serving(&self) -> Option<(Slot, &Proxy)> {
        let slot = self.serving?;
        Some((slot, self.proxies[slot].as_ref()?))
    }
}

/// Backend of iptables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum IptablesBackend {
    /// nf_tables.
    Nft,
    /// The older xtables interface.
    Legacy,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ends_of_a_tunnel_are_the_first_two_addresses() {
        let end = |ipv4: &str, ipv6: &str| {
            TunnelEnd::new(1000, ipv4.parse().unwrap(), ipv6.parse().unwrap())
        };
        let tunnel = end("192.168.126.0/30", "fd00:126::/126").unwrap();
        let [v4, v6] = Family::ALL.map(|family| tunnel.network(family));
        assert_eq!(v4.host().to_string(), "192.168.126.1");
        assert_eq!(v4.proxy().to_string(), "192.168.126.2");
        assert_eq!(v6.host().to_string(), "fd00:126::1");
        assert_eq!(v6.proxy().to_string(), "fd00:126::2");
        assert!(end("192.168.126.0/31", "fd00:126::/126").is_err());
        assert!(end("192.168.126.0/30", "fd00:126::/127").is_err());
    }
}
