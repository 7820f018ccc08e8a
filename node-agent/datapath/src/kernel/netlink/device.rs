//! Devices and their addresses out of rtnetlink messages.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{
    InfoData, InfoGeneve, InfoKind, LinkAttribute, LinkInfo, LinkMessage,
};
use netlink_packet_route::tc::{TcAttribute, TcFilterBpfOption, TcMessage, TcOption};

use crate::datapath::{Address, Link};
use crate::names::{LINK_LOCAL, peer};

pub(crate) fn name(link: &LinkMessage) -> String {
    link.attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::IfName(name) => Some(name.clone()),
            _ => None,
        })
        .unwrap_or_default()
}

pub(crate) fn kind(link: &LinkMessage) -> Option<InfoKind> {
    infos(link).find_map(|info| match info {
        LinkInfo::Kind(kind) => Some(kind.clone()),
        _ => None,
    })
}

fn infos(link: &LinkMessage) -> impl Iterator<Item = &LinkInfo> {
    link.attributes
        .iter()
        .flat_map(|attribute| match attribute {
            LinkAttribute::LinkInfo(infos) => infos.as_slice(),
            _ => &[],
        })
}

pub(super) fn is_geneve(link: &LinkMessage) -> bool {
    matches!(kind(link), Some(InfoKind::Geneve))
}

pub(crate) fn mtu(link: &LinkMessage) -> u32 {
    link.attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::Mtu(mtu) => Some(*mtu),
            _ => None,
        })
        .unwrap_or_default()
}

/// Index of a veth's other end, in the namespace that one is in.
pub(crate) fn peer_index(link: &LinkMessage) -> Option<u32> {
    link.attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::Link(index) => Some(*index),
            _ => None,
        })
}

/// The namespace that a device's other end is in, where that is another than its own, by its id in the device's.
pub(crate) fn peer_namespace(link: &LinkMessage) -> Option<i32> {
    link.attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::LinkNetNsId(id) => Some(*id),
            _ => None,
        })
}

pub(super) fn host_link(link: &LinkMessage, peers: &BTreeMap<String, u32>) -> Link {
    let name = name(link);
    match kind(link) {
        Some(InfoKind::Geneve) => geneve(link),
        Some(InfoKind::Veth) => {
            let peer = peer(&name);
            let attached = peer_index(link).is_some_and(|index| peers.get(&peer) == Some(&index));
            Link::Veth {
                name,
                peer: attached.then_some(peer),
                mtu: mtu(link),
            }
        }
        _ => Link::Foreign { name },
    }
}

pub(super) fn geneve(link: &LinkMessage) -> Link {
    let (mut vni, mut remote, mut port) = (0, IpAddr::from(Ipv4Addr::UNSPECIFIED), 0);
    for info in infos(link) {
        let LinkInfo::Data(InfoData::Geneve(values)) = info else {
            continue;
        };
        for value in values {
            match value {
                InfoGeneve::Id(id) => vni = *id,
                InfoGeneve::Remote(ip) => remote = (*ip).into(),
                InfoGeneve::Remote6(ip) => remote = (*ip).into(),
                InfoGeneve::Port(number) => port = *number,
                _ => {}
            }
        }
    }
    Link::Geneve {
        name: name(link),
        vni,
        remote,
        port,
        mtu: mtu(link),
    }
}

/// The name of the program of a filter of kind bpf, once it is attached.
pub(super) fn bpf_program(filter: &TcMessage) -> Option<String> {
    let is_bpf = filter
        .attributes
        .iter()
        .any(|attribute| *attribute == TcAttribute::Kind("bpf".to_owned()));
    // The first message of a dump speaks of the chain of filters and has no handle.
    let attached = is_bpf && u32::from(filter.header.handle) != 0;
    let name = filter
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            TcAttribute::Options(options) => options.iter().find_map(|option| match option {
                TcOption::Bpf(TcFilterBpfOption::ProgName(name)) => Some(name.clone()),
                _ => None,
            }),
            _ => None,
        });
    attached.then(|| name.unwrap_or_default())
}

/// The addresses of a device of ours. The kernel gives a device a link-local address, unless told otherwise: where
/// IPv6 is not ours that one is left alone, and beside ours it is one too many.
pub(super) fn own_addresses(messages: &[AddressMessage], device: &str) -> Vec<Address> {
    let ips = messages.iter().filter_map(|message| {
        let ip = ip(message)?;
        IpNet::new(ip, message.header.prefix_len).ok()
    });
    let has_ours = ips.clone().any(|address| is_our_link_local(address.addr()));
    ips.filter(|address| has_ours || !is_link_local(address.addr()))
        .map(|address| Address {
            device: device.to_owned(),
            address,
        })
        .collect()
}

fn is_link_local(ip: IpAddr) -> bool {
    matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local())
}

fn is_our_link_local(ip: IpAddr) -> bool {
    matches!(ip, IpAddr::V6(ip) if LINK_LOCAL.contains(&ip))
}

/// The device's own address; of IPv6, the kernel tells it as that of a peer.
pub(crate) fn ip(message: &AddressMessage) -> Option<IpAddr> {
    let find = |wanted: fn(&AddressAttribute) -> Option<IpAddr>| {
        message.attributes.iter().find_map(wanted)
    };
    find(|attribute| match attribute {
        AddressAttribute::Local(ip) => Some(*ip),
        _ => None,
    })
    .or_else(|| {
        find(|attribute| match attribute {
            AddressAttribute::Address(ip) => Some(*ip),
            _ => None,
        })
    })
}
