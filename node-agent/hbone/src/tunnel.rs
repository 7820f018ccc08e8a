//! HTTP/2 as HBONE uses it: settings, keepalive, and a CONNECT for each connection.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use h2::client::{self, SendRequest};
use h2::{Ping, PingPong, RecvStream, SendStream, server};
use http::{Method, Request, StatusCode, Uri};
use tokio::io::{AsyncRead, AsyncWrite};

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
/// Small DATA frames are how a chatty connection looks; windows bound what they can cost.
const DATA_FRAME_BUDGET: usize = 256 << 20;
/// Time between two pings, and until the first.
const PING_EVERY: Duration = Duration::from_secs(10);
/// A peer that does not answer a ping for this long is gone.
const PING_TIMEOUT: Duration = Duration::from_secs(20);

/// A CONNECT that did not become a tunnel.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TunnelError {
    #[error("HTTP/2: {0}")]
    Http2(#[from] h2::Error),
    #[error("{0} cannot be written as an authority")]
    Authority(SocketAddr),
    #[error("the destination's proxy answered {0}")]
    Refused(StatusCode),
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
pub(crate) async fn accept<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
) -> Result<server::Connection<S, Bytes>, h2::Error> {
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

/// Opens a tunnel to `authority` on a connection.
pub(crate) async fn open(
    send: &mut SendRequest<Bytes>,
    authority: SocketAddr,
    headers: ConnectHeaders,
) -> Result<(SendStream<Bytes>, RecvStream), TunnelError> {
    let uri = Uri::builder()
        .authority(authority.to_string())
        .build()
        .map_err(|_| TunnelError::Authority(authority))?;
    let request = Request::builder()
        .method(Method::CONNECT)
        .uri(uri)
        .header("baggage", headers.baggage)
        .header("forwarded", headers.forwarded)
        .header("traceparent", headers.traceparent)
        .body(())
        .map_err(|_| TunnelError::Authority(authority))?;
    let (answer, stream) = send.send_request(request, false)?;
    let answer = answer.await?;
    if answer.status() != StatusCode::OK {
        return Err(TunnelError::Refused(answer.status()));
    }
    Ok((stream, answer.into_body()))
}
