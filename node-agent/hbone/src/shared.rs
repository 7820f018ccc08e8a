//! What every connection of a proxy reads.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use prometheus_client::registry::Registry;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::certificates::Certificates;
use crate::directory::Directory;
use crate::identity::TrustDomain;
use crate::local::{LocalWorkload, LocalWorkloads};
use crate::metrics::Metrics;
use crate::pool::Pool;
use crate::socket::{self, DialError};

/// How long a connection waits for the first directory.
const DISCOVERY_WAIT: Duration = Duration::from_secs(5);

/// The mesh is not known yet: nobody can say whether the destination is in it, or who may reach it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the mesh is not known yet: nothing came from the controller in {DISCOVERY_WAIT:?}")]
pub(crate) struct NotDiscovered;

/// What a proxy is told at its start.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Trust domain of every identity here.
    pub trust_domain: TrustDomain,
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
    /// Addresses of the proxy itself: a connection to one did not come by redirection, or would
    /// come back to us.
    pub own_addresses: ArcSwap<Vec<IpAddr>>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) pool: Pool,
    discovered: watch::Sender<bool>,
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
            own_addresses: ArcSwap::default(),
            metrics: Metrics::register(registry),
            pool: Pool::default(),
            discovered: watch::Sender::new(false),
            local_by_tunnel: AtomicBool::new(false),
            drain: CancellationToken::new(),
        })
    }

    /// The directory is complete for the first time.
    pub fn set_discovered(&self) {
        self.discovered.send_replace(true);
    }

    /// Tells whether the directory has been complete once.
    #[must_use]
    pub fn discovered(&self) -> watch::Receiver<bool> {
        self.discovered.subscribe()
    }

    /// Waits for the first directory, but not for long.
    pub(crate) async fn wait_discovered(&self) -> Result<(), NotDiscovered> {
        if *self.discovered.borrow() {
            return Ok(());
        }
        let mut discovered = self.discovered.subscribe();
        let complete = discovered.wait_for(|complete| *complete);
        match tokio::time::timeout(DISCOVERY_WAIT, complete).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(NotDiscovered),
        }
    }

    /// The pod of this node that has this address: one in the mesh, or one that has just left it and is known to have
    /// kept its address.
    pub(crate) fn pod_at(&self, address: IpAddr) -> Option<Arc<LocalWorkload>> {
        let local = self.local.load();
        if let Some(pod) = local.at(address) {
            return Some(pod.clone());
        }
        let pod = local.left_at(address, Instant::now())?;
        let directory = self.directory.load();
        let owner = directory.workload_at(address)?;
        (owner.uid == pod.uid).then(|| pod.clone())
    }

    /// Connects a client to a pod of this node. The address may go to another pod while that takes, and who was let in
    /// to the one is not to meet the other.
    pub(crate) async fn dial_pod(
        &self,
        client: IpAddr,
        pod: &LocalWorkload,
        to: SocketAddr,
    ) -> Result<TcpStream, DialError> {
        let stream = socket::dial_pod(client, to).await?;
        if self.is_at(pod, to.ip()) {
            return Ok(stream);
        }
        socket::reset(stream);
        Err(DialError::Moved(to))
    }

    /// Whether a pod of this node still has this address.
    pub(crate) fn is_at(&self, pod: &LocalWorkload, address: IpAddr) -> bool {
        self.pod_at(address).is_some_and(|now| now.uid == pod.uid)
    }

    /// Whether an address belongs to the proxy itself.
    pub(crate) fn is_own(&self, address: IpAddr) -> bool {
        address.is_loopback() || self.own_addresses.load().contains(&address)
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

    pub(crate) fn is_draining(&self) -> bool {
        self.drain.is_cancelled()
    }

    /// Ends when the proxy is to end.
    pub(crate) async fn draining(&self) {
        self.drain.cancelled().await;
    }

    /// Closes connections to other proxies that nobody uses or may use any more.
    pub fn sweep(&self) {
        let (local, directory) = (self.local.load(), self.directory.load());
        self.pool.sweep(Instant::now(), |key| {
            let remote = directory.workload(&key.destination);
            let known = remote.is_some_and(|known| known.hbone.as_ref() == Some(&key.identity));
            let pod = local.get(&key.destination);
            let here = pod.is_some_and(|pod| pod.identity == key.identity);
            local.get(&key.source).is_some() && (known || here)
        });
    }

    /// Number of connections of pods that are open.
    #[must_use]
    pub fn connections(&self) -> i64 {
        self.metrics.open()
    }

    /// Number of connections of pods that have been opened.
    #[must_use]
    pub fn opened(&self) -> u64 {
        self.metrics.opened_so_far()
    }

    /// Number of open connections to other proxies.
    #[must_use]
    pub fn tunnels(&self) -> usize {
        self.pool.len()
    }
}
