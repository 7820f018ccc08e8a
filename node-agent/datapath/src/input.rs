//! What the data path of a node is built from: checked facts, no wrong values.

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::family::Family;
use crate::names::Names;
use crate::slot::{PerSlot, Slot};

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

/// Packet marks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Marks {
    /// Host: send to the proxy by the outbound tunnel.
    pub outbound: Mark,
    /// Host: route by the main table.
    pub skip: Mark,
    /// Host: dialled by the proxy of a slot from a pod's address; saved in conntrack.
    pub proxied: PerSlot<Mark>,
    /// Host: the proxy's own traffic.
    pub own: Mark,
    /// Host: answer to what the proxy of a slot carries.
    pub return_: PerSlot<Mark>,
    /// Proxy: deliver locally (TPROXY).
    pub tproxy: Mark,
    /// Proxy: deliver locally (answers to transparent sockets).
    pub proxy_return: Mark,
}

/// Marks that do not fit together.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MarksError {
    /// Packets that are to go by the main table would not.
    #[error("{name} {mark} must contain skip {skip}: what carries it is to go by the main table")]
    LacksSkip {
        /// Name of the mark.
        name: &'static str,
        /// The mark.
        mark: Mark,
        /// The skip mark.
        skip: Mark,
    },
    /// Two marks cannot be told apart.
    #[error("{name} {mark} is also read as {other_name} {other}: give them bits of their own")]
    Ambiguous {
        /// Name of the one.
        name: &'static str,
        /// The one.
        mark: Mark,
        /// Name of the other.
        other_name: &'static str,
        /// The other.
        other: Mark,
    },
}

impl Marks {
    /// Whether the rules can tell the marks apart.
    ///
    /// # Errors
    /// If not, naming the marks as the AmbientNode does.
    pub fn check(&self) -> Result<(), MarksError> {
        let skip = self.skip;
        let (proxied, return_) = (self.proxied, self.return_);
        for (name, mark) in [
            ("proxied", proxied.first),
            ("proxiedSecond", proxied.second),
            ("own", self.own),
        ] {
            if !mark.matches(skip) {
                return Err(MarksError::LacksSkip { name, mark, skip });
            }
        }
        // Each of these sends a packet somewhere; `proxied` also marks a whole connection.
        let read = [
            ("outbound", self.outbound),
            ("return", return_.first),
            ("returnSecond", return_.second),
            ("proxied", proxied.first),
            ("proxiedSecond", proxied.second),
        ];
        let all = read.into_iter().chain([("skip", skip), ("own", self.own)]);
        for (other_name, other) in read {
            for (name, mark) in all.clone() {
                if name != other_name && mark.matches(other) {
                    return Err(MarksError::Ambiguous {
                        name,
                        mark,
                        other_name,
                        other,
                    });
                }
            }
        }
        Ok(())
    }
}

/// A packet mark: a value and the bits it may touch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mark {
    value: u32,
    mask: u32,
}

/// A mark that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MarkError {
    /// Not `value/mask`.
    #[error("mark {0:?} has no mask: write value/mask, for example 0x100/0x100")]
    Form(String),
    /// Not a number of 32 bits.
    #[error(
        "mark {0:?} is not made of hexadecimal numbers: write value/mask, for example 0x100/0x100"
    )]
    Number(String),
    /// The value has bits that the mask lacks, or the mask is zero.
    #[error(
        "mark {0:?} has bits outside of its mask, or no bits: its value must be within its mask"
    )]
    OutsideMask(String),
}

impl Mark {
    /// # Errors
    /// If the value is zero or has bits outside of the mask.
    pub fn new(value: u32, mask: u32) -> Result<Self, MarkError> {
        if value == 0 || value & !mask != 0 {
            return Err(MarkError::OutsideMask(format!("{value:#x}/{mask:#x}")));
        }
        Ok(Self { value, mask })
    }

    /// The bits that are set.
    #[must_use]
    pub fn value(self) -> u32 {
        self.value
    }

    /// Whether a packet that carries this mark meets a rule about `other`.
    #[must_use]
    pub fn matches(self, other: Self) -> bool {
        self.value & other.mask == other.value
    }

    /// The bits that are compared and written.
    #[must_use]
    pub fn mask(self) -> u32 {
        self.mask
    }
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}/{:#x}", self.value, self.mask)
    }
}

impl FromStr for Mark {
    type Err = MarkError;

    fn from_str(text: &str) -> Result<Self, MarkError> {
        let (value, mask) = text
            .split_once('/')
            .ok_or_else(|| MarkError::Form(text.to_owned()))?;
        let number = |part: &str| {
            part.strip_prefix("0x")
                .and_then(|digits| u32::from_str_radix(digits, 16).ok())
                .ok_or_else(|| MarkError::Number(text.to_owned()))
        };
        Self::new(number(value)?, number(mask)?)
    }
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
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_mark_without_a_mask_is_refused() {
        assert_eq!(
            "0x100".parse::<Mark>(),
            Err(MarkError::Form("0x100".to_owned()))
        );
    }

    #[test]
    fn a_mark_outside_of_its_mask_is_refused() {
        assert!(matches!(
            "0x300/0x100".parse::<Mark>(),
            Err(MarkError::OutsideMask(_))
        ));
        assert!(matches!(
            "0x0/0x100".parse::<Mark>(),
            Err(MarkError::OutsideMask(_))
        ));
    }

    #[test]
    fn a_mark_of_other_numbers_is_refused() {
        assert!(matches!(
            "256/0x100".parse::<Mark>(),
            Err(MarkError::Number(_))
        ));
        assert!(matches!(
            "0x1ffffffff/0x100".parse::<Mark>(),
            Err(MarkError::Number(_))
        ));
    }

    fn marks() -> Marks {
        let mark = |text: &str| text.parse().unwrap();
        Marks {
            outbound: mark("0x100/0x100"),
            skip: mark("0x200/0x200"),
            proxied: PerSlot {
                first: mark("0x210/0x210"),
                second: mark("0x208/0x208"),
            },
            own: mark("0x220/0x220"),
            return_: PerSlot {
                first: mark("0x40/0x40"),
                second: mark("0x80/0x80"),
            },
            tproxy: mark("0x400/0xfff"),
            proxy_return: mark("0x4d3/0xfff"),
        }
    }

    #[test]
    fn marks_that_rules_cannot_tell_apart_are_refused() {
        assert_eq!(marks().check(), Ok(()));
        let mut ambiguous = marks();
        ambiguous.own = "0x320/0x320".parse().unwrap();
        assert!(matches!(
            ambiguous.check(),
            Err(MarksError::Ambiguous {
                name: "own",
                other_name: "outbound",
                ..
            })
        ));
        let mut without_skip = marks();
        without_skip.proxied.first = "0x10/0x10".parse().unwrap();
        assert!(matches!(
            without_skip.check(),
            Err(MarksError::LacksSkip {
                name: "proxied",
                ..
            })
        ));
    }

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

    proptest! {
        #[test]
        fn a_printed_mark_parses_back(mask in 1u32.., bits in any::<u32>()) {
            let value = bits & mask;
            prop_assume!(value != 0);
            let mark = Mark::new(value, mask).unwrap();
            prop_assert_eq!(mark.to_string().parse::<Mark>(), Ok(mark));
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in ".*") {
            let _ = text.parse::<Mark>();
        }
    }
}
