//! The socket on which the node's proxy says hello. One connection is one session.
//!
//! ```text
//!  accept ─▶ peer is root ─▶ hello: frame + descriptor ─▶ admit: pod, namespace ─▶ Attached
//!         Configure ◀── roster          Report ──▶ Reported          end ──▶ Detached
//! ```

mod admit;
pub(crate) mod frame;
mod hello;

use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crds::reasons;
use futures::{SinkExt, StreamExt};
use protocol::node::{AgentMessage, Configure, Report, agent_message, proxy_message};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, watch};

use crate::failure::{Complaint, chain};
use crate::roster::{Session, SessionEvent, SessionId};

use admit::Admitted;
pub(crate) use admit::{Doorman, Expected};

/// Connections at a time: a node has one proxy, two while one takes over from the other.
const MAX_SESSIONS: usize = 16;

/// How long a peer may take to say hello.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);

/// The socket could not be opened.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BindError {
    /// Something else is there.
    #[error("{} is there and is no socket: remove it", .0.display())]
    Occupied(PathBuf),
    /// The system said no.
    #[error("listen on {}: mount its folder writable from the host", .0.display())]
    Listen(PathBuf, #[source] io::Error),
}

/// A conversation that ended before it was let in, or that broke.
#[derive(Debug, thiserror::Error)]
enum SessionError {
    #[error("ask the socket who the peer is")]
    Peer(#[source] io::Error),
    #[error("the peer runs as user {0}, not as root")]
    NotRoot(u32),
    #[error("the peer did not say hello within {HELLO_TIMEOUT:?}")]
    Silent,
    #[error(transparent)]
    Hello(#[from] hello::HelloError),
    #[error(transparent)]
    Admit(#[from] admit::Rejection),
    #[error("read from the proxy")]
    Read(#[source] io::Error),
    #[error(transparent)]
    Frame(#[from] frame::FrameError),
    #[error("write to the proxy")]
    Write(#[source] io::Error),
}

impl SessionError {
    fn complaint(&self) -> Complaint {
        match self {
            Self::Admit(rejection) => rejection.complaint(),
            other => Complaint {
                reason: reasons::PROXY_REJECTED,
                message: chain(other),
            },
        }
    }
}

/// Opens the socket, in the place of one that an earlier agent left.
pub(crate) fn bind(path: &Path) -> Result<UnixListener, BindError> {
    let failed = |error| BindError::Listen(path.to_owned(), error);
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => {
            std::fs::remove_file(path).map_err(failed)?;
        }
        Ok(_) => return Err(BindError::Occupied(path.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(failed)?;
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
    Ok(listener)
}

/// Lets proxies in, for ever.
pub(crate) async fn serve(
    listener: UnixListener,
    doorman: Arc<Doorman>,
    events: mpsc::Sender<SessionEvent>,
) {
    let places = Arc::new(Semaphore::new(MAX_SESSIONS));
    let mut next: SessionId = 1;
    loop {
        let Ok(place) = places.clone().acquire_owned().await else {
            return;
        };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Mostly: no descriptors left; they come back.
                tracing::warn!("accept a proxy: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (doorman, events, id) = (doorman.clone(), events.clone(), next);
        next += 1;
        tokio::spawn(async move {
            let _place = place;
            talk(stream, id, &doorman, &events).await;
        });
    }
}

async fn talk(
    stream: UnixStream,
    id: SessionId,
    doorman: &Doorman,
    events: &mpsc::Sender<SessionEvent>,
) {
    let (tell, told) = watch::channel(None);
    let admitted = match admit(&stream, doorman, events).await {
        Ok(Admitted {
            identity,
            netns,
            slot,
        }) => Session::new(id, identity, netns, slot, tell),
        Err(error) => {
            let why = error.complaint();
            tracing::warn!(
                reason = why.reason,
                why = why.message,
                "a peer on the agent's socket is turned away"
            );
            // The agent ends when nobody receives any more.
            let _ = events.send(SessionEvent::Rejected(why)).await;
            return;
        }
    };
    let pod = admitted.identity.pod_name.clone();
    tracing::info!(
        pod,
        version = admitted.identity.version,
        "the proxy is attached"
    );
    if events.send(SessionEvent::Attached(admitted)).await.is_err() {
        return;
    }
    match converse(stream, id, told, events).await {
        Ok(()) => tracing::info!(pod, "the proxy is gone"),
        Err(error) => tracing::warn!(pod, "the proxy's connection broke: {}", chain(&error)),
    }
    let _ = events.send(SessionEvent::Detached(id)).await;
}

async fn admit(
    stream: &UnixStream,
    doorman: &Doorman,
    events: &mpsc::Sender<SessionEvent>,
) -> Result<Admitted, SessionError> {
    // The peer's process id is that of another pid namespace and says nothing here.
    let user = stream.peer_cred().map_err(SessionError::Peer)?.uid();
    if user != 0 {
        return Err(SessionError::NotRoot(user));
    }
    let (hello, descriptor) = tokio::time::timeout(HELLO_TIMEOUT, hello::receive(stream))
        .await
        .map_err(|_| SessionError::Silent)??;
    let waiting = |unanswered: admit::Rejection| {
        let why = unanswered.complaint();
        tracing::warn!(why = why.message, "a peer cannot be checked yet");
        // It is said again if the queue is full now.
        let _ = events.try_send(SessionEvent::Rejected(why));
    };
    Ok(doorman.admit(hello, descriptor, waiting).await?)
}

async fn converse(
    stream: UnixStream,
    id: SessionId,
    mut told: watch::Receiver<Option<Arc<Configure>>>,
    events: &mpsc::Sender<SessionEvent>,
) -> Result<(), SessionError> {
    let mut frames = frame::framed(stream);
    loop {
        tokio::select! {
            received = frames.next() => {
                let Some(bytes) = received.transpose().map_err(SessionError::Read)? else { return Ok(()) };
                let report = report(frame::decode(&bytes)?);
                if let Some(report) = report
                    && events.send(SessionEvent::Reported(id, report)).await.is_err()
                {
                    return Ok(());
                }
            }
            changed = told.changed() => {
                // The roster has let the session go.
                if changed.is_err() { return Ok(()) }
                let configure = told.borrow_and_update().clone();
                if let Some(configure) = configure {
                    let message = agent_message::Message::Configure(Configure::clone(&configure));
                    let message = AgentMessage { message: Some(message) };
                    frames.send(frame::encode(&message)).await.map_err(SessionError::Write)?;
                }
            }
        }
    }
}

/// A second hello says nothing new, a message of a later version nothing that is understood.
fn report(message: Option<proxy_message::Message>) -> Option<Report> {
    match message {
        Some(proxy_message::Message::Report(report)) => Some(report),
        Some(proxy_message::Message::Hello(_)) | None => None,
    }
}
