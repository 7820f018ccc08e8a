//! What must not happen to a pod that is in the mesh, in any state on the way to the one that is wanted.

use datapath::{Family, NodeInput, Slot};

use super::node::{self, Node};
use super::settled::outside;
use super::walk::{Arrived, OUTSIDER, SERVICE, send, service};
use super::{Connection, End, Origin, Packet, Phase};

/// A packet that must not end in some places.
pub(crate) struct Danger {
    pub(crate) what: &'static str,
    pub(crate) origin: Origin,
    pub(crate) packet: Packet,
    pub(crate) connection: Connection,
    pub(crate) is_bad: fn(End) -> bool,
}

impl Danger {
    /// How it strikes, if it does.
    pub(crate) fn strikes(&self, node: &Node) -> Option<String> {
        // A proxy dials for what has come to it.
        if matches!(self.origin, Origin::Proxy(slot) if !node.host.leads_to(slot)) {
            return None;
        }
        let Arrived {
            end,
            packet,
            connection,
            trace,
        } = send(node, self.origin, self.packet, self.connection);
        (self.is_bad)(end).then(|| {
            let mark = packet.mark;
            format!(
                "{}: ends at {end:?}, mark {mark:#x}, {connection:?}\n{trace:#?}",
                self.what
            )
        })
    }
}

/// What must not happen to a pod that is in the mesh.
pub(crate) fn dangers_of_pod(last: u8, family: Family, input: &NodeInput) -> Vec<Danger> {
    let a = node::pod(last, family);
    let danger = |what, origin, packet, connection, is_bad| Danger {
        what,
        origin,
        packet,
        connection,
        is_bad,
    };
    let new = Connection::default();
    let [direct, first, second] = Connection::reopened(&input.marks);
    let opened = [new, direct, first, second];
    let leaves = |end| matches!(end, End::Pod(_) | End::Outside);
    let arrives = |end| matches!(end, End::Pod(_));
    let returns = |end| matches!(end, End::Listener { .. } | End::Loops);
    let outsider = node::pod(OUTSIDER, family);
    let mut dangers = Vec::new();
    for to in [
        outsider,
        node::pod(27, family),
        service(SERVICE, family),
        outside(family),
    ] {
        let packet = Packet::tcp(a, to, 80);
        dangers.extend(opened.map(|connection| {
            let what = "it leaves in the clear";
            danger(what, Origin::Pod(last), packet, connection, leaves)
        }));
    }
    for (origin, source) in [
        (Origin::Pod(OUTSIDER), outsider),
        (Origin::Outside, outside(family)),
    ] {
        let packet = Packet::tcp(source, a, 80);
        dangers.extend(opened.map(|connection| {
            let what = "it is reached past the proxy";
            danger(what, origin, packet, connection, arrives)
        }));
    }
    for slot in Slot::BOTH {
        let old = Connection {
            phase: Phase::Open,
            mark: input.marks.proxied[slot].value(),
        };
        let carried = Packet::tcp(a, outsider, 80);
        dangers.push(danger(
            "of what a proxy carries some leaves in the clear",
            Origin::Pod(last),
            carried,
            old,
            leaves,
        ));
        if input.proxies[slot]
            .as_ref()
            .is_none_or(|proxy| proxy.ends.of(family).is_none())
        {
            continue;
        }
        let to_it = Packet::tcp(outsider, a, 80);
        for dial in [carried, to_it] {
            dangers.push(danger(
                "what a proxy dials comes back to one",
                Origin::Proxy(slot),
                dial,
                new,
                returns,
            ));
        }
    }
    dangers
}

/// What must not happen to a new connection of a pod that joins the mesh or leaves it.
pub(crate) fn refusals_of_pod(last: u8, family: Family) -> Vec<Danger> {
    let (a, outsider) = (node::pod(last, family), node::pod(OUTSIDER, family));
    let lost = |end| matches!(end, End::Refused | End::Dropped(_) | End::Loops);
    let ends = [
        (Origin::Pod(OUTSIDER), outsider, a),
        (Origin::Outside, outside(family), a),
        (Origin::Pod(last), a, outsider),
        (Origin::Pod(last), a, outside(family)),
    ];
    ends.map(|(origin, from, to)| Danger {
        what: "a new connection is lost",
        origin,
        packet: Packet::tcp(from, to, 80),
        connection: Connection::default(),
        is_bad: lost,
    })
    .into()
}

/// The dangers of one kind together: a pod that one of them strikes is exposed to all of them.
pub(crate) fn by_kind(dangers: Vec<Danger>) -> Vec<Vec<Danger>> {
    let mut kinds: Vec<Vec<Danger>> = Vec::new();
    for danger in dangers {
        match kinds.last_mut() {
            Some(kind) if kind[0].what == danger.what => kind.push(danger),
            _ => kinds.push(vec![danger]),
        }
    }
    kinds
}
