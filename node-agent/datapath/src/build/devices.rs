//! Devices with their addresses and settings.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::datapath::{Address, Item, Link, Sysctl};
use crate::family::Family;
use crate::input::{NodeInput, Proxy, Tunnel, TunnelEnd, TunnelKind};
use crate::names::{LINK_LOCAL, peer};
use crate::slot::Slot;

/// The host's ends of the tunnels to the proxy of a slot, and what its device needs.
pub(super) fn tunnels(input: &NodeInput, slot: Slot, proxy: &Proxy) -> Vec<Item> {
    let mut items = Vec::new();
    for (name, end) in ends(input, slot) {
        let name = name.as_str();
        items.push(Item::Link(match input.tunnel.kind {
            TunnelKind::Geneve => {
                let remote = proxy.ends.outer().proxy;
                geneve(&input.tunnel, name, end, remote, proxy.mtu)
            }
            TunnelKind::Veth => Link::Veth {
                name: name.to_owned(),
                peer: Some(peer(name)),
                mtu: proxy.mtu,
            },
        }));
        items.push(Item::Up(name.to_owned()));
        for family in input.families() {
            let network = end.network(family);
            items.push(address(name, network.host(), network.prefix_len()));
        }
        items.push(rp_filter(name, "2", "2"));
        items.extend(ipv6_device(input, name, LINK_LOCAL[0].into()));
    }
    // What the proxy dials from pods' addresses arrives here, where no route to them points. The
    // kernel takes the larger of this and `all`; 2 (loose) holds against any `all`.
    items.push(rp_filter(&proxy.host_device, "2", &proxy.default_rp_filter));
    items
}

/// What mesh pods send is checked against the way back to them, which for TCP leads into a tunnel.
pub(super) fn of_pods(input: &NodeInput) -> Vec<Item> {
    let Some((_, proxy)) = input.proxies.taken().next() else {
        return Vec::new();
    };
    let devices = input.pod_devices.iter();
    devices
        .map(|device| rp_filter(device, "2", &proxy.default_rp_filter))
        .collect()
}

/// The tunnels to the proxy of a slot, with the host's device of each.
pub(super) fn ends(input: &NodeInput, slot: Slot) -> [(String, TunnelEnd); 2] {
    let NodeInput { names, tunnel, .. } = input;
    [
        (names.inbound(slot), tunnel.inbound),
        (names.outbound(slot), tunnel.outbound),
    ]
}

pub(super) fn geneve(
    tunnel: &Tunnel,
    name: &str,
    end: TunnelEnd,
    remote: IpAddr,
    mtu: u32,
) -> Link {
    Link::Geneve {
        name: name.to_owned(),
        vni: end.vni,
        remote,
        port: tunnel.port,
        mtu,
    }
}

pub(super) fn address(device: &str, ip: IpAddr, prefix_len: u8) -> Item {
    Item::Address(Address {
        device: device.to_owned(),
        address: IpNet::new(ip, prefix_len).unwrap_or_else(|_| ip.into()),
    })
}

/// What IPv6 needs of a tunnel's device: that it is on, whatever the namespace starts devices with,
/// and a link-local address to find its neighbour from (RFC 4861).
pub(super) fn ipv6_device(input: &NodeInput, device: &str, link_local: IpAddr) -> Vec<Item> {
    if !input.families().contains(&Family::V6) {
        return Vec::new();
    }
    let setting = |name: &str, value: &str| setting(format!("ipv6/conf/{device}/{name}"), value);
    vec![
        setting("disable_ipv6", "0"),
        // No link-local address of the kernel's own.
        setting("addr_gen_mode", "1"),
        address(device, link_local, 64),
    ]
}

/// A setting that goes away with its device or namespace.
pub(super) fn setting(path: String, value: &str) -> Item {
    Item::Sysctl(Sysctl {
        path,
        value: value.to_owned(),
        restore: value.to_owned(),
    })
}

pub(super) fn rp_filter(device: &str, value: &str, restore: &str) -> Item {
    Item::Sysctl(Sysctl {
        path: format!("ipv4/conf/{device}/rp_filter"),
        value: value.to_owned(),
        restore: restore.to_owned(),
    })
}
