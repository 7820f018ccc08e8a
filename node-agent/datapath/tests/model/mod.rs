//! A packet's way through a node, worked out from the items of a [`Datapath`] and nothing else: what
//! the kernel does with them, in the kernel's order.
//!
//! ```text
//!             ┌ host ──────────────────────────────────────────────────────────────┐
//!  pod A ──vA─┤ mangle PREROUTING ─▶ nat PREROUTING ─▶ rules and routes ─▶ FORWARD ─▶ POSTROUTING ─▶ device
//!             │   (our chains)        (kube-proxy's)     │      │
//!             │                                  refused ┘      └ local: INPUT ─▶ a socket of the host
//!             └────────────────────────────────────────────────────────────────────┘
//!  device is istioin, istioout ─▶ its other end in the proxy's namespace:
//!             mangle PREROUTING (TPROXY) ─▶ rules and routes ─▶ local: a listener of the proxy
//!  device is the proxy's ───────▶ eth0 there: mangle PREROUTING ─▶ rules and routes ─▶ its own sockets
//! ```
//!
//! - [`node`]: what a [`Datapath`] holds, indexed; the devices and networks around it are fixed.
//! - [`chains`]: the rules of iptables, read from the very text that is handed to the kernel.
//! - [`routes`]: policy routing rules, route tables, the check of a packet's source.
//! - [`walk`]: the way from place to place, to its end.
//! - [`settled`]: the scenarios, and where each should end.
//! - [`danger`]: where packets must not end, whatever the state.

pub(crate) mod chains;
pub(crate) mod danger;
pub(crate) mod node;
pub(crate) mod routes;
pub(crate) mod settled;
pub(crate) mod walk;

use std::net::IpAddr;

use datapath::input::Marks;
use datapath::{Family, Slot};

#[cfg(doc)]
use datapath::Datapath;

/// A packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Packet {
    pub(crate) source: IpAddr,
    pub(crate) destination: IpAddr,
    pub(crate) protocol: Protocol,
    /// Destination port.
    pub(crate) port: u16,
    /// Its mark, within one namespace.
    pub(crate) mark: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protocol {
    Tcp,
    Udp,
    /// Of either family; an error, which belongs to the connection that it is about.
    Icmp,
}

/// What the host's conntrack knows of a packet's connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Connection {
    pub(crate) phase: Phase,
    pub(crate) mark: u32,
}

/// What conntrack has seen of a connection, and whether the packet opens one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Nothing: this packet opens it.
    #[default]
    New,
    /// The answer to the first packet, which comes again.
    Opening,
    /// Its opening.
    Open,
    /// Its end by a reset of the answering side: this packet opens it anew.
    Reopened,
}

/// Where a packet starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// The pod with this last byte of its address.
    Pod(u8),
    /// Another node, or beyond.
    Outside,
    /// A process of the host.
    Host,
    /// The proxy in a slot, from whatever address.
    Proxy(Slot),
}

/// Where a packet ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// At a transparent listener of the proxy, which sees these addresses.
    Listener {
        slot: Slot,
        port: u16,
        source: IpAddr,
        destination: IpAddr,
    },
    /// At a connection that the proxy dialled or took, or at a listener of its own address.
    Proxy(Slot),
    /// At the pod with this last byte of its address.
    Pod(u8),
    /// At a process of the host.
    Host,
    /// It leaves the node.
    Outside,
    /// The sender is told that there is no way.
    Refused,
    /// It is dropped.
    Dropped(&'static str),
    /// It goes round and round.
    Loops,
}

impl Packet {
    pub(crate) fn tcp(source: IpAddr, destination: IpAddr, port: u16) -> Self {
        Self {
            source,
            destination,
            protocol: Protocol::Tcp,
            port,
            mark: 0,
        }
    }

    pub(crate) fn over(self, protocol: Protocol) -> Self {
        Self { protocol, ..self }
    }

    pub(crate) fn family(&self) -> Family {
        Family::of(self.destination)
    }
}

impl Connection {
    /// One that has seen packets of both directions, and that a proxy has not touched.
    pub(crate) fn old() -> Self {
        Self {
            phase: Phase::Open,
            mark: 0,
        }
    }

    /// Those between the ports of an older one that was reset, which was direct or which a proxy carried.
    pub(crate) fn reopened(marks: &Marks) -> [Self; 3] {
        let [first, second] = Slot::BOTH.map(|slot| marks.proxied[slot].value());
        [0, first, second].map(|mark| Self {
            phase: Phase::Reopened,
            mark,
        })
    }

    /// Whether packets of both directions were seen.
    pub(crate) fn is_established(self) -> bool {
        self.phase != Phase::New
    }

    /// Whether it was seen to be opened.
    pub(crate) fn is_assured(self) -> bool {
        matches!(self.phase, Phase::Open | Phase::Reopened)
    }

    /// Whether the packet opens it.
    pub(crate) fn is_opened(self) -> bool {
        self.phase != Phase::Open
    }
}
