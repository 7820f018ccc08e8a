//! HTTP/1.1 and HTTP/2 without TLS, on one port.

use std::net::SocketAddr;

use anyhow::Result;
use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use serde_json::json;
use sha2::{Digest, Sha256};
use tokio::net::{TcpListener, TcpStream};

use crate::pattern::{self, Body as PatternBody};
use crate::seen::Seen;

type Answer = Response<UnsyncBoxBody<Bytes, std::convert::Infallible>>;

/// Answers every connection.
pub(super) async fn serve(listener: TcpListener) -> Result<()> {
    loop {
        let (stream, peer) = listener.accept().await?;
        stream.set_nodelay(true)?;
        tokio::spawn(async move {
            if let Err(error) = connection(stream, peer).await {
                eprintln!("{peer}: {error}");
            }
        });
    }
}

async fn connection(
    stream: TcpStream,
    peer: SocketAddr,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let service = service_fn(move |request| answer(request, peer));
    Builder::new(TokioExecutor::new())
        .serve_connection(TokioIo::new(stream), service)
        .await
}

async fn answer(request: Request<Incoming>, peer: SocketAddr) -> Result<Answer, hyper::Error> {
    let path = request.uri().path().to_owned();
    let wanted = path.strip_prefix("/bytes/").map(str::parse);
    match (request.method(), path.as_str(), wanted) {
        (&Method::GET, "/", _) => Ok(json(&json!(Seen::new(peer)))),
        (&Method::GET, _, Some(Ok(length))) => {
            Ok(Response::new(PatternBody::new(length).boxed_unsync()))
        }
        (&Method::POST, "/sum", _) => {
            let (bytes, sha256) = sum(request.into_body()).await?;
            let Seen { peer, pod } = Seen::new(peer);
            Ok(json(
                &json!({"peer": peer, "pod": pod, "bytes": bytes, "sha256": sha256}),
            ))
        }
        _ => {
            let mut unknown = json(&json!({"error": "GET /, GET /bytes/N or POST /sum"}));
            *unknown.status_mut() = StatusCode::NOT_FOUND;
            Ok(unknown)
        }
    }
}

fn json(value: &serde_json::Value) -> Answer {
    Response::new(Full::new(Bytes::from(value.to_string())).boxed_unsync())
}

async fn sum(mut body: Incoming) -> Result<(u64, String), hyper::Error> {
    let (mut sum, mut length) = (Sha256::new(), 0);
    while let Some(frame) = body.frame().await {
        if let Ok(data) = frame?.into_data() {
            length += data.len() as u64;
            sum.update(&data);
        }
    }
    Ok((length, pattern::hex(sum)))
}
