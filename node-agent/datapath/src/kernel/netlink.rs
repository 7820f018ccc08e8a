//! Devices, addresses, routes and rules, through rtnetlink(7).

mod device;
mod message;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::os::fd::AsRawFd;

use futures::TryStreamExt;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use netlink_packet_route::link::{InfoData, InfoGeneve, InfoVeth, LinkFlags, LinkMessage};
use netlink_packet_route::route::RouteMessage;
use netlink_packet_route::rule::RuleMessage;
use rtnetlink::{Handle, IpVersion, LinkGeneve, LinkMessageBuilder, LinkUnspec, LinkVeth};

use crate::datapath::{Address, Item, Link, Place};
use crate::family::Family;
use crate::names::Names;
use crate::netns::Netns;

use device::{geneve, host_link, is_geneve, own_address};

pub(crate) use device::{ip, kind, mtu, name, peer_index};
pub(crate) use message::{foreign_mark, way};

/// A netlink socket in one namespace.
#[derive(Clone, Debug)]
pub struct Netlink {
    handle: Handle,
    families: &'static [Family],
}

/// A request that the kernel refused.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// A dump failed.
    #[error("read the {0}")]
    Read(&'static str, #[source] rtnetlink::Error),
    /// A change failed.
    #[error("change {0}")]
    Change(String, #[source] rtnetlink::Error),
    /// The kernel has no geneve driver.
    #[error(
        "this kernel has no geneve driver; load it (modprobe geneve) or set spec.tunnel.type: Veth"
    )]
    GeneveUnsupported,
    /// A device has our name and is not ours.
    #[error("the device {0} is not ours: rename or remove it (ip link delete {0})")]
    ForeignDevice(String),
    /// A device that should be there is not.
    #[error("there is no device {0}")]
    NoDevice(String),
    /// A veth pair needs the proxy's namespace.
    #[error("no proxy is attached, the pair {0} cannot be made")]
    Detached(String),
}

impl Netlink {
    /// Opens the socket; its connection runs as a task until the last handle is dropped.
    pub(crate) fn open(netns: &Netns) -> io::Result<Self> {
        let runtime = tokio::runtime::Handle::current();
        let (connection, handle, _) = netns.run(|| {
            let _entered = runtime.enter();
            rtnetlink::new_connection()
        })??;
        tokio::spawn(connection);
        Ok(Self {
            handle,
            families: netns.families()?,
        })
    }

    pub(crate) async fn links(&self) -> Result<Vec<LinkMessage>, NetlinkError> {
        let links = self.handle.link().get().execute().try_collect();
        links
            .await
            .map_err(|error| NetlinkError::Read("devices", error))
    }

    /// Index of each device.
    pub(crate) async fn link_indices(&self) -> Result<BTreeMap<String, u32>, NetlinkError> {
        Ok(self
            .links()
            .await?
            .iter()
            .map(|link| (name(link), link.header.index))
            .collect())
    }

    pub(crate) async fn addresses(&self) -> Result<Vec<AddressMessage>, NetlinkError> {
        let addresses = self.handle.address().get().execute().try_collect();
        addresses
            .await
            .map_err(|error| NetlinkError::Read("addresses", error))
    }

    /// Routes of every family.
    pub(crate) async fn routes(&self) -> Result<Vec<RouteMessage>, NetlinkError> {
        let mut routes = Vec::new();
        for family in self.families {
            let mut message = RouteMessage::default();
            message.header.address_family = message::address_family(*family);
            let found = self.handle.route().get(message).execute();
            let found: Vec<_> = found
                .try_collect()
                .await
                .map_err(|error| NetlinkError::Read("routes", error))?;
            routes.extend(found);
        }
        Ok(routes)
    }

    /// Rules of every family.
    pub(crate) async fn rules(&self) -> Result<Vec<RuleMessage>, NetlinkError> {
        let mut rules = Vec::new();
        for family in self.families {
            let version = match family {
                Family::V4 => IpVersion::V4,
                Family::V6 => IpVersion::V6,
            };
            let found = self.handle.rule().get(version).execute();
            let found: Vec<_> = found
                .try_collect()
                .await
                .map_err(|error| NetlinkError::Read("rules", error))?;
            rules.extend(found);
        }
        Ok(rules)
    }

    /// Names of the BPF programs that tc runs on a device, both ways; empty for one without a name.
    pub(crate) async fn bpf_programs(&self, index: u32) -> Result<Vec<String>, NetlinkError> {
        let index = i32::try_from(index).unwrap_or_default();
        let mut found = Vec::new();
        for ingress in [true, false] {
            let filters = self.handle.traffic_filter(index).get();
            let filters = if ingress {
                filters.ingress()
            } else {
                filters.egress()
            };
            match filters.execute().try_collect::<Vec<_>>().await {
                Ok(filters) => found.extend(filters.iter().filter_map(device::bpf_program)),
                // A kernel without filters.
                Err(error) if is_errno(&error, nix::libc::EOPNOTSUPP) => {}
                Err(error) => return Err(NetlinkError::Read("filters of tc", error)),
            }
        }
        Ok(found)
    }

    /// The way the kernel takes to an address, as `ip route get`.
    pub(crate) async fn route_to(
        &self,
        to: IpAddr,
        mark: Option<u32>,
    ) -> Result<Option<RouteMessage>, NetlinkError> {
        let message = message::query(to, mark);
        let mut routes = self.handle.route().get(message).execute();
        match routes.try_next().await {
            Ok(route) => Ok(route),
            Err(error) if is_errno(&error, nix::libc::ENETUNREACH) => Ok(None),
            Err(error) if is_errno(&error, nix::libc::EHOSTUNREACH) => Ok(None),
            Err(error) => Err(NetlinkError::Change(format!("the route to {to}"), error)),
        }
    }

    /// What this namespace holds of ours, but for the host's links.
    pub(super) async fn observe(
        &self,
        place: Place,
        names: &Names,
    ) -> Result<BTreeSet<Item>, NetlinkError> {
        let links = self.links().await?;
        let devices: BTreeMap<u32, String> = links
            .iter()
            .map(|link| (link.header.index, name(link)))
            .collect();
        let mut items = BTreeSet::new();
        for link in links.iter().filter(|link| names.is_device(&name(link))) {
            if link.header.flags.contains(LinkFlags::Up) {
                items.insert(Item::Up(name(link)));
            }
            if place == Place::Proxy && is_geneve(link) {
                items.insert(Item::Link(geneve(link)));
            }
        }
        for address in self.addresses().await? {
            items.extend(own_address(&address, &devices, names).map(Item::Address));
        }
        for route in self.routes().await? {
            items.extend(message::own_route(&route, place, &devices, names).map(Item::Route));
        }
        for rule in self.rules().await? {
            items.extend(message::own_rule(&rule, place, names).map(Item::Rule));
        }
        Ok(items)
    }

    /// The host's ends of the tunnels. `peers` are the devices of the proxy's namespace.
    pub(super) async fn host_links(
        &self,
        names: &Names,
        peers: &BTreeMap<String, u32>,
    ) -> Result<Vec<Item>, NetlinkError> {
        let links = self.links().await?;
        let ours = links
            .iter()
            .filter(|link| [names.inbound(), names.outbound()].contains(&name(link).as_str()));
        Ok(ours
            .map(|link| Item::Link(host_link(link, peers)))
            .collect())
    }

    /// Makes, replaces or removes one item.
    pub(super) async fn change(
        &self,
        old: Option<&Item>,
        new: Option<&Item>,
        proxy: Option<&Netns>,
    ) -> Result<(), NetlinkError> {
        let described = new.or(old).map(ToString::to_string).unwrap_or_default();
        let failed = |error| NetlinkError::Change(described.clone(), error);
        match (old, new) {
            (old, new @ (Some(Item::Rule(_)) | None)) if is_rule(old.or(new)) => {
                if let Some(Item::Rule(rule)) = old {
                    let removed = self.handle.rule().del(message::rule(rule)).execute().await;
                    gone(removed).map_err(&failed)?;
                }
                let Some(Item::Rule(rule)) = new else {
                    return Ok(());
                };
                let mut request = self.handle.rule().add();
                *request.message_mut() = message::rule(rule);
                request.execute().await.map_err(failed)
            }
            (old, new) if matches!(new.or(old), Some(Item::Link(_))) => {
                if let Some(Item::Link(link)) = old {
                    self.remove_link(link).await?;
                }
                let Some(Item::Link(link)) = new else {
                    return Ok(());
                };
                self.add_link(link, proxy).await
            }
            (_, Some(Item::Up(device))) => {
                let index = self.device(device).await?;
                let message = LinkUnspec::new_with_index(index).up().build();
                self.handle
                    .link()
                    .change(message)
                    .execute()
                    .await
                    .map_err(failed)
            }
            (_, Some(Item::Address(Address { device, address }))) => {
                let index = self.device(device).await?;
                let addresses = self.handle.address();
                let mut request = addresses.add(index, address.addr(), address.prefix_len());
                // Nobody else can have it: only the tunnel's other end is on its network.
                let flags = AddressAttribute::Flags(AddressFlags::Nodad);
                request.message_mut().attributes.push(flags);
                request.replace().execute().await.map_err(failed)
            }
            (Some(Item::Address(Address { device, address })), None) => {
                let Ok(index) = self.device(device).await else {
                    return Ok(());
                };
                let (ip, length) = (address.addr(), address.prefix_len());
                let mut request = self.handle.address().add(index, ip, length);
                let message = std::mem::take(request.message_mut());
                gone(self.handle.address().del(message).execute().await).map_err(failed)
            }
            // A device of ours that is no longer wanted up is removed.
            _ => Ok(()),
        }
    }

    /// Makes, replaces or removes routes, all requests on their way at once; the index of the first
    /// that failed.
    pub(super) async fn change_routes(
        &self,
        changes: &[(Option<&Item>, Option<&Item>)],
    ) -> Result<(), (usize, NetlinkError)> {
        let indices = self.link_indices().await.map_err(|error| (0, error))?;
        let requests = changes
            .iter()
            .map(|(old, new)| self.change_route(*old, *new, &indices));
        let answers = futures::future::join_all(requests).await;
        for (index, answer) in answers.into_iter().enumerate() {
            answer.map_err(|error| (index, error))?;
        }
        Ok(())
    }

    /// Whether the kernel does not know the kind of this device.
    pub(crate) async fn is_unsupported(&self, message: LinkMessage) -> bool {
        let made = self.handle.link().add(message).execute().await;
        made.is_err_and(|error| is_errno(&error, nix::libc::EOPNOTSUPP))
    }

    async fn device(&self, device: &str) -> Result<u32, NetlinkError> {
        let indices = self.link_indices().await?;
        indices
            .get(device)
            .copied()
            .ok_or_else(|| NetlinkError::NoDevice(device.to_owned()))
    }

    async fn change_route(
        &self,
        old: Option<&Item>,
        new: Option<&Item>,
        indices: &BTreeMap<String, u32>,
    ) -> Result<(), NetlinkError> {
        let Some(Item::Route(route)) = new.or(old) else {
            return Ok(());
        };
        let failed = |error| NetlinkError::Change(format!("ip route {route}"), error);
        let device = message::route_device(route);
        let index = device.and_then(|device| indices.get(device)).copied();
        if let (Some(device), None) = (device, index) {
            // A route that is to go has gone with its device.
            return match new {
                Some(_) => Err(NetlinkError::NoDevice(device.to_owned())),
                None => Ok(()),
            };
        }
        let (message, routes) = (message::route(route, index), self.handle.route());
        match new {
            Some(_) => routes.add(message).replace().execute().await,
            None => gone(routes.del(message).execute().await),
        }
        .map_err(failed)
    }

    async fn remove_link(&self, link: &Link) -> Result<(), NetlinkError> {
        if let Link::Foreign { name } = link {
            return Err(NetlinkError::ForeignDevice(name.clone()));
        }
        let Ok(index) = self.device(link.name()).await else {
            return Ok(());
        };
        gone(self.handle.link().del(index).execute().await)
            .map_err(|error| NetlinkError::Change(link.to_string(), error))
    }

    async fn add_link(&self, link: &Link, proxy: Option<&Netns>) -> Result<(), NetlinkError> {
        let message = match link {
            Link::Geneve {
                name,
                vni,
                remote,
                port,
                mtu,
            } => LinkGeneve::new(name, *vni)
                .append_info_data(match remote {
                    IpAddr::V4(ip) => InfoGeneve::Remote(*ip),
                    IpAddr::V6(ip) => InfoGeneve::Remote6(*ip),
                })
                .port(*port)
                .mtu(*mtu)
                .build(),
            Link::Veth { name, peer, mtu } => {
                let proxy = proxy.and_then(Netns::descriptor);
                let (Some(peer), Some(proxy)) = (peer, proxy) else {
                    return Err(NetlinkError::Detached(name.clone()));
                };
                let peer = LinkMessageBuilder::<LinkUnspec>::new()
                    .name(peer.clone())
                    .mtu(*mtu)
                    .setns_by_fd(proxy.as_raw_fd())
                    .build();
                LinkVeth::new(name, "")
                    .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
                    .mtu(*mtu)
                    .build()
            }
            Link::Foreign { name } => return Err(NetlinkError::ForeignDevice(name.clone())),
        };
        match self.handle.link().add(message).execute().await {
            Err(error) if is_errno(&error, nix::libc::EOPNOTSUPP) => {
                Err(NetlinkError::GeneveUnsupported)
            }
            other => other.map_err(|error| NetlinkError::Change(link.to_string(), error)),
        }
    }
}

fn is_rule(item: Option<&Item>) -> bool {
    matches!(item, Some(Item::Rule(_)))
}

fn is_errno(error: &rtnetlink::Error, errno: i32) -> bool {
    matches!(error, rtnetlink::Error::NetlinkError(message) if message.raw_code() == -errno)
}

/// A removal of what is not there any more has reached its end.
fn gone(removed: Result<(), rtnetlink::Error>) -> Result<(), rtnetlink::Error> {
    let absent = [
        nix::libc::ESRCH,
        nix::libc::ENOENT,
        nix::libc::ENODEV,
        nix::libc::EADDRNOTAVAIL,
    ];
    match removed {
        Err(error) if absent.iter().any(|errno| is_errno(&error, *errno)) => Ok(()),
        other => other,
    }
}
