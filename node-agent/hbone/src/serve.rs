//! The listeners: started and stopped while running, drained at the end.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::task::TaskTracker;

use crate::inbound;
use crate::inbound_plaintext;
use crate::outbound;
use crate::shared::Shared;
use crate::socket;

/// What a listener is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ListenerKind {
    /// Connections of this node's pods.
    Outbound,
    /// HBONE from other proxies.
    Inbound,
    /// Plaintext towards this node's pods.
    InboundPlaintext,
}

/// A wanted listener: what for, and its TCP port.
pub type Listener = (ListenerKind, u16);

/// The listeners of a proxy.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    /// Each with a task for each family.
    running: Mutex<BTreeMap<Listener, Vec<JoinHandle<()>>>>,
    connections: TaskTracker,
}

impl Server {
    /// No listener yet.
    #[must_use]
    pub fn new(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            running: Mutex::default(),
            connections: TaskTracker::new(),
        }
    }

    /// From now on listens on exactly these, or on nothing if the proxy drains; says of each whether
    /// it is bound.
    pub fn listen(&self, wanted: &BTreeSet<Listener>) -> BTreeMap<Listener, Result<(), io::Error>> {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let draining = self.shared.is_draining();
        running.retain(|listener, tasks| {
            let lives = tasks.iter().all(|task| !task.is_finished());
            let keep = wanted.contains(listener) && lives && !draining;
            if !keep {
                tasks.iter().for_each(JoinHandle::abort);
            }
            keep
        });
        let mut results = BTreeMap::new();
        for listener @ (kind, port) in wanted.iter().copied() {
            let result = match running.contains_key(&listener) {
                true => Ok(()),
                false if draining => Err(io::Error::other("the proxy is ending")),
                false => socket::listen(port).map(|sockets| {
                    tracing::info!(?kind, port, ipv6 = sockets.len() > 1, "listening");
                    let accept = |socket| {
                        let (shared, connections) = (self.shared.clone(), self.connections.clone());
                        tokio::spawn(accept(socket, kind, shared, connections))
                    };
                    running.insert(listener, sockets.into_iter().map(accept).collect());
                }),
            };
            results.insert(listener, result);
        }
        results
    }

    /// Stops accepting, asks peers to open no more streams, and waits for what is open, at most for
    /// `limit`; how many connections were cut.
    pub async fn drain(&self, limit: Duration) -> usize {
        self.shared.drain();
        self.listen(&BTreeSet::new());
        self.connections.close();
        // Whoever is left is cut when the process ends.
        match tokio::time::timeout(limit, self.connections.wait()).await {
            Ok(()) => 0,
            Err(_) => self.connections.len(),
        }
    }
}

async fn accept(
    mut listener: TcpListener,
    kind: ListenerKind,
    shared: Arc<Shared>,
    tracker: TaskTracker,
) {
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors, or the client has gone already: neither is for ever.
                tracing::warn!(?kind, %error, "accept");
                if socket::is_ended(&error) {
                    listener = match socket::replace(listener) {
                        Ok(listener) => listener,
                        Err(error) => {
                            tracing::error!(?kind, %error, "listen again");
                            return;
                        }
                    };
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
                continue;
            }
        };
        let shared = shared.clone();
        match kind {
            ListenerKind::Outbound => tracker.spawn(outbound::serve(shared, stream, peer)),
            ListenerKind::InboundPlaintext => {
                tracker.spawn(inbound_plaintext::serve(shared, stream, peer))
            }
            ListenerKind::Inbound => {
                let Ok(destination) = stream.local_addr() else {
                    continue;
                };
                tracker.spawn(inbound::serve_stream(shared, stream, peer, destination))
            }
        };
    }
}
