//! HTTP/2 as HBONE uses it: settings, keepalive, and a CONNECT for each connection.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use h2::client::{self, SendRequest};
use h2::{Ping, PingPong, Reason, RecvStream, SendStream, server};
use http::{Method, Request, StatusCode, Uri};
use tokio::io::{AsyncRead, AsyncWrite};

use crate::authority;
use crate::directory::Workload;
use crate::local::LocalWorkload;

/// Flow-control window of a stream in bytes.
const STREAM_WINDOW: u32 = 4 << 20;
/// Flow-control window of a connection in bytes.
const CONNECTION_WINDOW: u32 = 16 << 20;
/// Largest frame in bytes.
const FRAME: u32 = 1 << 20;
/// Bytes that wait for a stream's window at most, before the socket is no longer read.
const SEND_BUFFER: usize = 1 << 20;
/// Largest header block of an answer in bytes.
const ANSWER_HEADERS: u32 = 16 << 10;
/// Largest header block of a request in bytes.
const REQUEST_HEADERS: u32 = 64 << 10;
/// Streams of one connection that we accept.
const ACCEPTED_STREAMS: u32 = 200;
/// Streams of one connection that we open.
pub(crate) const OPENED_STREAMS: usize = 100;
/// What small DATA frames that wait to be read may cost: some 260,000 of one byte. A chatty
/// connection whose server is slow must not end the others of its tunnel.
const DATA_FRAME_BUDGET: usize = 64 << 20;
/// Time between two pings, and until the first.
const PING_EVERY: Duration = Duration::from_secs(10);
/// A peer that does not answer a ping for this long is gone.
const PING_TIMEOUT: Duration = Duration::from_secs(20);

/// A CONNECT that did not become a tunnel.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TunnelError {
    #[error("CONNECT: {0}")]
    Http2(#[from] h2::Error),
    #[error("CONNECT to {0}: {1}")]
    Request(SocketAddr, #[source] http::Error),
    #[error("the destination's proxy answered {0}")]
    Refused(StatusCode),
}

impl TunnelError {
    /// Whether another connection may do better: the request was not looked at.
    pub(crate) fn is_of_connection(&self) -> bool {
        let Self::Http2(error) = self else {
            return false;
        };
        error.is_io() || error.is_go_away() || error.reason() == Some(Reason::REFUSED_STREAM)
    }
}

/// The client's side of a connection. The returned future drives it and must be polled.
pub(crate) async fn connect<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    stream: S,
) -> Result<(SendRequest<Bytes>, impl Future<Output = ()> + Send), h2::Error> {
    let (send, mut connection) = client::Builder::new()
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME)
        .max_header_list_size(ANSWER_HEADERS)
        .max_send_buffer_size(SEND_BUFFER)
        .initial_max_send_streams(OPENED_STREAMS)
        .data_frame_budget(DATA_FRAME_BUDGET)
        .enable_push(false)
        .handshake::<_, Bytes>(stream)
        .await?;
    let pings = connection.ping_pong();
    let drive = async move {
        tokio::select! {
            ended = connection => {
                if let Err(error) = ended {
                    tracing::debug!(%error, "tunnel ended");
                }
            }
            () = keepalive(pings) => tracing::warn!("tunnel closed: its peer does not answer pings"),
        }
    };
    Ok((send, drive))
}

/// The server's side of a connection.
pub(crate) type ServerConnection<S> = server::Connection<S, Bytes>;

/// Accepts the server's side of a connection.
pub(crate) async fn accept<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
) -> Result<ServerConnection<S>, h2::Error> {
    server::Builder::new()
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME)
        .max_header_list_size(REQUEST_HEADERS)
        .max_send_buffer_size(SEND_BUFFER)
        .max_concurrent_streams(ACCEPTED_STREAMS)
        .data_frame_budget(DATA_FRAME_BUDGET)
        .handshake(stream)
        .await
}

/// Ends when the peer no longer answers.
pub(crate) async fn keepalive(pings: Option<PingPong>) {
    let Some(mut pings) = pings else {
        return std::future::pending().await;
    };
    loop {
        tokio::time::sleep(PING_EVERY).await;
        match tokio::time::timeout(PING_TIMEOUT, pings.ping(Ping::opaque())).await {
            Ok(Ok(_)) => {}
            // The connection is ending by itself, and says why.
            Ok(Err(_)) => return std::future::pending().await,
            Err(_) => return,
        }
    }
}

/// What a CONNECT carries besides its authority.
#[derive(Clone, Debug)]
pub(crate) struct ConnectHeaders {
    pub(crate) baggage: String,
    pub(crate) forwarded: String,
    pub(crate) traceparent: String,
}

/// Who a pod is, for telemetry of the other side.
pub(crate) fn baggage(cluster: &str, pod: &LocalWorkload, known: Option<&Workload>) -> String {
    let mut baggage = format!(
        "k8s.cluster.name={cluster},k8s.namespace.name={}",
        pod.namespace
    );
    let mut add = |key: &str, value: &str| {
        if !value.is_empty() {
            baggage.extend([",", key, "=", value]);
        }
    };
    let Some(known) = known else {
        add("k8s.pod.name", &pod.name);
        return baggage;
    };
    add(
        match known.workload_type {
            "deployment" => "k8s.deployment.name",
            "cronjob" => "k8s.cronjob.name",
            "job" => "k8s.job.name",
            _ => "k8s.pod.name",
        },
        &known.workload_name,
    );
    add("service.name", &known.canonical_name);
    add("service.version", &known.canonical_revision);
    add("cloud.region", &known.locality.region);
    add("cloud.availability_zone", &known.locality.zone);
    baggage
}

/// Opens a tunnel to a pod and its own port on a connection.
pub(crate) async fn open(
    send: SendRequest<Bytes>,
    to: SocketAddr,
    headers: ConnectHeaders,
) -> Result<(SendStream<Bytes>, RecvStream), TunnelError> {
    let request = request(to, headers);
    let request = request.map_err(|error| TunnelError::Request(to, error))?;
    let (answer, stream) = send.ready().await?.send_request(request, false)?;
    let answer = answer.await?;
    if answer.status() != StatusCode::OK {
        return Err(TunnelError::Refused(answer.status()));
    }
    Ok((stream, answer.into_body()))
}

fn request(to: SocketAddr, headers: ConnectHeaders) -> Result<Request<()>, http::Error> {
    let uri = Uri::builder().authority(authority::format(to)).build()?;
    Request::builder()
        .method(Method::CONNECT)
        .uri(uri)
        .header("baggage", headers.baggage)
        .header("forwarded", headers.forwarded)
        .header("traceparent", headers.traceparent)
        .body(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::directory::tests::workload;
    use crate::identity::{SpiffeId, TrustDomain};

    #[test]
    fn baggage_has_the_names_of_the_field() {
        let pod = LocalWorkload {
            uid: "uid".into(),
            namespace: "shop".into(),
            name: "web-1".into(),
            identity: SpiffeId::new(&TrustDomain::new("td").unwrap(), "shop", "web").unwrap(),
            addresses: Vec::new(),
        };
        assert_eq!(
            baggage("c", &pod, None),
            "k8s.cluster.name=c,k8s.namespace.name=shop,k8s.pod.name=web-1"
        );
        let mut known = workload("uid", "10.0.0.1", "n");
        known.workload_type = "deployment";
        known.workload_name = "web".into();
        known.locality.zone = "z".into();
        assert_eq!(
            baggage("c", &pod, Some(&known)),
            "k8s.cluster.name=c,k8s.namespace.name=shop,k8s.deployment.name=web,\
             service.name=uid,service.version=latest,cloud.availability_zone=z"
        );
    }

    #[test]
    fn a_request_names_the_pod_and_its_own_port() {
        let headers = ConnectHeaders {
            baggage: "b".to_owned(),
            forwarded: "f".to_owned(),
            traceparent: "t".to_owned(),
        };
        for authority in ["10.0.0.1:8080", "[fd00::1]:8080"] {
            let request = request(authority.parse().unwrap(), headers.clone()).unwrap();
            assert_eq!(request.method(), Method::CONNECT);
            assert_eq!(request.uri().to_string(), authority);
        }
    }
}
