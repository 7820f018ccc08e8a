//! What a server tells its client about their connection.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// What a server tells its client about their connection.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Seen {
    /// The client's address, as the server sees it.
    pub(crate) peer: SocketAddr,
    /// Name of the server's pod.
    pub(crate) pod: String,
}

impl Seen {
    pub(crate) fn new(peer: SocketAddr) -> Self {
        // A socket of both families shows an IPv4 client by an IPv4-mapped address.
        let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
        // Kubelet gives every container the pod's name as its host name, and containerd exports it.
        let pod = std::env::var("HOSTNAME").unwrap_or_default();
        Self { peer, pod }
    }
}
