//! The way to the node's agent: says hello, does what it tells, and reports.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use hbone::certificates::CertificateSource;
use hbone::identity::TrustDomain;
use hbone::{Server, Shared};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use prost::Message;
use protocol::node::{AgentMessage, Configure, Hello, ProxyMessage, Report};
use protocol::node::{agent_message, proxy_message};
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio_util::codec::{Framed, LengthDelimitedCodec};

use crate::configuration::{self, Bound, Configuration};

/// Longest message: far more than the workloads of any node.
const LONGEST_MESSAGE: usize = 8 << 20;
const RETRY: Duration = Duration::from_millis(500);
/// How often what nobody may use any more is looked for.
const SWEEP: Duration = Duration::from_secs(1);

/// A conversation with the agent that ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AgentError {
    #[error("connect to the agent at {}: is ambit-node-agent running on this node?", .0.display())]
    Connect(PathBuf, #[source] io::Error),
    #[error("open this process's network namespace")]
    Namespace(#[source] io::Error),
    #[error("say hello to the agent")]
    Hello(#[source] io::Error),
    #[error("read from the agent")]
    Read(#[source] io::Error),
    #[error("a message of the agent")]
    Message(#[from] prost::DecodeError),
    #[error("report to the agent")]
    Report(#[source] io::Error),
    #[error("the agent closed the connection")]
    Closed,
}

/// Does what the agent of this node tells.
pub(crate) struct Agent<S> {
    socket: PathBuf,
    hello: Hello,
    trust_domain: TrustDomain,
    shared: Arc<Shared>,
    server: Arc<Server>,
    signer: Arc<S>,
    serving: watch::Sender<bool>,
    configuration: Option<Configuration>,
    bound: Bound,
}

impl<S: CertificateSource> Agent<S> {
    pub(crate) fn new(
        socket: PathBuf,
        hello: Hello,
        trust_domain: TrustDomain,
        (shared, server, signer): (Arc<Shared>, Arc<Server>, Arc<S>),
    ) -> Self {
        Self {
            socket,
            hello,
            trust_domain,
            shared,
            server,
            signer,
            serving: watch::Sender::new(false),
            configuration: None,
            bound: Bound::new(),
        }
    }

    /// Whether a configuration came and all of its listeners are bound.
    pub(crate) fn serving(&self) -> watch::Receiver<bool> {
        self.serving.subscribe()
    }

    /// Talks to the agent, again and again. While it is away, its last word counts.
    pub(crate) async fn run(mut self) {
        loop {
            match self.talk().await {
                Ok(()) | Err(AgentError::Closed) => tracing::info!("the agent is gone"),
                Err(error) => tracing::warn!("{:#}", anyhow::Error::from(error)),
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    async fn talk(&mut self) -> Result<(), AgentError> {
        let stream = say_hello(&self.socket, &self.hello)?;
        let stream = UnixStream::from_std(stream).map_err(AgentError::Hello)?;
        let codec = LengthDelimitedCodec::builder()
            .max_frame_length(LONGEST_MESSAGE)
            .new_codec();
        let mut messages = Framed::new(stream, codec);
        let mut certificates = self.shared.certificates.changes();
        let mut sweep = tokio::time::interval(SWEEP);
        let mut told: Option<Report> = None;
        tracing::info!(socket = %self.socket.display(), "the agent is here");
        loop {
            tokio::select! {
                message = messages.next() => {
                    let bytes = message.ok_or(AgentError::Closed)?.map_err(AgentError::Read)?;
                    if let Some(agent_message::Message::Configure(configure)) =
                        AgentMessage::decode(bytes)?.message
                    {
                        self.configure(configure);
                    }
                }
                // Never an error: the sender is in `shared`.
                _ = certificates.changed() => {}
                // Also: a certificate has expired.
                _ = sweep.tick() => self.shared.sweep(),
            }
            let report = self.report();
            if report.is_some() && report != told {
                let message = ProxyMessage {
                    message: report.clone().map(proxy_message::Message::Report),
                };
                let bytes = Bytes::from(message.encode_to_vec());
                messages.send(bytes).await.map_err(AgentError::Report)?;
                told = report;
            }
        }
    }

    fn configure(&mut self, configure: Configure) {
        let configuration = configuration::parse(configure, &self.trust_domain);
        let shared = &self.shared;
        shared.set_local_by_tunnel(configuration.local_by_tunnel);
        shared
            .local
            .store(Arc::new(configuration.workloads.clone()));
        shared
            .certificates
            .want(&configuration.workloads.identities(), &self.signer);
        let results = self.server.listen(&configuration.listeners).into_iter();
        self.bound = results
            .map(|(listener, result)| (listener, result.err().map(|error| error.to_string())))
            .collect();
        shared.sweep();
        self.serving.send_replace(
            !configuration.listeners.is_empty() && self.bound.values().all(Option::is_none),
        );
        self.configuration = Some(configuration);
    }

    fn report(&self) -> Option<Report> {
        let configuration = self.configuration.as_ref()?;
        Some(configuration::report(
            configuration,
            &self.bound,
            &self.shared.certificates.states(),
            SystemTime::now(),
        ))
    }
}

/// Connects and hands over this process's network namespace with the first message.
fn say_hello(socket: &Path, hello: &Hello) -> Result<StdUnixStream, AgentError> {
    let stream = StdUnixStream::connect(socket)
        .map_err(|error| AgentError::Connect(socket.to_owned(), error))?;
    let namespace = std::fs::File::open("/proc/self/ns/net").map_err(AgentError::Namespace)?;
    let message = ProxyMessage {
        message: Some(proxy_message::Message::Hello(hello.clone())),
    }
    .encode_to_vec();
    // Two names and a version: its length always fits.
    let length = u32::try_from(message.len())
        .unwrap_or(u32::MAX)
        .to_be_bytes();
    let descriptors = [namespace.as_fd().as_raw_fd()];
    let sent = sendmsg::<()>(
        stream.as_raw_fd(),
        &[IoSlice::new(&length), IoSlice::new(&message)],
        &[ControlMessage::ScmRights(&descriptors)],
        MsgFlags::empty(),
        None,
    )
    .map_err(|errno| AgentError::Hello(errno.into()))?;
    if sent != length.len() + message.len() {
        return Err(AgentError::Hello(io::ErrorKind::WriteZero.into()));
    }
    stream.set_nonblocking(true).map_err(AgentError::Hello)?;
    Ok(stream)
}
