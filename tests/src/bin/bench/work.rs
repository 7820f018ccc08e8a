//! What is measured.

use serde::Serialize;

/// The way that traffic takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Variant {
    /// Plain TCP between pods outside the mesh.
    Plain,
    /// TLS 1.3 between pods outside the mesh, by the programs themselves.
    Tls,
    /// Plain TCP between mesh pods: HBONE across nodes, joined sockets on one node.
    Mesh,
    /// Plain TCP from a mesh pod to one outside: the redirection without the encryption.
    Passthrough,
}

/// How `load run` is called.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Work {
    /// Name in the report.
    pub(crate) name: &'static str,
    /// `--work` of `load run`.
    pub(crate) kind: &'static str,
    /// Connections at a time.
    pub(crate) connections: usize,
    /// Whether the server is on the client's node.
    pub(crate) same_node: bool,
    /// What is compared.
    pub(crate) variants: &'static [Variant],
}

const ENCRYPTED: &[Variant] = &[Variant::Plain, Variant::Tls, Variant::Mesh];
const EVERY: &[Variant] = &[
    Variant::Plain,
    Variant::Tls,
    Variant::Mesh,
    Variant::Passthrough,
];

/// Every work, in the order of the report.
pub(crate) const WORKS: &[Work] = &[
    across("bulk, 1 stream", "bulk", 1, EVERY),
    across("bulk, 8 streams", "bulk", 8, ENCRYPTED),
    across("ping-pong, 1 connection", "ping-pong", 1, EVERY),
    across("keep-alive, 64 connections", "ping-pong", 64, ENCRYPTED),
    across("new connections, 16 clients", "connect", 16, ENCRYPTED),
    across("new connections, 64 clients", "connect", 64, ENCRYPTED),
    same("same node: bulk, 1 stream", "bulk", 1),
    same("same node: ping-pong, 1 connection", "ping-pong", 1),
    same("same node: keep-alive, 64 connections", "ping-pong", 64),
    across("idle, 5000 connections", "idle", 5000, &[Variant::Mesh]),
];

const fn across(
    name: &'static str,
    kind: &'static str,
    connections: usize,
    variants: &'static [Variant],
) -> Work {
    Work {
        name,
        kind,
        connections,
        same_node: false,
        variants,
    }
}

const fn same(name: &'static str, kind: &'static str, connections: usize) -> Work {
    Work {
        name,
        kind,
        connections,
        same_node: true,
        variants: ENCRYPTED,
    }
}
