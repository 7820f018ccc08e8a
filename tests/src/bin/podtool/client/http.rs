//! HTTP clients.

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use http::{Request, Response, Uri, Version, header};
use http_body_util::{BodyExt, Empty};
use hyper::body::{Body, Incoming};
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::open;
use crate::pattern::{self, Body as PatternBody};

/// Gets a page `requests` times; tells the last answer and from how many ports the server was asked.
pub(super) async fn get(uri: &Uri, requests: usize, keep_alive: bool, h2: bool) -> Result<Value> {
    let (mut ports, mut last, mut connections) = (Vec::new(), json!(null), 0);
    let mut connection = None;
    for _ in 0..requests {
        let mut sender = match connection.take() {
            Some(sender) => sender,
            None => {
                connections += 1;
                Sender::open(uri, h2).await?
            }
        };
        let request = request(uri, "GET", Empty::<Bytes>::new(), h2)?;
        let response = sender.send(request).await?;
        ensure!(response.status().is_success(), "{}", response.status());
        let body = response.into_body().collect().await?.to_bytes();
        last = serde_json::from_slice(&body).with_context(|| format!("{body:?}"))?;
        ports.push(last["peer"].clone());
        connection = keep_alive.then_some(sender);
    }
    ports.dedup();
    last["requests"] = json!(requests);
    last["connections"] = json!(connections);
    last["peers"] = json!(ports.len());
    Ok(last)
}

/// Gets a page of the pattern and checks it.
pub(super) async fn download(uri: &Uri) -> Result<Value> {
    let mut sender = Sender::open(uri, false).await?;
    let response = sender
        .send(request(uri, "GET", Empty::<Bytes>::new(), false)?)
        .await?;
    ensure!(response.status().is_success(), "{}", response.status());
    let mut body = response.into_body();
    let (mut sum, mut length) = (Sha256::new(), 0);
    while let Some(frame) = body.frame().await {
        if let Ok(data) = frame.context("the body")?.into_data() {
            length += data.len() as u64;
            sum.update(&data);
        }
    }
    let sum = pattern::hex(sum);
    ensure!(
        sum == pattern::sum(length),
        "{length} bytes came, but not the right ones"
    );
    Ok(json!({"bytes": length, "sha256": sum}))
}

/// Posts the pattern and checks the server's sum of it.
pub(super) async fn upload(uri: &Uri, bytes: u64) -> Result<Value> {
    let mut sender = Sender::open(uri, false).await?;
    let response = sender
        .send(request(uri, "POST", PatternBody::new(bytes), false)?)
        .await?;
    ensure!(response.status().is_success(), "{}", response.status());
    let body = response.into_body().collect().await?.to_bytes();
    let answer: Value = serde_json::from_slice(&body)?;
    ensure!(
        answer["bytes"] == bytes,
        "sent {bytes} bytes, the server has {answer}"
    );
    ensure!(
        answer["sha256"] == pattern::sum(bytes),
        "the server got other bytes: {answer}"
    );
    Ok(answer)
}

fn request<B>(uri: &Uri, method: &str, body: B, h2: bool) -> Result<Request<B>> {
    let request = Request::builder().method(method);
    if h2 {
        return Ok(request
            .version(Version::HTTP_2)
            .uri(uri.clone())
            .body(body)?);
    }
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let host = uri
        .authority()
        .context("an address without a host")?
        .as_str();
    Ok(request.uri(path).header(header::HOST, host).body(body)?)
}

/// An open connection.
enum Sender<B> {
    Http1(http1::SendRequest<B>),
    Http2(http2::SendRequest<B>),
}

impl<B> Sender<B>
where
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    async fn open(uri: &Uri, h2: bool) -> Result<Self> {
        let host = uri.host().context("an address without a host")?;
        let io = TokioIo::new(open(&format!("{host}:{}", uri.port_u16().unwrap_or(80))).await?);
        if h2 {
            let (sender, connection) = http2::handshake(TokioExecutor::new(), io).await?;
            tokio::spawn(connection);
            return Ok(Self::Http2(sender));
        }
        let (sender, connection) = http1::handshake(io).await?;
        tokio::spawn(connection);
        Ok(Self::Http1(sender))
    }

    async fn send(&mut self, request: Request<B>) -> Result<Response<Incoming>> {
        let response = match self {
            Self::Http1(sender) => {
                sender.ready().await?;
                sender.send_request(request).await
            }
            Self::Http2(sender) => {
                sender.ready().await?;
                sender.send_request(request).await
            }
        };
        response.context("the answer")
    }
}
