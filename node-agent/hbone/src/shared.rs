//! What every connection of a proxy reads.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use arc_swap::ArcSwap;
use prometheus_client::registry::Registry;
use tokio_util::sync::CancellationToken;

use crate::certificates::Certificates;
use crate::directory::Directory;
use crate::identity::TrustDomain;
use crate::local::LocalWorkloads;
use crate::metrics::Metrics;
use crate::pool::Pool;

/// What a proxy is told at its start.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Trust domain of every identity here.
    pub trust_domain: TrustDomain,
    /// The proxy's own address: a connection to it did not come by redirection.
    pub own_address: Option<IpAddr>,
    /// Name of the cluster, for telemetry.
    pub cluster: String,
}

/// Snapshots, certificates and the pool.
#[derive(Debug)]
pub struct Shared {
    /// What was told at the start.
    pub settings: Settings,
    /// What the mesh knows.
    pub directory: ArcSwap<Directory>,
    /// The pods of this node.
    pub local: ArcSwap<LocalWorkloads>,
    /// Their certificates.
    pub certificates: Arc<Certificates>,
    pub(crate) metrics: Metrics,
    pub(crate) pool: Pool,
    local_by_tunnel: AtomicBool,
    drain: CancellationToken,
}

impl Shared {
    /// Nothing is known yet.
    #[must_use]
    pub fn new(settings: Settings, registry: &mut Registry) -> Arc<Self> {
        Arc::new(Self {
            settings,
            directory: ArcSwap::default(),
            local: ArcSwap::default(),
            certificates: Arc::default(),
            metrics: Metrics::register(registry),
            pool: Pool::default(),
            local_by_tunnel: AtomicBool::new(false),
            drain: CancellationToken::new(),
        })
    }

    /// Two pods of this node talk through a tunnel, as across nodes, instead of directly.
    pub fn set_local_by_tunnel(&self, by_tunnel: bool) {
        self.local_by_tunnel.store(by_tunnel, Ordering::Relaxed);
    }

    pub(crate) fn local_by_tunnel(&self) -> bool {
        self.local_by_tunnel.load(Ordering::Relaxed)
    }

    pub(crate) fn drain(&self) {
        self.drain.cancel();
    }

    /// Ends when the proxy is to end.
    pub(crate) async fn draining(&self) {
        self.drain.cancelled().await;
    }

    /// Closes connections to other proxies that nobody uses or may use any more.
    pub fn sweep(&self) {
        let (local, directory) = (self.local.load(), self.directory.load());
        self.pool.sweep(Instant::now(), |key| {
            let known =
                directory.has_workload(&key.destination) || local.get(&key.destination).is_some();
            local.get(&key.source).is_some() && known
        });
    }

    /// Number of open connections to other proxies.
    #[must_use]
    pub fn tunnels(&self) -> usize {
        self.pool.len()
    }
}
