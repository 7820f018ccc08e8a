//! What rtnetlink tells. Where it can it is asked for ours alone: a node has hundreds of devices,
//! addresses and routes of others.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};

use futures::{StreamExt, TryStreamExt};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::AddressMessage;
use netlink_packet_route::link::{LinkFlags, LinkMessage};
use netlink_packet_route::nsid::{NsidAttribute, NsidMessage};
use netlink_packet_route::route::{RouteAttribute, RouteMessage, RouteProtocol};
use netlink_packet_route::rule::RuleMessage;
use rtnetlink::packet_core::{NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use rtnetlink::{IpVersion, LinkGetRequest};

use super::device::{self, geneve, host_link, is_geneve, name, own_addresses};
use super::message;
use super::{Netlink, NetlinkError, is_errno};
use crate::datapath::{Item, Place};
use crate::family::Family;
use crate::names::{self, Names, PROTOCOL, TABLE_LOCAL};
use crate::slot::Slot;

impl Netlink {
    pub(crate) async fn links(&self) -> Result<Vec<LinkMessage>, NetlinkError> {
        let links = self.handle.link().get().execute().try_collect();
        links
            .await
            .map_err(|error| NetlinkError::Read("devices", error))
    }

    /// The device of this name.
    pub(crate) async fn link(&self, name: &str) -> Result<Option<LinkMessage>, NetlinkError> {
        one_link(self.handle.link().get().match_name(name)).await
    }

    /// The device of this index.
    pub(crate) async fn link_at(&self, index: u32) -> Result<Option<LinkMessage>, NetlinkError> {
        one_link(self.handle.link().get().match_index(index)).await
    }

    /// The id by which this namespace knows another; without one no device of either has its other end in the other.
    pub(crate) async fn id_of(&self, other: &OwnedFd) -> Result<Option<i32>, NetlinkError> {
        let descriptor = other.as_raw_fd().unsigned_abs();
        let mut question = NsidMessage::default();
        question.attributes.push(NsidAttribute::Fd(descriptor));
        let mut question = NetlinkMessage::from(RouteNetlinkMessage::GetNsId(question));
        question.header.flags = NLM_F_REQUEST;
        let failed = |error| NetlinkError::Read("id of a network namespace", error);
        let mut answers = self.handle.clone().request(question).map_err(failed)?;
        while let Some(answer) = answers.next().await {
            match answer.payload {
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewNsId(answer)) => {
                    return Ok(id(&answer));
                }
                NetlinkPayload::Error(error) => {
                    return Err(failed(rtnetlink::Error::NetlinkError(error)));
                }
                _ => {}
            }
        }
        Err(failed(rtnetlink::Error::RequestFailed))
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
            routes.extend(self.routes_like(message).await?);
        }
        Ok(routes)
    }

    async fn routes_like(&self, message: RouteMessage) -> Result<Vec<RouteMessage>, NetlinkError> {
        let routes = self.handle.route().get(message).execute().try_collect();
        match routes.await {
            // There is no such table.
            Err(error) if is_errno(&error, nix::libc::ENOENT) => Ok(Vec::new()),
            other => other.map_err(|error| NetlinkError::Read("routes", error)),
        }
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

    /// What this namespace holds of ours. `peers` are the devices of ours in the proxies' namespaces.
    pub(in crate::kernel) async fn observe(
        &self,
        place: Place,
        names: &Names,
        peers: &BTreeMap<String, u32>,
    ) -> Result<BTreeSet<Item>, NetlinkError> {
        let links = self.own_links(place, names).await?;
        let mut items = BTreeSet::new();
        for link in &links {
            if link.header.flags.contains(LinkFlags::Up) {
                items.insert(Item::Up(name(link)));
            }
            match place {
                Place::Host => {
                    items.insert(Item::Link(host_link(link, peers)));
                }
                // A veth's end is made with the host's.
                Place::Proxy(_) if is_geneve(link) => {
                    items.insert(Item::Link(geneve(link)));
                }
                Place::Proxy(_) => {}
            }
            let device = name(link);
            let addresses = self.addresses_on(link.header.index).await?;
            items.extend(
                own_addresses(&addresses, &device)
                    .into_iter()
                    .map(Item::Address),
            );
        }
        let routes = self.own_routes(place, names).await?;
        let devices = self.devices_of(&routes, &links).await?;
        for route in &routes {
            items.extend(message::own_route(route, place, &devices, names).map(Item::Route));
        }
        for rule in self.rules().await? {
            items.extend(message::own_rule(&rule, place, names).map(Item::Rule));
        }
        Ok(items)
    }

    /// Index of each of our devices in the namespace of a proxy.
    pub(crate) async fn peers(
        &self,
        slot: Slot,
        names: &Names,
    ) -> Result<BTreeMap<String, u32>, NetlinkError> {
        let links = self.own_links(Place::Proxy(slot), names).await?;
        let indices = links.iter().map(|link| (name(link), link.header.index));
        Ok(indices.collect())
    }

    async fn own_links(
        &self,
        place: Place,
        names: &Names,
    ) -> Result<Vec<LinkMessage>, NetlinkError> {
        let devices: Vec<String> = match place {
            Place::Host => Slot::BOTH
                .into_iter()
                .flat_map(|slot| names.devices(slot))
                .collect(),
            Place::Proxy(slot) => names
                .devices(slot)
                .map(|device| names::peer(&device))
                .into(),
        };
        let mut links = Vec::new();
        for device in devices {
            links.extend(self.link(&device).await?);
        }
        Ok(links)
    }

    async fn addresses_on(&self, index: u32) -> Result<Vec<AddressMessage>, NetlinkError> {
        let mut request = self.handle.address().get();
        request.message_mut().header.index = index;
        let addresses: Result<Vec<AddressMessage>, _> = request.execute().try_collect().await;
        let mut addresses = match addresses {
            // The device has gone.
            Err(error) if is_errno(&error, nix::libc::ENODEV) => Vec::new(),
            other => other.map_err(|error| NetlinkError::Read("addresses", error))?,
        };
        addresses.retain(|address| address.header.index == index);
        Ok(addresses)
    }

    async fn own_routes(
        &self,
        place: Place,
        names: &Names,
    ) -> Result<Vec<RouteMessage>, NetlinkError> {
        let tables = match place {
            Place::Host => names.tables().collect(),
            Place::Proxy(_) => vec![TABLE_LOCAL],
        };
        let mut routes = Vec::new();
        for family in self.families {
            for table in &tables {
                let mut message = RouteMessage::default();
                message.header.address_family = message::address_family(*family);
                message.header.protocol = RouteProtocol::Other(PROTOCOL);
                message.attributes.push(RouteAttribute::Table(*table));
                routes.extend(self.routes_like(message).await?);
            }
        }
        Ok(routes)
    }

    /// Names of the devices that routes lead to.
    async fn devices_of(
        &self,
        routes: &[RouteMessage],
        known: &[LinkMessage],
    ) -> Result<BTreeMap<u32, String>, NetlinkError> {
        let mut devices: BTreeMap<u32, String> = known
            .iter()
            .map(|link| (link.header.index, name(link)))
            .collect();
        let indices: BTreeSet<u32> = routes
            .iter()
            .filter_map(|route| message::way(route).0)
            .collect();
        for index in indices {
            if !devices.contains_key(&index) {
                let link = self.link_at(index).await?;
                devices.extend(link.map(|link| (index, name(&link))));
            }
        }
        Ok(devices)
    }
}

/// The kernel says -1 where there is none.
fn id(message: &NsidMessage) -> Option<i32> {
    message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            NsidAttribute::Id(id) => Some(*id).filter(|id| *id >= 0),
            _ => None,
        })
}

async fn one_link(request: LinkGetRequest) -> Result<Option<LinkMessage>, NetlinkError> {
    match request.execute().try_next().await {
        Err(error) if is_errno(&error, nix::libc::ENODEV) => Ok(None),
        other => other.map_err(|error| NetlinkError::Read("devices", error)),
    }
}
