//! The node's agent, over its Unix socket: we hand over our network namespace, it says what to do,
//! we tell how far we are.
//!
//! ```text
//!  connect ─▶ Hello + descriptor ─▶ ┌ Configure ─▶ parse ─▶ apply ┐
//!     ▲                             └ certificate or listener changed ─▶ Report ┘
//!     └──────── backoff ◀─── closed; what was applied stays in force
//! ```

pub(crate) mod configuration;
mod hello;
mod report;

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use bytes::BytesMut;
use futures::{SinkExt, StreamExt};
use hbone::local::LocalWorkloads;
use hbone::serve::Listener;
use hbone::{Server, Shared, with_causes};
use prost::Message;
use protocol::node::agent_message::Message as FromAgent;
use protocol::node::proxy_message::Message as ToAgent;
use protocol::node::{AgentMessage, Configure, Hello, ProxyMessage, Report};
use rand::Rng;
use tokio::net::UnixStream;
use tokio_util::codec::{Framed, LengthDelimitedCodec};

use configuration::Configuration;

use crate::signer::Signer;
use crate::status::{Phase, Status};

/// Largest message of the agent in bytes: some hundred thousand pods.
const LARGEST_MESSAGE: usize = 16 << 20;
/// How often what nothing tells about is looked at: expiry, and ports that were taken.
const LOOK_EVERY: Duration = Duration::from_secs(1);
const RECONNECT_AT_MOST: Duration = Duration::from_secs(2);

/// A conversation with the agent that ended.
#[derive(Debug, thiserror::Error)]
enum AgentError {
    #[error("connect to the agent at {}", .0.display())]
    Connect(PathBuf, #[source] io::Error),
    #[error("say hello to the agent")]
    Hello(#[source] hello::HelloError),
    #[error("exchange messages with the agent")]
    Exchange(#[from] io::Error),
    #[error("the agent's message cannot be read")]
    Decode(#[from] prost::DecodeError),
    #[error("the agent closed the connection")]
    Closed,
}

/// What the agent steers.
pub(crate) struct Agent {
    pub(crate) socket: PathBuf,
    pub(crate) hello: Hello,
    pub(crate) shared: Arc<Shared>,
    pub(crate) server: Arc<Server>,
    pub(crate) signer: Arc<Signer>,
    pub(crate) status: Arc<Status>,
}

/// What the agent said last, and how far the listeners got.
struct Applied {
    configuration: Configuration,
    listeners: Listeners,
}

/// Whether each listener is bound.
type Listeners = BTreeMap<Listener, Result<(), io::Error>>;

impl Agent {
    /// Talks with the agent for ever.
    pub(crate) async fn run(self) {
        let mut wait = Duration::ZERO;
        let mut applied = None;
        loop {
            let Err(error) = self.converse(&mut applied).await;
            let was_configured = self.status.configured.swap(false, Ordering::Relaxed);
            tracing::warn!(
                error = with_causes(&error),
                "no agent; what it said last stays in force"
            );
            wait = if was_configured {
                Duration::from_millis(50)
            } else {
                (wait * 2).clamp(Duration::from_millis(50), RECONNECT_AT_MOST)
            };
            let jitter = rand::rng().random_range(0.8..1.2);
            tokio::time::sleep(wait.mul_f64(jitter)).await;
        }
    }

    async fn converse(
        &self,
        applied: &mut Option<Applied>,
    ) -> Result<std::convert::Infallible, AgentError> {
        let mut stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|error| AgentError::Connect(self.socket.clone(), error))?;
        let message = encode(ToAgent::Hello(self.hello.clone()));
        let said = hello::send(&mut stream, &message).await;
        said.map_err(AgentError::Hello)?;
        let codec = LengthDelimitedCodec::builder()
            .max_frame_length(LARGEST_MESSAGE)
            .new_codec();
        let mut messages = Framed::new(stream, codec);
        let mut certificates = self.shared.certificates.changes();
        let mut discovered = self.shared.discovered();
        let mut phase = self.status.phase.subscribe();
        let mut look = tokio::time::interval(LOOK_EVERY);
        let mut reported: Option<Report> = None;
        let mut configured = false;
        loop {
            tokio::select! {
                message = messages.next() => {
                    let message = message.ok_or(AgentError::Closed)??;
                    if let Some(configure) = decode(message)? {
                        let trust_domain = &self.shared.settings.trust_domain;
                        let configuration = Configuration::parse(trust_domain, configure);
                        *applied = Some(self.apply(configuration));
                        configured = true;
                        reported = None;
                    }
                }
                // These three can only end together with the process.
                _ = certificates.changed() => {}
                _ = discovered.changed() => {}
                _ = phase.changed() => self.listen_again(applied),
                _ = look.tick() => {
                    self.listen_again(applied);
                    self.let_go();
                }
            }
            let Some(applied) = applied.as_ref().filter(|_| configured) else {
                continue;
            };
            self.status.configured.store(true, Ordering::Relaxed);
            let report = self.report(applied);
            if reported.as_ref() != Some(&report) {
                let message = encode(ToAgent::Report(report.clone()));
                messages.send(message.freeze()).await?;
                reported = Some(report);
            }
        }
    }

    fn apply(&self, configuration: Configuration) -> Applied {
        tracing::info!(
            generation = configuration.generation,
            workloads = configuration.workloads.iter().count(),
            "configured by the agent"
        );
        for (uid, error) in &configuration.refused {
            tracing::warn!(
                uid,
                error,
                "a workload that the agent named cannot be served"
            );
        }
        let workloads = LocalWorkloads::clone(&configuration.workloads);
        self.serve(workloads.after(&self.shared.local.load(), Instant::now()));
        self.shared
            .set_local_by_tunnel(configuration.local_by_tunnel);
        self.shared.sweep();
        if let Some(active) = configuration.active {
            self.status.active.send_replace(active);
        }
        let listeners = self.listen(&configuration);
        Applied {
            configuration,
            listeners,
        }
    }

    fn serve(&self, workloads: LocalWorkloads) {
        let identities = workloads.identities();
        self.shared.local.store(Arc::new(workloads));
        self.shared.certificates.want(&identities, &self.signer);
    }

    /// Whoever left the mesh some time ago is no longer served.
    fn let_go(&self) {
        if let Some(rest) = self.shared.local.load().without_expired(Instant::now()) {
            self.serve(rest);
        }
    }

    fn listen(&self, configuration: &Configuration) -> Listeners {
        let listeners = self.server.listen(&configuration.listeners);
        let all = listeners.values().all(Result::is_ok);
        self.status.listening.store(all, Ordering::Relaxed);
        listeners
    }

    /// Tries ports again that were taken, and says when all are closed for good.
    fn listen_again(&self, applied: &mut Option<Applied>) {
        let Some(applied) = applied else {
            return;
        };
        let closed = *self.status.phase.borrow() == Phase::Draining;
        if closed || applied.listeners.values().any(Result::is_err) {
            applied.listeners = self.listen(&applied.configuration);
        }
    }

    fn report(&self, applied: &Applied) -> Report {
        let states = self.shared.certificates.states();
        let discovered = *self.shared.discovered().borrow();
        let ending = *self.status.phase.borrow() != Phase::Serving;
        let Applied {
            configuration,
            listeners,
        } = applied;
        let report = report::build(
            configuration,
            listeners,
            &states,
            discovered,
            SystemTime::now(),
        );
        Report { ending, ..report }
    }
}

fn encode(message: ToAgent) -> BytesMut {
    let message = ProxyMessage {
        message: Some(message),
    };
    BytesMut::from(&*message.encode_to_vec())
}

fn decode(message: BytesMut) -> Result<Option<Configure>, prost::DecodeError> {
    // A newer agent may say something else.
    let message = AgentMessage::decode(message)?.message;
    Ok(message.map(|FromAgent::Configure(configure)| configure))
}
