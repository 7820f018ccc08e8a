//! Connections to other proxies, shared by the streams of one pair of workloads.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::client::SendRequest;

use crate::connect::ConnectError;
use crate::identity::SpiffeId;
use crate::tunnel::OPENED_STREAMS;

/// A connection without streams is closed after this long.
const IDLE: Duration = Duration::from_secs(300);

/// Who a connection is for. Streams of different workloads never share one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub(crate) source: Arc<str>,
    pub(crate) destination: Arc<str>,
    /// Whom the other side has proved to be: some control planes give a name to one pod after another.
    pub(crate) identity: SpiffeId,
    pub(crate) address: SocketAddr,
}

/// An open connection. It is closed when nobody refers to it any more.
#[derive(Debug)]
pub(crate) struct Connection {
    send: SendRequest<Bytes>,
    streams: AtomicUsize,
    closed: AtomicBool,
    last_used: Mutex<Instant>,
}

/// The right to one stream of a connection; given back when dropped.
#[derive(Debug)]
pub(crate) struct Lease {
    connection: Arc<Connection>,
    /// Whether the connection was made for this lease.
    pub(crate) fresh: bool,
}

/// The connections of one key.
#[derive(Debug, Default)]
struct Entry {
    open: Vec<Arc<Connection>>,
    /// When the last try to open one failed, and why.
    failed: Option<(Instant, Arc<ConnectError>)>,
}

/// All connections. The inner lock is held while a connection is being made: one at a time for a key.
#[derive(Debug, Default)]
pub(crate) struct Pool {
    entries: Mutex<HashMap<Key, Arc<tokio::sync::Mutex<Entry>>>>,
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

    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    fn lease(self: &Arc<Self>, fresh: bool) -> Option<Lease> {
        if self.is_closed() {
            return None;
        }
        let limit = OPENED_STREAMS.min(self.send.current_max_send_streams());
        let take = |streams| (streams < limit).then_some(streams + 1);
        self.streams
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, take)
            .ok()?;
        Some(Lease {
            connection: self.clone(),
            fresh,
        })
    }

    fn is_idle(&self, now: Instant) -> bool {
        let last_used = self.last_used.lock();
        let last_used = *last_used.unwrap_or_else(PoisonError::into_inner);
        self.streams.load(Ordering::Acquire) == 0 && now.duration_since(last_used) > IDLE
    }
}

impl Lease {
    pub(crate) fn send(&self) -> SendRequest<Bytes> {
        self.connection.send.clone()
    }

    /// The connection turned out to be broken, or takes no more streams.
    pub(crate) fn close(&self) {
        self.connection.close();
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let last_used = self.connection.last_used.lock();
        *last_used.unwrap_or_else(PoisonError::into_inner) = Instant::now();
        self.connection.streams.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Pool {
    /// A stream's place on an open connection, or on one that `connect` makes. Whoever waited while
    /// a connection could not be made shares that result, instead of waiting for a try of its own.
    pub(crate) async fn lease(
        &self,
        key: &Key,
        connect: impl AsyncFnOnce() -> Result<Arc<Connection>, ConnectError>,
    ) -> Result<Lease, Arc<ConnectError>> {
        let asked = Instant::now();
        let entry = self.entry(key);
        let mut entry = entry.lock().await;
        entry.open.retain(|connection| !connection.is_closed());
        if let Some(lease) = entry.open.iter().find_map(|open| open.lease(false)) {
            return Ok(lease);
        }
        if let Some((at, error)) = &entry.failed
            && *at > asked
        {
            return Err(error.clone());
        }
        let connected = connect().await;
        let connection = connected.map_err(|error| {
            let error = Arc::new(error);
            entry.failed = Some((Instant::now(), error.clone()));
            error
        })?;
        entry.failed = None;
        // Nobody else has it yet, so there is room on it, whatever the peer allows.
        connection.streams.fetch_add(1, Ordering::AcqRel);
        entry.open.push(connection.clone());
        Ok(Lease {
            connection,
            fresh: true,
        })
    }

    fn entry(&self, key: &Key) -> Arc<tokio::sync::Mutex<Entry>> {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(entry) = entries.get(key) {
            return entry.clone();
        }
        entries.entry(key.clone()).or_default().clone()
    }

    /// Forgets what is not used, and what `keep` says no to; streams in use go on to their end.
    pub(crate) fn sweep(&self, now: Instant, keep: impl Fn(&Key) -> bool) {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.retain(|key, entry| {
            if !keep(key) {
                return false;
            }
            let in_use = Arc::strong_count(entry) > 1;
            let Ok(mut entry) = entry.try_lock() else {
                return true;
            };
            entry
                .open
                .retain(|connection| !connection.is_closed() && !connection.is_idle(now));
            in_use || !entry.open.is_empty()
        });
    }

    /// Number of open connections.
    pub(crate) fn len(&self) -> usize {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries
            .values()
            .filter_map(|entry| entry.try_lock().ok().map(|entry| entry.open.len()))
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::identity::TrustDomain;

    fn key() -> Key {
        Key {
            source: "a".into(),
            destination: "b".into(),
            identity: SpiffeId::new(&TrustDomain::new("td").unwrap(), "shop", "b").unwrap(),
            address: "10.0.0.1:15008".parse().unwrap(),
        }
    }

    /// A connection to a peer that answers nothing.
    async fn connection() -> Arc<Connection> {
        let (ours, theirs) = tokio::io::duplex(1 << 16);
        let (client, server) =
            tokio::join!(h2::client::handshake(ours), h2::server::handshake(theirs));
        let (send, drive) = client.unwrap();
        let mut server = server.unwrap();
        tokio::spawn(drive);
        tokio::spawn(async move { while server.accept().await.is_some() {} });
        Connection::new(send)
    }

    #[tokio::test]
    async fn who_waited_for_a_connection_that_failed_does_not_try_again() {
        let pool = Pool::default();
        let tries = Cell::new(0);
        let fail = async || {
            tries.set(tries.get() + 1);
            tokio::time::sleep(Duration::from_millis(20)).await;
            Err(ConnectError::Timeout(key().address))
        };
        let key = key();
        let (one, two, three) = tokio::join!(
            pool.lease(&key, fail),
            pool.lease(&key, fail),
            pool.lease(&key, fail)
        );
        assert!(one.is_err() && two.is_err() && three.is_err());
        assert_eq!(tries.get(), 1);
        // Whoever comes later tries anew.
        assert!(pool.lease(&key, fail).await.is_err());
        assert_eq!(tries.get(), 2);
    }

    #[tokio::test]
    async fn streams_share_a_connection_until_it_closes() {
        let pool = Pool::default();
        let made = Cell::new(0);
        let connect = async || {
            made.set(made.get() + 1);
            Ok(connection().await)
        };
        let first = pool.lease(&key(), connect).await.unwrap();
        let second = pool.lease(&key(), connect).await.unwrap();
        assert!(first.fresh && !second.fresh);
        second.close();
        let third = pool.lease(&key(), connect).await.unwrap();
        assert!(third.fresh);
        assert_eq!((made.get(), pool.len()), (2, 1));
    }

    #[tokio::test]
    async fn idle_and_unwanted_connections_are_forgotten_but_not_those_in_use() {
        let pool = Pool::default();
        let connect = async || Ok(connection().await);
        let lease = pool.lease(&key(), connect).await.unwrap();
        let later = Instant::now() + IDLE + Duration::from_secs(1);
        pool.sweep(later, |_| true);
        assert_eq!(pool.len(), 1, "it is in use");
        drop(lease);
        pool.sweep(Instant::now(), |_| true);
        assert_eq!(pool.len(), 1, "it was used a moment ago");
        pool.sweep(later, |_| true);
        assert_eq!(pool.len(), 0);
        drop(pool.lease(&key(), connect).await.unwrap());
        pool.sweep(Instant::now(), |_| false);
        assert_eq!(pool.len(), 0);
    }
}
