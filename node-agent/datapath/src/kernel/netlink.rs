//! Devices, addresses, routes and rules, through rtnetlink(7).

mod device;
#[cfg(fuzzing)]
pub mod fuzzing;
mod message;
mod read;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::os::fd::AsRawFd;

use netlink_packet_route::address::{AddressAttribute, AddressFlags};
use netlink_packet_route::link::{InfoData, InfoGeneve, InfoVeth, LinkMessage};
use rtnetlink::{Handle, LinkGeneve, LinkMessageBuilder, LinkUnspec, LinkVeth};

use crate::datapath::{Address, Item, Link};
use crate::family::Family;
use crate::netns::Netns;

pub(crate) use device::{ip, kind, mtu, name, peer_index, peer_namespace};
pub(crate) use message::{family_of, foreign_mark, on_link, way};

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
            // A kernel that does not know how to filter lists (before 4.20) gives them whole.
            rtnetlink::new_connection_with_strict_check().or_else(|_| rtnetlink::new_connection())
        })??;
        tokio::spawn(connection);
        Ok(Self {
            handle,
            families: netns.families()?,
        })
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
                match request.execute().await {
                    // A hold: the plugin that makes them was faster.
                    Err(error) if is_errno(&error, nix::libc::EEXIST) => Ok(()),
                    added => added.map_err(failed),
                }
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
        let devices: BTreeSet<&str> = changes.iter().filter_map(device_of).collect();
        let mut indices = BTreeMap::new();
        for device in devices {
            let link = self.link(device).await.map_err(|error| (0, error))?;
            indices.extend(link.map(|link| (device, link.header.index)));
        }
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
        let link = self.link(device).await?;
        link.map(|link| link.header.index)
            .ok_or_else(|| NetlinkError::NoDevice(device.to_owned()))
    }

    async fn change_route(
        &self,
        old: Option<&Item>,
        new: Option<&Item>,
        indices: &BTreeMap<&str, u32>,
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

/// The device of the route that comes, or else of the one that goes.
fn device_of<'a>((old, new): &(Option<&'a Item>, Option<&'a Item>)) -> Option<&'a str> {
    match (*new).or(*old) {
        Some(Item::Route(route)) => message::route_device(route),
        _ => None,
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
