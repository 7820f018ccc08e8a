//! Who else uses the UDP port of our geneve devices.
//!
//! The kernel (drivers/net/geneve.c) has one UDP socket a port and family, shared by the geneve devices
//! of a namespace and told apart by number and remote. It refuses a device beside one that takes
//! everything of its port (`external`), and one with the number and the remote of another. Any other
//! user of the port keeps our devices from coming up.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use netlink_packet_route::link::{
    InfoData, InfoGeneve, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};

use super::FactsError;
use super::obstacle::Obstacle;
use crate::datapath::Link;
use crate::kernel::netlink::name;
use crate::netns::Netns;

/// A geneve device of somebody else, or of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Geneve {
    name: String,
    port: u16,
    vni: u32,
    remote: Option<IpAddr>,
    /// It takes everything of its port, told by others what to do with it.
    external: bool,
    up: bool,
}

/// What keeps the wanted devices from their port, if anything does.
pub(super) fn taken(
    links: &[LinkMessage],
    sockets: &[SocketAddr],
    wanted: &[&Link],
) -> Option<Obstacle> {
    let devices: Vec<Geneve> = links.iter().filter_map(geneve).collect();
    let is_ours = |device: &Geneve| wanted.iter().any(|link| link.name() == device.name);
    let by = |port: u16, by: String| Obstacle::GenevePort { port, by };
    for link in wanted {
        let Link::Geneve {
            vni, remote, port, ..
        } = link
        else {
            continue;
        };
        if let Some(device) = devices
            .iter()
            .find(|device| !is_ours(device) && device.hinders(*vni, *remote, *port))
        {
            return Some(by(*port, format!("the geneve device {}", device.name)));
        }
        let shared = devices
            .iter()
            .any(|device| device.up && device.port == *port);
        let socket = sockets
            .iter()
            .find(|socket| blocks(**socket, *port, *remote));
        if let (false, Some(socket)) = (shared, socket) {
            let who = vxlan_on(links, *port).map_or_else(
                || format!("a UDP socket of another program ({socket})"),
                |device| format!("the vxlan device {device}"),
            );
            return Some(by(*port, who));
        }
    }
    None
}

impl Geneve {
    /// Whether the kernel refuses another device of this number, remote and port.
    fn hinders(&self, vni: u32, remote: IpAddr, port: u16) -> bool {
        let same = self.vni == vni && self.remote == Some(remote);
        self.port == port && (self.external || same)
    }
}

/// Whether a socket keeps the port from a geneve device with such a remote. Geneve over IPv6 takes
/// IPv6 only.
fn blocks(socket: SocketAddr, port: u16, remote: IpAddr) -> bool {
    let same_family = socket.is_ipv4() == remote.is_ipv4();
    let both_families = socket.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED);
    socket.port() == port && (same_family || both_families)
}

fn data(link: &LinkMessage) -> Option<&InfoData> {
    link.attributes.iter().find_map(|attribute| {
        let LinkAttribute::LinkInfo(infos) = attribute else {
            return None;
        };
        infos.iter().find_map(|info| match info {
            LinkInfo::Data(data) => Some(data),
            _ => None,
        })
    })
}

fn geneve(link: &LinkMessage) -> Option<Geneve> {
    let InfoData::Geneve(values) = data(link)? else {
        return None;
    };
    let mut device = Geneve {
        name: name(link),
        port: 0,
        vni: 0,
        remote: None,
        external: false,
        up: link.header.flags.contains(LinkFlags::Up),
    };
    for value in values {
        match value {
            InfoGeneve::Id(id) => device.vni = *id,
            InfoGeneve::Remote(ip) => device.remote = Some((*ip).into()),
            InfoGeneve::Remote6(ip) => device.remote = Some((*ip).into()),
            InfoGeneve::Port(port) => device.port = *port,
            InfoGeneve::CollectMetadata => device.external = true,
            _ => {}
        }
    }
    Some(device)
}

fn vxlan_on(links: &[LinkMessage], port: u16) -> Option<String> {
    let link = links.iter().find(|link| match data(link) {
        Some(InfoData::Vxlan(values)) => values.contains(&InfoVxlan::Port(port)),
        _ => false,
    })?;
    Some(name(link))
}

/// The UDP sockets of a namespace.
pub(super) fn sockets(host: &Netns) -> Result<Vec<SocketAddr>, FactsError> {
    let read = || -> io::Result<Vec<SocketAddr>> {
        let mut found = Vec::new();
        for file in ["udp", "udp6"] {
            match std::fs::read_to_string(format!("/proc/thread-self/net/{file}")) {
                Ok(table) => found.extend(parse(&table)),
                // A kernel without IPv6.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(found)
    };
    host.run(read)
        .map_err(FactsError::Enter)?
        .map_err(FactsError::Sockets)
}

/// The local addresses of /proc/net/udp and udp6 (proc_net(5)).
fn parse(table: &str) -> impl Iterator<Item = SocketAddr> {
    table.lines().skip(1).filter_map(|line| {
        let (ip, port) = line.split_whitespace().nth(1)?.split_once(':')?;
        let port = u16::from_str_radix(port, 16).ok()?;
        Some(SocketAddr::new(address(ip)?, port))
    })
}

/// An address as the kernel prints it there: words of 32 bits in this machine's order.
fn address(text: &str) -> Option<IpAddr> {
    let word = |text: &str| u32::from_str_radix(text, 16).ok().map(u32::to_ne_bytes);
    match text.len() {
        8 => Some(Ipv4Addr::from(word(text)?).into()),
        32 => {
            let mut bytes = [0; 16];
            for (index, bytes) in bytes.chunks_exact_mut(4).enumerate() {
                bytes.copy_from_slice(&word(text.get(index * 8..index * 8 + 8)?)?);
            }
            Some(Ipv6Addr::from(bytes).into())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use netlink_packet_route::link::InfoKind;

    use super::*;

    const PROXY: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 3);

    fn device(name: &str, kind: InfoKind, data: InfoData) -> LinkMessage {
        let mut link = LinkMessage::default();
        link.header.flags = LinkFlags::Up;
        link.attributes = vec![
            LinkAttribute::IfName(name.to_owned()),
            LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind), LinkInfo::Data(data)]),
        ];
        link
    }

    fn geneve(name: &str, values: &[InfoGeneve]) -> LinkMessage {
        let data = InfoData::Geneve([&[InfoGeneve::Port(6081)], values].concat());
        device(name, InfoKind::Geneve, data)
    }

    fn plain(name: &str, vni: u32) -> LinkMessage {
        geneve(name, &[InfoGeneve::Id(vni), InfoGeneve::Remote(PROXY)])
    }

    /// Who takes the port, if anybody does.
    fn takes(links: &[LinkMessage], sockets: &[&str]) -> Option<String> {
        let ours = Link::Geneve {
            name: "istioin".to_owned(),
            vni: 1000,
            remote: PROXY.into(),
            port: 6081,
            mtu: 1450,
        };
        let sockets: Vec<SocketAddr> = sockets.iter().map(|at| at.parse().unwrap()).collect();
        taken(links, &sockets, &[&ours]).map(|found| match found {
            Obstacle::GenevePort { port: 6081, by } => by,
            other => panic!("{other}"),
        })
    }

    #[test]
    fn a_device_that_takes_the_whole_port_hinders() {
        let external = geneve("genev_sys_6081", &[InfoGeneve::CollectMetadata]);
        assert_eq!(
            takes(&[external], &["0.0.0.0:6081"]).as_deref(),
            Some("the geneve device genev_sys_6081")
        );
    }

    #[test]
    fn a_device_of_the_same_number_and_remote_hinders_and_others_share_the_port() {
        assert_eq!(
            takes(&[plain("g0", 1000)], &["0.0.0.0:6081"]).as_deref(),
            Some("the geneve device g0")
        );
        assert_eq!(takes(&[plain("g0", 7)], &["0.0.0.0:6081"]), None);
        assert_eq!(takes(&[plain("istioin", 1000)], &["0.0.0.0:6081"]), None);
    }

    #[test]
    fn another_user_of_the_port_hinders() {
        let vxlan = InfoData::Vxlan(vec![InfoVxlan::Port(6081)]);
        let vxlan = device("flannel.1", InfoKind::Vxlan, vxlan);
        assert_eq!(
            takes(&[vxlan], &["0.0.0.0:6081"]).as_deref(),
            Some("the vxlan device flannel.1")
        );
        assert_eq!(
            takes(&[], &["[::]:6081"]).as_deref(),
            Some("a UDP socket of another program ([::]:6081)")
        );
        assert_eq!(takes(&[], &["0.0.0.0:6082", "[::1]:6081"]), None);
    }

    #[test]
    fn the_kernels_table_of_sockets_is_read() {
        const UDP: &str = "   sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref pointer drops            
15667: 0100007F:17C1 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 6788727 2 00000000de87d8d8 0       
";
        const UDP6: &str = "  sl  local_address                         remote_address                        st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref pointer drops
  437: 00000000000000000000000001000000:0035 00000000000000000000000000000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 1234 2 0000000000000000 0
";
        let found: Vec<String> = parse(UDP)
            .chain(parse(UDP6))
            .map(|socket| socket.to_string())
            .collect();
        if cfg!(target_endian = "little") {
            assert_eq!(found, ["127.0.0.1:6081", "[::1]:53"]);
        }
        assert_eq!(found.len(), 2);
    }
}
