//! Connections to other proxies, shared by the streams of one pair of workloads.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::client::SendRequest;

use crate::tunnel::OPENED_STREAMS;

/// A connection without streams is closed after this long.
const IDLE: Duration = Duration::from_secs(300);

/// Who a connection is for. Streams of different workloads never share one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub(crate) source: Arc<str>,
    pub(crate) destination: Arc<str>,
    pub(crate) address: SocketAddr,
}

/// An open connection.
#[derive(Debug)]
pub(crate) struct Connection {
    send: SendRequest<Bytes>,
    streams: AtomicUsize,
    closed: AtomicBool,
    last_used: Mutex<Instant>,
}

/// The right to one stream of a connection; given back when dropped.
#[derive(Debug)]
pub(crate) struct Lease(Arc<Connection>);

/// The connections of one key. The lock is held while one is being made: one at a time.
type Entry = Arc<tokio::sync::Mutex<Vec<Arc<Connection>>>>;

/// All connections.
#[derive(Debug, Default)]
pub(crate) struct Pool {
    entries: Mutex<HashMap<Key, Entry>>,
}

impl Connection {
    pub(crate) fn new(send: SendRequest<Bytes>) -> Arc<Self> {
        Arc::new(Self {
            send,
            streams: AtomicUsize::new(0),
            closed: AtomicBool::new(false),
            last_used: Mutex::new(Instant::now()),
        })
    }

    /// No more streams are opened on it.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }

    fn lease(self: &Arc<Self>) -> Option<Lease> {
        if self.closed.load(Ordering::Acquire) {
            return None;
        }
        let limit = OPENED_STREAMS.min(self.send.current_max_send_streams());
        let take = |streams| (streams < limit).then_some(streams + 1);
        self.streams
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, take)
            .ok()?;
        Some(Lease(self.clone()))
    }

    fn is_idle(&self, now: Instant) -> bool {
        let last_used = *self
            .last_used
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        self.streams.load(Ordering::Acquire) == 0 && now.duration_since(last_used) > IDLE
    }
}

impl Lease {
    pub(crate) fn send(&self) -> SendRequest<Bytes> {
        self.0.send.clone()
    }

    /// The connection turned out to be broken.
    pub(crate) fn close(&self) {
        self.0.close();
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        *self
            .0
            .last_used
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Instant::now();
        self.0.streams.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Pool {
    /// A stream's place on an open connection, or on one that `connect` makes.
    pub(crate) async fn lease<E>(
        &self,
        key: &Key,
        connect: impl AsyncFnOnce() -> Result<Arc<Connection>, E>,
    ) -> Result<Lease, E> {
        let entry = self.entry(key);
        let mut connections = entry.lock().await;
        connections.retain(|connection| !connection.closed.load(Ordering::Acquire));
        if let Some(lease) = connections.iter().find_map(Connection::lease) {
            return Ok(lease);
        }
        let connection = connect().await?;
        // Nobody else has it yet, so there is room on it.
        connection.streams.fetch_add(1, Ordering::AcqRel);
        connections.push(connection.clone());
        Ok(Lease(connection))
    }

    fn entry(&self, key: &Key) -> Entry {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.entry(key.clone()).or_default().clone()
    }

    /// Forgets what is not used, and what `keep` says no to; streams in use go on to their end.
    pub(crate) fn sweep(&self, now: Instant, keep: impl Fn(&Key) -> bool) {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.retain(|key, entry| {
            if !keep(key) {
                return false;
            }
            let Ok(mut connections) = entry.try_lock() else {
                return true;
            };
            connections.retain(|connection| {
                !connection.closed.load(Ordering::Acquire) && !connection.is_idle(now)
            });
            !connections.is_empty() || Arc::strong_count(entry) > 1
        });
    }

    /// Number of open connections.
    pub(crate) fn len(&self) -> usize {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries
            .values()
            .filter_map(|entry| entry.try_lock().ok().map(|all| all.len()))
            .sum()
    }
}
