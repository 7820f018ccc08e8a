//! The proxies of all nodes, as the controller sees them: clients of discovery, each with its own connection and token.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::{Api, Client};
use mesh_tests::certificate_api::endpoint;
use mesh_tests::cluster::SYSTEM;
use prost::bytes::Bytes;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Request;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};

use crate::changes::Number;
use crate::wire::{self, Slim, Told};

/// Between two tries to connect.
const RETRY: Duration = Duration::from_secs(1);

/// Where the controller is, and its roots.
#[derive(Clone, Debug)]
pub(crate) struct Server {
    endpoint: Endpoint,
}

/// The clients, and what they were told.
#[derive(Clone, Debug)]
pub(crate) struct Fleet(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    server: Server,
    tokens: Vec<String>,
    /// The change that each pod is known by.
    expected: RwLock<HashMap<String, Number>>,
    arrivals: Vec<Mutex<Vec<(Number, Instant)>>>,
    /// Resources that each client was told of, and whether it was told anything.
    told: Vec<(AtomicUsize, AtomicUsize)>,
    /// What the first client has, name by name; all others have the same.
    has: Mutex<HashMap<String, String>>,
    last_error: Mutex<Option<String>>,
}

/// Clients that are connected, or try to be.
#[derive(Debug)]
pub(crate) struct Clients(JoinSet<()>);

impl Server {
    /// The controller's roots are those that it publishes.
    pub(crate) async fn of(client: &Client, address: SocketAddr) -> Result<Self> {
        let maps = Api::<ConfigMap>::namespaced(client.clone(), SYSTEM);
        let map = maps.get("ambit-ca-root").await.context("the roots")?;
        let data = map.data.unwrap_or_default();
        let roots = data.get("root-cert.pem").context("no root-cert.pem")?;
        let endpoint = endpoint(&address.to_string(), roots)?;
        Ok(Self { endpoint })
    }
}

impl Clients {
    /// Closes every connection.
    pub(crate) async fn disconnect(mut self) {
        self.0.shutdown().await;
    }
}

impl Fleet {
    pub(crate) fn new(server: Server, tokens: Vec<String>) -> Self {
        let each = || tokens.iter();
        Self(Arc::new(Shared {
            server,
            expected: RwLock::default(),
            arrivals: each().map(|_| Mutex::default()).collect(),
            told: each().map(|_| Default::default()).collect(),
            has: Mutex::default(),
            last_error: Mutex::default(),
            tokens,
        }))
    }

    /// All connect at once, new or with what they have.
    pub(crate) fn join(&self, has: Option<HashMap<String, String>>) -> Clients {
        let first = wire::first(has.unwrap_or_default());
        let mut clients = JoinSet::new();
        for index in 0..self.0.tokens.len() {
            let (shared, first) = (self.0.clone(), first.clone());
            clients.spawn(async move {
                loop {
                    let ended = shared.follow(index, first.clone()).await;
                    if let Err(error) = ended {
                        *lock(&shared.last_error) = Some(format!("{error:#}"));
                    }
                    tokio::time::sleep(RETRY).await;
                }
            });
        }
        Clients(clients)
    }

    /// From now on it is noted when each client is told of this pod.
    pub(crate) fn expect(&self, change: Number, uid: &str) {
        let expected = self.0.expected.write();
        let mut expected = expected.unwrap_or_else(PoisonError::into_inner);
        expected.insert(uid.to_owned(), change);
    }

    /// When each client was told of each change.
    pub(crate) fn arrivals(&self) -> Vec<Vec<(Number, Instant)>> {
        self.0
            .arrivals
            .iter()
            .map(|one| lock(one).clone())
            .collect()
    }

    /// What the clients have.
    pub(crate) fn versions(&self) -> Option<HashMap<String, String>> {
        let has = lock(&self.0.has).clone();
        (!has.is_empty()).then_some(has)
    }

    /// Counts what is told anew.
    pub(crate) fn forget(&self) {
        for (resources, responses) in &self.0.told {
            resources.store(0, Ordering::Relaxed);
            responses.store(0, Ordering::Relaxed);
        }
    }

    /// Resources that all clients together were told of.
    pub(crate) fn told(&self) -> usize {
        let told = self.0.told.iter();
        told.map(|(resources, _)| resources.load(Ordering::Relaxed))
            .sum()
    }

    /// Waits until every client was told of so many resources.
    pub(crate) async fn wait_told(&self, resources: usize, patience: Duration) -> Result<()> {
        let known =
            |(told, _): &(AtomicUsize, AtomicUsize)| told.load(Ordering::Relaxed) >= resources;
        self.wait("know everything", known, patience).await
    }

    /// Waits until every client was told something, even if it is nothing.
    pub(crate) async fn wait_answered(&self, patience: Duration) -> Result<()> {
        let answered =
            |(_, responses): &(AtomicUsize, AtomicUsize)| responses.load(Ordering::Relaxed) > 0;
        self.wait("have an answer", answered, patience).await
    }

    /// Waits until nobody is told anything any more.
    pub(crate) async fn wait_quiet(&self, patience: Duration) -> Result<()> {
        const QUIET: Duration = Duration::from_secs(5);
        let start = Instant::now();
        let mut before = None;
        while before != Some(self.told()) {
            if start.elapsed() > patience {
                bail!("clients are told without an end");
            }
            before = Some(self.told());
            tokio::time::sleep(QUIET).await;
        }
        Ok(())
    }

    async fn wait(
        &self,
        what: &str,
        is_done: impl Fn(&(AtomicUsize, AtomicUsize)) -> bool,
        patience: Duration,
    ) -> Result<()> {
        let start = Instant::now();
        loop {
            let all = self.0.told.len();
            let done = self.0.told.iter().filter(|one| is_done(one)).count();
            if done == all {
                return Ok(());
            }
            if start.elapsed() > patience {
                let (least, error) = (
                    self.0
                        .told
                        .iter()
                        .map(|(told, _)| told.load(Ordering::Relaxed))
                        .min(),
                    lock(&self.0.last_error).clone(),
                );
                bail!(
                    "{done} of {all} clients {what}; the least has {least:?} resources; last error: {error:?}"
                );
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

impl Shared {
    /// One client's stream, to its end.
    async fn follow(&self, index: usize, first: Bytes) -> Result<()> {
        let channel = self.server.endpoint.connect().await.context("connect")?;
        let (requests, stream) = mpsc::channel(4);
        requests.send(first).await?;
        let mut request = Request::new(ReceiverStream::new(stream));
        let bearer = format!("Bearer {}", self.tokens[index]).parse()?;
        request.metadata_mut().insert("authorization", bearer);
        let mut grpc: Grpc<Channel> = Grpc::new(channel);
        grpc.ready().await?;
        let path = PathAndQuery::from_static(wire::PATH);
        let answer = grpc.streaming(request, path, Slim).await?;
        let mut responses = answer.into_inner();
        while let Some(told) = responses.message().await? {
            let nonce = self.take(index, told);
            requests.send(wire::acknowledgement(nonce)).await?;
        }
        bail!("the controller ended the stream")
    }

    /// Notes what a client is told; the nonce to acknowledge it with.
    fn take(&self, index: usize, told: Told) -> String {
        let now = Instant::now();
        let names = told.resources.iter().map(|one| &one.name);
        {
            let expected = self.expected.read().unwrap_or_else(PoisonError::into_inner);
            let all = names.chain(&told.removed);
            let arrived = all.filter_map(|name| Some((*expected.get(name)?, now)));
            lock(&self.arrivals[index]).extend(arrived);
        }
        let (resources, responses) = &self.told[index];
        resources.fetch_add(told.resources.len(), Ordering::Relaxed);
        responses.fetch_add(1, Ordering::Relaxed);
        if index == 0 {
            let mut has = lock(&self.has);
            for name in &told.removed {
                has.remove(name);
            }
            has.extend(
                told.resources
                    .into_iter()
                    .map(|one| (one.name, one.version)),
            );
        }
        told.nonce
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
