//! The way of a packet from namespace to namespace, to its end.

use std::net::IpAddr;

use datapath::datapath::{Link, Table};
use datapath::names::{Names, peer};
use datapath::{Family, Place, Slot};

use super::chains::{self, Verdict};
use super::node::{self, Behind, Node, PROXY_DEVICE};
use super::routes::{self, ITSELF, Way};
use super::{Connection, End, Origin, Packet, Protocol};

/// A ClusterIP whose endpoint is the pod [`OUTSIDER`].
pub(crate) const SERVICE: u8 = 10;
/// A ClusterIP whose endpoint is the first of the pods that may be in the mesh.
pub(crate) const MESH_SERVICE: u8 = 11;
/// A pod that is never in the mesh.
pub(crate) const OUTSIDER: u8 = 40;
const MESH_ENDPOINT: u8 = 20;

/// No device: of what has not come by one, or goes to none yet.
const NONE: &str = "";

/// Times that a packet may change namespaces; one that does so more often never arrives.
const CROSSINGS: usize = 16;

/// A packet that has come to its end.
#[derive(Debug)]
pub(crate) struct Arrived {
    pub(crate) end: End,
    /// The packet as it was there.
    pub(crate) packet: Packet,
    /// What the host's conntrack knows now.
    pub(crate) connection: Connection,
    /// Where it has been, for people.
    pub(crate) trace: Vec<String>,
}

/// A packet on its way.
struct Walk<'a> {
    node: &'a Node,
    packet: Packet,
    connection: Connection,
    trace: Vec<String>,
}

/// Sends a packet on its way.
pub(crate) fn send(node: &Node, from: Origin, packet: Packet, connection: Connection) -> Arrived {
    let mut walk = Walk {
        node,
        packet,
        connection,
        trace: Vec::new(),
    };
    let end = match from {
        Origin::Pod(last) => walk.host_receives(&format!("v{last}")),
        Origin::Outside => walk.host_receives(node::UPLINK),
        Origin::Host => walk.host_sends(),
        Origin::Proxy(slot) => walk.proxy_sends(slot),
    };
    let Walk {
        packet,
        connection,
        trace,
        ..
    } = walk;
    Arrived {
        end,
        packet,
        connection,
        trace,
    }
}

/// A ClusterIP.
pub(crate) fn service(last: u8, family: Family) -> IpAddr {
    match family {
        Family::V4 => std::net::Ipv4Addr::new(10, 96, 0, last).into(),
        Family::V6 => std::net::Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, u16::from(last)).into(),
    }
}

impl Walk<'_> {
    fn host_receives(&mut self, device: &str) -> End {
        if self.note(format!("the host by {device}")) {
            return End::Loops;
        }
        // A mark does not cross from one namespace to another.
        self.packet.mark = 0;
        self.run(Table::Mangle, "PREROUTING", (device, NONE));
        self.translate(device);
        if !routes::takes_source(self.node, Place::Host, device, &self.packet) {
            return End::Dropped("the host does not expect this source here");
        }
        match routes::look_up(self.node, Place::Host, device, &self.packet) {
            Way::Refused => End::Refused,
            Way::Local => {
                self.run(Table::Mangle, "INPUT", (device, NONE));
                End::Host
            }
            Way::By { device: out, .. } => {
                if self.run(Table::Mangle, "FORWARD", (device, &out)) == Verdict::Drop {
                    return End::Dropped("a chain of ours drops it");
                }
                self.host_transmits(&out)
            }
        }
    }

    fn host_sends(&mut self) -> End {
        self.note("the host itself".to_owned());
        self.run(Table::Mangle, "OUTPUT", (NONE, NONE));
        match routes::look_up(self.node, Place::Host, ITSELF, &self.packet) {
            Way::Refused => End::Refused,
            Way::Local => End::Host,
            Way::By { device, .. } => self.host_transmits(&device),
        }
    }

    fn host_transmits(&mut self, device: &str) -> End {
        if self.run(Table::Nat, "POSTROUTING", (NONE, device)) != Verdict::Accept {
            self.masquerade();
        }
        if node::is_tunnel(device) {
            return self.cross(device);
        }
        match node::behind(device) {
            Behind::Pod(last) if node::pod_of(self.packet.destination) == Some(last) => {
                End::Pod(last)
            }
            Behind::Pod(_) => End::Dropped("this pod does not have that address"),
            Behind::Proxy(slot) => self.proxy_receives(slot, PROXY_DEVICE),
            Behind::Outside => End::Outside,
        }
    }

    /// Origin the host's end of a tunnel to the proxy's.
    fn cross(&mut self, device: &str) -> End {
        let Some(slot) = Names::default().slot_of(device) else {
            return End::Dropped("this device leads nowhere");
        };
        let (here, there) = (&self.node.host, &self.node.proxies[slot]);
        let other = peer(device);
        let joined = match here.links.get(device) {
            Some(Link::Veth { peer, .. }) => peer.as_deref() == Some(&other),
            Some(Link::Geneve {
                vni, remote, port, ..
            }) => {
                let same = |link: &Link| matches!(link, Link::Geneve { vni: v, port: p, .. } if (v, p) == (vni, port));
                *remote == node::proxy(slot, Family::of(*remote))
                    && there.links.get(&other).is_some_and(same)
            }
            Some(Link::Foreign { .. }) | None => false,
        };
        let answers = self
            .gateway(device)
            .is_some_and(|gateway| there.is_up(&other) && there.has_address(Some(&other), gateway));
        if joined && answers {
            self.proxy_receives(slot, &other)
        } else {
            End::Dropped("nobody answers at the other end of the tunnel")
        }
    }

    /// The gateway that the route into a tunnel names.
    fn gateway(&self, device: &str) -> Option<IpAddr> {
        let packet = &self.packet;
        let routes = self.node.host.routes.values().flatten();
        let mut gateways = routes.filter_map(|route| match &route.target {
            datapath::datapath::Target::Via {
                gateway,
                device: by,
                ..
            } if by == device && Family::of(*gateway) == packet.family() => Some(*gateway),
            _ => None,
        });
        gateways.next()
    }

    fn proxy_receives(&mut self, slot: Slot, device: &str) -> End {
        if self.note(format!("the proxy ({slot:?}) by {device}")) {
            return End::Loops;
        }
        self.packet.mark = 0;
        let place = Place::Proxy(slot);
        let side = self.node.side(place);
        let rules = side.chain(self.packet.family(), Table::Mangle, "PREROUTING");
        // Nothing there asks for connections.
        let mut unknown = Connection::default();
        let verdict = chains::run(rules, side, (device, NONE), &mut self.packet, &mut unknown);
        if !routes::takes_source(self.node, place, device, &self.packet) {
            return End::Dropped("the proxy's namespace does not expect this source here");
        }
        let packet = self.packet;
        match routes::look_up(self.node, place, device, &packet) {
            Way::Refused => End::Refused,
            Way::Local => match verdict {
                Verdict::ToPort(port) => End::Listener {
                    slot,
                    port,
                    source: packet.source,
                    destination: packet.destination,
                },
                _ => End::Proxy(slot),
            },
            Way::By { .. } if self.forwards(slot) => self.host_receives(node::device_of(slot)),
            Way::By { .. } => End::Dropped("the proxy's namespace does not forward"),
        }
    }

    /// New namespaces may forward because the node does (`net.core.devconf_inherit_init_net`).
    fn forwards(&self, slot: Slot) -> bool {
        let setting = match self.packet.family() {
            Family::V4 => "ipv4/ip_forward",
            Family::V6 => "ipv6/conf/all/forwarding",
        };
        self.node.proxies[slot].setting(setting) != Some("0")
    }

    fn proxy_sends(&mut self, slot: Slot) -> End {
        self.note(format!("the proxy ({slot:?}) itself"));
        self.host_receives(node::device_of(slot))
    }

    /// What kube-proxy does to the first packet of a connection to a ClusterIP.
    fn translate(&mut self, device: &str) {
        if self.connection.is_established()
            || self.run(Table::Nat, "PREROUTING", (device, NONE)) == Verdict::Accept
        {
            return;
        }
        let family = self.packet.family();
        for (last, endpoint) in [(SERVICE, OUTSIDER), (MESH_SERVICE, MESH_ENDPOINT)] {
            if self.packet.destination == service(last, family) {
                self.packet.destination = node::pod(endpoint, family);
            }
        }
    }

    /// What a CNI plugin does to the first packet of a pod's connection to what is no pod.
    fn masquerade(&mut self) {
        let is_pod = |ip| node::pod_of(ip).is_some();
        if !self.connection.is_established()
            && is_pod(self.packet.source)
            && !is_pod(self.packet.destination)
            && node::main_device(self.packet.destination) == node::UPLINK
        {
            self.packet.source = node::host(self.packet.family());
        }
    }

    fn run(&mut self, table: Table, hook: &str, devices: (&str, &str)) -> Verdict {
        let side = &self.node.host;
        let rules = side.chain(self.packet.family(), table, hook);
        chains::run(rules, side, devices, &mut self.packet, &mut self.connection)
    }

    /// Notes a place; true when there are too many.
    fn note(&mut self, place: String) -> bool {
        let protocol = match self.packet.protocol {
            Protocol::Tcp => "TCP",
            Protocol::Udp => "UDP",
            Protocol::Icmp => "ICMP",
        };
        let Packet {
            source,
            destination,
            port,
            ..
        } = self.packet;
        self.trace.push(format!(
            "{protocol} {source} to {destination}:{port} at {place}"
        ));
        self.trace.len() > CROSSINGS
    }
}
