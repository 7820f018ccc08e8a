//! The scenarios: which packet should end where on a node in the state that is wanted of it.

use std::net::IpAddr;

use datapath::{FailureMode, Family, NodeInput, Slot, build};
use proptest::prelude::*;

use super::node::{self, Node};
use super::walk::{MESH_SERVICE, OUTSIDER, SERVICE, send, service};
use super::{Connection, End, Origin, Packet, Phase, Protocol};

/// A packet and where it should end.
pub(crate) struct Case {
    what: &'static str,
    origin: Origin,
    packet: Packet,
    connection: Connection,
    end: End,
}

/// A node in the state that is wanted of it.
pub(crate) struct Settled<'a> {
    input: &'a NodeInput,
    node: Node,
}

impl<'a> Settled<'a> {
    pub(crate) fn of(input: &'a NodeInput) -> Self {
        let node = Node::of(&build(input), default_rp_filter(input));
        Self { input, node }
    }

    /// The proxy that new connections of a family go to.
    pub(crate) fn serving(&self, family: Family) -> Option<Slot> {
        let (slot, proxy) = self.input.serving()?;
        proxy.ends.of(family).map(|_| slot)
    }

    /// Where a connection that a listener should get ends.
    pub(crate) fn to_listener(&self, packet: Packet, port: u16, directly: End) -> End {
        match self.serving(packet.family()) {
            Some(slot) => End::Listener {
                slot,
                port,
                source: packet.source,
                destination: packet.destination,
            },
            None if is_guarded(self.input) => End::Refused,
            None => directly,
        }
    }

    /// What mesh pods send.
    pub(crate) fn sent_by_pod(&self, last: u8, family: Family) -> Vec<Case> {
        let a = node::pod(last, family);
        let case = |what, to, directly| {
            let packet = Packet::tcp(a, to, 80);
            Case {
                what,
                origin: Origin::Pod(last),
                packet,
                connection: Connection::default(),
                end: self.to_listener(packet, self.input.ports.outbound, directly),
            }
        };
        let outsider = node::pod(OUTSIDER, family);
        let mut cases = vec![
            case("1 to another mesh pod", node::pod(27, family), End::Pod(27)),
            case("3 to a pod outside the mesh", outsider, End::Pod(OUTSIDER)),
            case("6 to itself", a, End::Pod(last)),
            case(
                "6, 10 to a ClusterIP of mesh pods",
                service(MESH_SERVICE, family),
                End::Pod(20),
            ),
            case(
                "10 to a ClusterIP",
                service(SERVICE, family),
                End::Pod(OUTSIDER),
            ),
            case(
                "12 to outside of the cluster",
                outside(family),
                End::Outside,
            ),
        ];
        let direct = |what, packet, connection, end| Case {
            what,
            origin: Origin::Pod(last),
            packet,
            connection,
            end,
        };
        let tcp = Packet::tcp(a, outsider, 80);
        let new = Connection::default();
        cases.extend([
            direct(
                "5 to a process of the host",
                Packet::tcp(a, node::host(family), 80),
                new,
                End::Host,
            ),
            direct(
                "11 by UDP",
                tcp.over(Protocol::Udp),
                new,
                End::Pod(OUTSIDER),
            ),
            direct(
                "11 by ICMP",
                tcp.over(Protocol::Icmp),
                new,
                End::Pod(OUTSIDER),
            ),
            direct(
                "19 of a connection older than the enrolment",
                tcp,
                Connection::old(),
                End::Pod(OUTSIDER),
            ),
            direct(
                "19 of one that is being opened, once more",
                tcp,
                Connection {
                    phase: Phase::Opening,
                    mark: 0,
                },
                End::Pod(OUTSIDER),
            ),
        ]);
        cases.extend(
            Connection::reopened(&self.input.marks).map(|connection| Case {
                connection,
                ..case(
                    "to where an older one was reset",
                    outsider,
                    End::Pod(OUTSIDER),
                )
            }),
        );
        for (slot, _) in self.proxies(family) {
            let packet = Packet::tcp(a, node::proxy(slot, family), 15021);
            let refused = self.serving(family).is_none() && is_guarded(self.input);
            let end = if refused {
                End::Refused
            } else {
                End::Proxy(slot)
            };
            cases.push(direct("to the proxy itself", packet, new, end));
        }
        cases
    }

    /// What mesh pods are sent.
    pub(crate) fn sent_to_pod(&self, last: u8, family: Family) -> Vec<Case> {
        let a = node::pod(last, family);
        let ports = self.input.ports;
        let case = |what, (origin, from), port, listener| {
            let packet = Packet::tcp(from, a, port);
            Case {
                what,
                origin,
                packet,
                connection: Connection::default(),
                end: self.to_listener(packet, listener, End::Pod(last)),
            }
        };
        let stranger = (Origin::Pod(OUTSIDER), node::pod(OUTSIDER, family));
        let other_node = (Origin::Outside, outside(family));
        let mut cases = vec![
            case(
                "2 from a pod outside the mesh",
                stranger,
                80,
                ports.inbound_plaintext,
            ),
            case("2 from elsewhere", other_node, 80, ports.inbound_plaintext),
            case(
                "13 HBONE from another node",
                other_node,
                ports.inbound,
                ports.inbound,
            ),
        ];
        let direct = |what, origin, packet, connection| Case {
            what,
            origin,
            packet,
            connection,
            end: End::Pod(last),
        };
        let tcp = Packet::tcp(stranger.1, a, 80);
        let new = Connection::default();
        let probe = Packet::tcp(node::host(family), a, 80);
        cases.extend([
            direct("4 from the host", Origin::Host, probe, new),
            direct("11 by UDP", stranger.0, tcp.over(Protocol::Udp), new),
            direct("11 by ICMP", stranger.0, tcp.over(Protocol::Icmp), new),
            direct(
                "19 of a connection older than the enrolment",
                stranger.0,
                tcp,
                Connection::old(),
            ),
        ]);
        cases.extend(
            Connection::reopened(&self.input.marks).map(|connection| Case {
                connection,
                ..case(
                    "from where an older one was reset",
                    stranger,
                    80,
                    ports.inbound_plaintext,
                )
            }),
        );
        cases
    }

    /// What a proxy sends in its own name and is sent.
    pub(crate) fn of_proxy(&self, slot: Slot, family: Family) -> Vec<Case> {
        let proxy = node::proxy(slot, family);
        let case = |what, origin, packet, end| Case {
            what,
            origin,
            packet,
            connection: Connection::default(),
            end,
        };
        let outsider = node::pod(OUTSIDER, family);
        let mut cases = vec![
            case(
                "7 its own, to outside",
                Origin::Proxy(slot),
                Packet::tcp(proxy, outside(family), 15012),
                End::Outside,
            ),
            case(
                "7 its own, to a pod",
                Origin::Proxy(slot),
                Packet::tcp(proxy, outsider, 80),
                End::Pod(OUTSIDER),
            ),
            case(
                "7 its own, to the host",
                Origin::Proxy(slot),
                Packet::tcp(proxy, node::host(family), 80),
                End::Host,
            ),
            case(
                "8 from the host",
                Origin::Host,
                Packet::tcp(node::host(family), proxy, 15021),
                End::Proxy(slot),
            ),
            case(
                "9 from a pod outside the mesh",
                Origin::Pod(OUTSIDER),
                Packet::tcp(outsider, proxy, 15020),
                End::Proxy(slot),
            ),
        ];
        cases.extend(self.pods(family).map(|last| {
            let packet = Packet::tcp(proxy, node::pod(last, family), 80);
            case(
                "7 its own, to a mesh pod",
                Origin::Proxy(slot),
                packet,
                End::Pod(last),
            )
        }));
        cases
    }

    pub(crate) fn pods(&self, family: Family) -> impl Iterator<Item = u8> {
        members(self.input, family)
    }

    pub(crate) fn proxies(&self, family: Family) -> impl Iterator<Item = (Slot, IpAddr)> {
        let proxies = self.input.proxies.taken();
        proxies.filter_map(move |(slot, proxy)| Some((slot, proxy.ends.of(family)?.proxy)))
    }

    pub(crate) fn holds(&self, case: &Case) -> Result<(), TestCaseError> {
        let arrived = send(&self.node, case.origin, case.packet, case.connection);
        prop_assert_eq!(arrived.end, case.end, "{}: {:#?}", case.what, arrived.trace);
        Ok(())
    }

    /// Sends a packet of a connection on, and returns what conntrack knows afterwards.
    pub(crate) fn goes(
        &self,
        what: &str,
        origin: Origin,
        packet: Packet,
        connection: Connection,
        end: End,
    ) -> Result<Connection, TestCaseError> {
        let arrived = send(&self.node, origin, packet, connection);
        prop_assert_eq!(arrived.end, end, "{}: {:#?}", what, arrived.trace);
        Ok(Connection {
            phase: Phase::Open,
            ..arrived.connection
        })
    }

    /// What a proxy dials from a pod's address, and the answers.
    pub(crate) fn dials(&self, slot: Slot, last: u8, family: Family) -> Result<(), TestCaseError> {
        let a = node::pod(last, family);
        let there = [
            (
                Origin::Pod(OUTSIDER),
                node::pod(OUTSIDER, family),
                End::Pod(OUTSIDER),
            ),
            (Origin::Pod(27), node::pod(27, family), End::Pod(27)),
            (Origin::Outside, outside(family), End::Outside),
            (Origin::Host, node::host(family), End::Host),
        ];
        for (origin, b, end) in there.into_iter().filter(|(_, b, _)| *b != a) {
            let (out, back) = (Packet::tcp(a, b, 80), Packet::tcp(b, a, 20000));
            let known = self.goes(
                "a dial in a pod's name",
                Origin::Proxy(slot),
                out,
                Connection::default(),
                end,
            )?;
            let known = self.goes("its answer", origin, back, known, End::Proxy(slot))?;
            self.goes("what follows", Origin::Proxy(slot), out, known, end)?;
            if origin != Origin::Host {
                self.goes(
                    "an error about it",
                    origin,
                    back.over(Protocol::Icmp),
                    known,
                    End::Proxy(slot),
                )?;
            }
        }
        let client = node::pod(OUTSIDER, family);
        let (to, from) = (Packet::tcp(client, a, 80), Packet::tcp(a, client, 20000));
        let known = self.goes(
            "a dial to a pod",
            Origin::Proxy(slot),
            to,
            Connection::default(),
            End::Pod(last),
        )?;
        self.goes(
            "the pod's answer",
            Origin::Pod(last),
            from,
            known,
            End::Proxy(slot),
        )?;
        Ok(())
    }

    /// A connection that a pod opens: its first packet, the proxy's answer, what follows.
    pub(crate) fn is_carried(
        &self,
        slot: Slot,
        last: u8,
        family: Family,
    ) -> Result<(), TestCaseError> {
        let (a, b) = (node::pod(last, family), node::pod(OUTSIDER, family));
        let (out, back) = (Packet::tcp(a, b, 80), Packet::tcp(b, a, 33000));
        let listener = self.to_listener(out, self.input.ports.outbound, End::Refused);
        let known = self.goes(
            "the first",
            Origin::Pod(last),
            out,
            Connection::default(),
            listener,
        )?;
        let known = self.goes(
            "the answer",
            Origin::Proxy(slot),
            back,
            known,
            End::Pod(last),
        )?;
        self.goes(
            "what follows",
            Origin::Pod(last),
            out,
            known,
            End::Proxy(slot),
        )?;
        Ok(())
    }

    /// What belongs to a connection that a proxy carried that is gone now goes nowhere.
    pub(crate) fn refuses(
        &self,
        slot: Slot,
        last: u8,
        family: Family,
    ) -> Result<(), TestCaseError> {
        let known = Connection {
            phase: Phase::Open,
            mark: self.input.marks.proxied[slot].value(),
        };
        let out = Packet::tcp(node::pod(last, family), node::pod(OUTSIDER, family), 80);
        self.goes(
            "of a lost connection",
            Origin::Pod(last),
            out,
            known,
            End::Refused,
        )?;
        Ok(())
    }
}

/// Whether mesh pods' traffic must not go directly.
pub(crate) fn is_guarded(input: &NodeInput) -> bool {
    input.serving().is_some() || input.failure_mode == FailureMode::Closed
}

pub(crate) fn outside(family: Family) -> IpAddr {
    match family {
        Family::V4 => "203.0.113.7".parse().unwrap(),
        Family::V6 => "2001:db8::7".parse().unwrap(),
    }
}

pub(crate) fn members(input: &NodeInput, family: Family) -> impl Iterator<Item = u8> {
    let ips = input.pods.iter().map(|pod| pod.ip);
    ips.filter(move |ip| Family::of(*ip) == family)
        .filter_map(node::pod_of)
}

pub(crate) fn default_rp_filter(input: &NodeInput) -> u8 {
    let mut proxies = input.proxies.taken();
    let value = |(_, proxy): (Slot, &datapath::input::Proxy)| proxy.default_rp_filter.parse();
    proxies.next().map_or(0, |proxy| value(proxy).unwrap())
}
