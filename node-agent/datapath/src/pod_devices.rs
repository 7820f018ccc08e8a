//! The devices of the host that its pods' packets come in by.

use std::collections::BTreeMap;
use std::net::IpAddr;

use crate::datapath::Place;
use crate::kernel::KernelError;
use crate::kernel::netlink::{self, Netlink, on_link};
use crate::netns::Netns;

/// The host's devices at some time, and its ways by them.
#[derive(Debug)]
pub struct HostDevices {
    netlink: Netlink,
    names: BTreeMap<u32, String>,
}

impl HostDevices {
    /// Lists them.
    ///
    /// # Errors
    /// If they cannot be read.
    pub async fn list(host: &Netns) -> Result<Self, KernelError> {
        let netlink =
            Netlink::open(host).map_err(|error| KernelError::Enter(Place::Host, error))?;
        let links = netlink.links().await?;
        let names = links
            .iter()
            .map(|link| (link.header.index, netlink::name(link)))
            .collect();
        Ok(Self { netlink, names })
    }

    /// Whether there is one of this name.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.names.values().any(|other| other == name)
    }

    /// Whether there is one of this index.
    #[must_use]
    pub fn has_index(&self, index: u32) -> bool {
        self.names.contains_key(&index)
    }

    /// The one of the host's own way to an address. What lies behind a gateway, or nowhere, is no pod of
    /// this node.
    ///
    /// # Errors
    /// If the way cannot be read.
    pub async fn towards(&self, ip: IpAddr) -> Result<Option<String>, KernelError> {
        let route = self.netlink.route_to(ip, None).await?;
        Ok(route.and_then(|route| self.names.get(&on_link(&route)?).cloned()))
    }
}
