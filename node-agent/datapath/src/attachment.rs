//! Where a proxy's network namespace meets the host's.

use std::net::IpAddr;
use std::path::Path;

use netlink_packet_route::link::{InfoKind, LinkMessage};
use netlink_packet_route::route::{RouteHeader, RouteMessage, RouteType};

use crate::family::Family;
use crate::input::{Ends, Pair};
use crate::kernel::KernelError;
use crate::kernel::netlink::{self, Netlink, way};
use crate::kernel::sysctl::{self, SysctlError};
use crate::names::Names;
use crate::netns::Netns;
use crate::slot::Slot;

/// What was found about a proxy's namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// Its addresses, and the host's towards its pods.
    pub ends: Ends,
    /// Its device.
    pub device: String,
    /// The other end of that device, in the host's namespace.
    pub host_device: String,
    /// MTU of its device in bytes.
    pub mtu: u32,
    /// Value of `rp_filter` that devices of the host start with.
    pub default_rp_filter: String,
}

/// A namespace that cannot be redirected to.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The namespace cannot be entered.
    #[error("enter the proxy's network namespace")]
    Enter(#[source] std::io::Error),
    /// Something could not be read.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// It has no default route.
    #[error("the proxy's network namespace has no default route: the CNI has not set the pod up")]
    NoDefaultRoute,
    /// Its device has no address.
    #[error("the proxy's device {0} has no address that its default route could use")]
    NoAddress(String),
    /// Its device is no veth.
    #[error(
        "the proxy's device {device} is {kind} and not one end of a veth pair to the host: give ambit-proxy a \
         pod network whose CNI plugin makes veth pairs (bridge, ptp, Calico, Flannel …)"
    )]
    NotVeth {
        /// The device.
        device: String,
        /// What it is instead.
        kind: String,
    },
    /// Its device is one of Cilium's, which netfilter never sees.
    #[error(
        "the proxy's device {0} is a netkit device, whose packets go past the host's netfilter: set Cilium's \
         bpf.datapathMode to veth and chain it behind a CNI plugin that makes veth pairs"
    )]
    Netkit(String),
    /// The other end of its device is not the host's.
    #[error(
        "the other end of the proxy's device {0} is not in the host's network namespace: give ambit-proxy a pod \
         network whose CNI plugin makes veth pairs between the pod and the host; of a pod that just goes this passes"
    )]
    NoHostEnd(String),
    /// The host has no way to it.
    #[error("the host has no route to the proxy {0}")]
    NoHostRoute(IpAddr),
}

impl From<netlink::NetlinkError> for AttachError {
    fn from(error: netlink::NetlinkError) -> Self {
        Self::Kernel(error.into())
    }
}

impl From<SysctlError> for AttachError {
    fn from(error: SysctlError) -> Self {
        Self::Kernel(error.into())
    }
}

/// Looks at a proxy's namespace from both sides.
///
/// # Errors
/// If it is not a pod's namespace that the host can redirect to.
pub async fn find(
    host: &Netns,
    proxy: &Netns,
    proc_root: &Path,
) -> Result<Attachment, AttachError> {
    let outside = Netlink::open(host).map_err(AttachError::Enter)?;
    let inside = Netlink::open(proxy).map_err(AttachError::Enter)?;
    let routes = inside.routes().await?;
    let index = Family::ALL
        .into_iter()
        .find_map(|family| default_device(&routes, family))
        .ok_or(AttachError::NoDefaultRoute)?;
    let link = inside
        .link_at(index)
        .await?
        .ok_or(AttachError::NoDefaultRoute)?;
    let device = netlink::name(&link);
    let ips = addresses(&inside, &routes, index).await?;
    if ips.is_empty() {
        return Err(AttachError::NoAddress(device));
    }
    match netlink::kind(&link) {
        Some(InfoKind::Veth) => {}
        Some(InfoKind::Netkit) => return Err(AttachError::Netkit(device)),
        kind => {
            // What has no kind is a device of the host's own, for example a virtual function (SR-IOV).
            let kind = kind.map_or_else(
                || "a physical or virtual function's device".to_owned(),
                |kind| format!("of kind {kind}"),
            );
            return Err(AttachError::NotVeth { device, kind });
        }
    }
    let ends = ends(&outside, &ips).await?;
    let host_end = host_end(&outside, proxy, &link).await?;
    // Never the device of a route to it: of a pod that just goes, that is the node's own way out.
    let host_device = host_end.ok_or_else(|| AttachError::NoHostEnd(device.clone()))?;
    let default_rp_filter = host
        .run(|| sysctl::read(&proc_root.join("ipv4/conf/default/rp_filter")))
        .map_err(AttachError::Enter)??
        .unwrap_or_else(|| "0".to_owned());
    Ok(Attachment {
        ends,
        device,
        host_device,
        mtu: netlink::mtu(&link),
        default_rp_filter,
    })
}

/// The slot that the proxy of a namespace has, going by the devices that an agent made in it.
///
/// # Errors
/// If the namespace cannot be looked at.
pub async fn slot(proxy: &Netns, names: &Names) -> Result<Option<Slot>, AttachError> {
    let inside = Netlink::open(proxy).map_err(AttachError::Enter)?;
    for slot in Slot::BOTH {
        if !inside.peers(slot, names).await?.is_empty() {
            return Ok(Some(slot));
        }
    }
    Ok(None)
}

/// The device of a family's default route in the main table.
fn default_device(routes: &[RouteMessage], family: Family) -> Option<u32> {
    let is_default = |route: &&RouteMessage| {
        let header = &route.header;
        netlink::family_of(header.address_family) == Some(family)
            && header.destination_prefix_length == 0
            && header.kind == RouteType::Unicast
            && header.table == RouteHeader::RT_TABLE_MAIN
    };
    routes
        .iter()
        .filter(is_default)
        .find_map(|route| way(route).0)
}

/// The device's addresses of the families that have their default route by it: the first of each.
async fn addresses(
    inside: &Netlink,
    routes: &[RouteMessage],
    index: u32,
) -> Result<Vec<IpAddr>, AttachError> {
    let all = inside.addresses().await?;
    let ips: Vec<IpAddr> = all
        .iter()
        .filter(|address| address.header.index == index)
        .filter_map(netlink::ip)
        .filter(|ip| !matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local()))
        .collect();
    let first = |family| ips.iter().copied().find(|ip| Family::of(*ip) == family);
    Ok(Family::ALL
        .into_iter()
        .filter(|family| default_device(routes, *family) == Some(index))
        .filter_map(first)
        .collect())
}

/// The addresses of the proxy with those of the host that its pods see.
async fn ends(outside: &Netlink, ips: &[IpAddr]) -> Result<Ends, AttachError> {
    let (mut ipv4, mut ipv6) = (None, None);
    for proxy in ips {
        let route = outside.route_to(*proxy, None).await?;
        let host = route.and_then(|route| way(&route).1);
        match (*proxy, host.ok_or(AttachError::NoHostRoute(*proxy))?) {
            (IpAddr::V4(proxy), IpAddr::V4(host)) => ipv4 = Some(Pair { proxy, host }),
            (IpAddr::V6(proxy), IpAddr::V6(host)) => ipv6 = Some(Pair { proxy, host }),
            (proxy, _) => return Err(AttachError::NoHostRoute(proxy)),
        }
    }
    match (ipv4, ipv6) {
        (Some(ipv4), Some(ipv6)) => Ok(Ends::Dual(ipv4, ipv6)),
        (Some(ipv4), None) => Ok(Ends::V4(ipv4)),
        (None, Some(ipv6)) => Ok(Ends::V6(ipv6)),
        (None, None) => Err(AttachError::NoDefaultRoute),
    }
}

/// The device of the host whose other end is `link`: the two name each other by index, and the host's names the
/// proxy's namespace, for pods' devices often have the same index.
async fn host_end(
    outside: &Netlink,
    proxy: &Netns,
    link: &LinkMessage,
) -> Result<Option<String>, AttachError> {
    let (Some(peer), Some(namespace)) = (netlink::peer_index(link), proxy.descriptor()) else {
        return Ok(None);
    };
    let Some(candidate) = outside.link_at(peer).await? else {
        return Ok(None);
    };
    // Only now: it is the look at such a device that gives the namespace an id.
    let id = outside.id_of(namespace).await?;
    let is_it = netlink::kind(&candidate) == Some(InfoKind::Veth)
        && netlink::peer_index(&candidate) == Some(link.header.index)
        && id.is_some()
        && netlink::peer_namespace(&candidate) == id;
    Ok(is_it.then(|| netlink::name(&candidate)))
}
