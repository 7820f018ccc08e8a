//! Every name and number of the data path, with the network namespace it belongs to.
//!
//! Names and numbers are those of the first Istio Ambient, so that its documents apply.

use std::net::Ipv6Addr;

use crate::family::Family;

/// Set of the IPv4 addresses of this node's mesh pods (host).
pub const SET: &str = "ztunnel-pods-ips";
/// Set of their IPv6 addresses (host).
pub const SET6: &str = "ztunnel-pods-ips6";
/// Room of each set in addresses: more than the pods of any node.
pub const SET_SIZE: u32 = 65536;
/// Device towards the proxy for traffic to mesh pods (host).
pub const ISTIOIN: &str = "istioin";
/// Device towards the proxy for traffic from mesh pods (host).
pub const ISTIOOUT: &str = "istioout";
/// The other end of [`ISTIOIN`] (proxy).
pub const PISTIOIN: &str = "pistioin";
/// The other end of [`ISTIOOUT`] (proxy).
pub const PISTIOOUT: &str = "pistioout";

/// Route table of traffic to mesh pods (host), and of local delivery (proxy).
pub const TABLE_INBOUND: u32 = 100;
/// Route table of traffic from mesh pods (host).
pub const TABLE_OUTBOUND: u32 = 101;
/// Route table of answers to what the proxy dialled (host).
pub const TABLE_RETURN: u32 = 102;
/// Route table of local delivery (proxy).
pub const TABLE_LOCAL: u32 = 100;

/// Rule priorities (host), in the order in which the kernel tries them.
pub mod priority {
    /// What carries the skip mark goes on at the main table's rule.
    pub const SKIP: u32 = 100;
    /// What carries the outbound mark goes to the proxy.
    pub const OUTBOUND: u32 = 101;
    /// What carries the return mark goes back to the proxy.
    pub const RETURN: u32 = 102;
    /// What the host itself sends passes over [`INBOUND`].
    pub const HOST: u32 = 103;
    /// Forwarded TCP to mesh pods goes to the proxy.
    pub const INBOUND: u32 = 104;
    /// Where [`HOST`] goes on.
    pub const HOST_END: u32 = 105;
    /// The kernel's own rule for the main table.
    pub const MAIN: u32 = 32766;
    /// TPROXY's mark is delivered locally (proxy).
    pub const TPROXY: u32 = 20000;
    /// Answers to transparent sockets are delivered locally (proxy).
    pub const PROXY_RETURN: u32 = 20003;
}

/// Route protocol of every route and rule of ours (rtnetlink(7); unassigned by iproute2).
pub const PROTOCOL: u8 = 0x5a;

/// Metric that IPv6 gives a route without one.
pub const METRIC_IPV6: u32 = 1024;

/// Metric of the routes that say no when nothing else is left: the highest there is, so that every
/// other route of the table comes first.
pub const METRIC_LAST: u32 = u32::MAX;

/// Source ports of the proxy's own sockets: below the pods' ephemeral range (32768 and up), so that
/// a dial from a pod's address never meets the pod's own ports in the host's conntrack.
pub const PROXY_PORT_RANGE: &str = "16384\t29999";

/// Link-local addresses of a tunnel's ends, host and proxy. Fixed ones need no duplicate address
/// detection, which would hold traffic back while it runs.
pub const LINK_LOCAL: [Ipv6Addr; 2] = [
    Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1),
    Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2),
];

/// Prefix of our chains in both namespaces.
pub const CHAIN_PREFIX: &str = "ztunnel-";

/// Name of the set of a family.
#[must_use]
pub fn set(family: Family) -> &'static str {
    match family {
        Family::V4 => SET,
        Family::V6 => SET6,
    }
}
