//! Where a proxy's network namespace meets the host's.

use std::net::Ipv4Addr;
use std::path::Path;

use netlink_packet_route::link::InfoKind;
use netlink_packet_route::route::{RouteAddress, RouteAttribute};

use crate::kernel::KernelError;
use crate::kernel::netlink::{self, Netlink, way};
use crate::kernel::sysctl::{self, SysctlError};
use crate::netns::Netns;

/// What was found about a proxy's namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// Its address.
    pub ip: Ipv4Addr,
    /// Its device.
    pub device: String,
    /// The other end of that device, in the host's namespace.
    pub host_device: String,
    /// MTU of its device in bytes.
    pub mtu: u32,
    /// The host's address towards its pods.
    pub host_ip: Ipv4Addr,
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
    /// It has no default route over IPv4.
    #[error(
        "the proxy's network namespace has no IPv4 default route: the CNI has not set the pod up"
    )]
    NoDefaultRoute,
    /// Its device has no IPv4 address.
    #[error("the proxy's device {0} has no IPv4 address")]
    NoAddress(String),
    /// Its device is no veth.
    #[error(
        "the proxy's device {0} is not one end of a veth pair to the host: this CNI cannot be redirected"
    )]
    NotVeth(String),
    /// The host has no way to it.
    #[error("the host has no route to the proxy {0}")]
    NoHostRoute(Ipv4Addr),
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
    let index = default_device(&inside).await?;
    let links = inside.links().await?;
    let link = links
        .iter()
        .find(|link| link.header.index == index)
        .ok_or(AttachError::NoDefaultRoute)?;
    let device = netlink::name(link);
    let addresses = inside.addresses().await?;
    let ip = addresses
        .iter()
        .filter(|address| address.header.index == index)
        .find_map(netlink::ipv4)
        .ok_or_else(|| AttachError::NoAddress(device.clone()))?;
    if netlink::kind(link) != Some(InfoKind::Veth) {
        return Err(AttachError::NotVeth(device));
    }
    let (out, host_ip) = match outside.route_to(ip, None).await? {
        Some(route) => way(&route),
        None => (None, None),
    };
    let host_device = host_end(&outside, link, index)
        .await?
        .or(name_of(&outside, out).await?);
    let default_rp_filter = host
        .run(|| sysctl::read(&proc_root.join("ipv4/conf/default/rp_filter")))
        .map_err(AttachError::Enter)??
        .unwrap_or_else(|| "0".to_owned());
    Ok(Attachment {
        ip,
        device,
        host_device: host_device.ok_or(AttachError::NoHostRoute(ip))?,
        mtu: netlink::mtu(link),
        host_ip: host_ip.ok_or(AttachError::NoHostRoute(ip))?,
        default_rp_filter,
    })
}

async fn default_device(inside: &Netlink) -> Result<u32, AttachError> {
    for route in inside.routes().await? {
        let is_default = route.header.destination_prefix_length == 0
            && route.header.table == netlink_packet_route::route::RouteHeader::RT_TABLE_MAIN
            && !route.attributes.iter().any(|attribute| {
                matches!(attribute, RouteAttribute::Destination(RouteAddress::Inet(ip)) if !ip.is_unspecified())
            });
        if let (true, (Some(index), _)) = (is_default, way(&route)) {
            return Ok(index);
        }
    }
    Err(AttachError::NoDefaultRoute)
}

/// The device of the host whose other end is `link`: the two name each other by index.
async fn host_end(
    outside: &Netlink,
    link: &netlink_packet_route::link::LinkMessage,
    index: u32,
) -> Result<Option<String>, AttachError> {
    let Some(peer) = netlink::peer_index(link) else {
        return Ok(None);
    };
    let links = outside.links().await?;
    let found = links.iter().find(|candidate| {
        candidate.header.index == peer
            && netlink::kind(candidate) == Some(InfoKind::Veth)
            && netlink::peer_index(candidate) == Some(index)
    });
    Ok(found.map(netlink::name))
}

async fn name_of(outside: &Netlink, index: Option<u32>) -> Result<Option<String>, AttachError> {
    let links = outside.links().await?;
    Ok(links
        .iter()
        .find(|link| Some(link.header.index) == index)
        .map(netlink::name))
}
