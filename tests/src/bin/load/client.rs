//! The client: makes one kind of traffic for a while, and counts.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustls::pki_types::ServerName;
use serde::Serialize;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;

use crate::exchange::{BULK_WRITE, ECHO, MESSAGE, ONCE, SINK, Work};
use crate::tls;

/// What to do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) work: Work,
    pub(crate) target: SocketAddr,
    pub(crate) tls: bool,
    pub(crate) connections: usize,
    pub(crate) seconds: u64,
}

/// What was measured, over all connections.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Measured {
    /// Bytes that the server has confirmed.
    pub(crate) bytes: u64,
    /// Messages that came back.
    pub(crate) exchanges: u64,
    /// Wall-clock time in seconds.
    pub(crate) seconds: f64,
    /// Median time of an exchange in microseconds.
    pub(crate) p50_us: f64,
    /// 99th percentile of the time of an exchange in microseconds.
    pub(crate) p99_us: f64,
}

/// What one connection measured.
#[derive(Default)]
struct Part {
    bytes: u64,
    took: Vec<Duration>,
}

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<S: AsyncRead + AsyncWrite + Unpin + Send> Stream for S {}

/// Makes the traffic.
pub(crate) async fn run(plan: Plan) -> Result<Measured> {
    let connector = tls::connector()?;
    let start = Instant::now();
    let end = start + Duration::from_secs(plan.seconds);
    let mut parts = JoinSet::new();
    for _ in 0..plan.connections {
        let connector = connector.clone();
        parts.spawn(async move {
            match plan.work {
                Work::Bulk => bulk(open(plan, &connector).await?, end).await,
                Work::PingPong => ping_pong(open(plan, &connector).await?, end).await,
                Work::Connect => connect(plan, &connector, end).await,
                Work::Idle => idle(open(plan, &connector).await?, end).await,
            }
        });
    }
    let mut measured = Measured::default();
    let mut took = Vec::new();
    while let Some(part) = parts.join_next().await {
        let part = part??;
        measured.bytes += part.bytes;
        took.extend(part.took);
    }
    measured.seconds = start.elapsed().as_secs_f64();
    measured.exchanges = took.len() as u64;
    took.sort_unstable();
    measured.p50_us = quantile(&took, 0.50);
    measured.p99_us = quantile(&took, 0.99);
    Ok(measured)
}

fn quantile(sorted: &[Duration], share: f64) -> f64 {
    let last = sorted.len().saturating_sub(1);
    let at = (last as f64 * share) as usize;
    sorted.get(at).map_or(0.0, |took| took.as_secs_f64() * 1e6)
}

async fn open(plan: Plan, connector: &TlsConnector) -> Result<Box<dyn Stream>> {
    let stream = TcpStream::connect(plan.target)
        .await
        .with_context(|| format!("connect to {}", plan.target))?;
    stream.set_nodelay(true)?;
    if !plan.tls {
        return Ok(Box::new(stream));
    }
    let name = ServerName::try_from("load")?;
    Ok(Box::new(
        connector.connect(name, stream).await.context("handshake")?,
    ))
}

async fn bulk(mut stream: Box<dyn Stream>, end: Instant) -> Result<Part> {
    let block = vec![0x5a; BULK_WRITE];
    let mut sent: u64 = 0;
    stream.write_u8(SINK).await?;
    while Instant::now() < end {
        stream.write_all(&block).await?;
        sent += BULK_WRITE as u64;
    }
    stream.shutdown().await?;
    let bytes = stream.read_u64().await.context("the server's count")?;
    ensure!(bytes == sent, "sent {sent} bytes, the server has {bytes}");
    Ok(Part {
        bytes,
        took: Vec::new(),
    })
}

async fn ping_pong(mut stream: Box<dyn Stream>, end: Instant) -> Result<Part> {
    let mut part = Part::default();
    stream.write_u8(ECHO).await?;
    while Instant::now() < end {
        part.took.push(exchange(&mut stream).await?);
    }
    Ok(part)
}

async fn connect(plan: Plan, connector: &TlsConnector, end: Instant) -> Result<Part> {
    let mut part = Part::default();
    while Instant::now() < end {
        let start = Instant::now();
        let mut stream = open(plan, connector).await?;
        stream.write_u8(ONCE).await?;
        exchange(&mut stream).await?;
        let rest = stream.read(&mut [0; 1]).await.context("the server's end")?;
        ensure!(rest == 0, "the server sent more than one message");
        part.took.push(start.elapsed());
    }
    Ok(part)
}

async fn idle(mut stream: Box<dyn Stream>, end: Instant) -> Result<Part> {
    stream.write_u8(ECHO).await?;
    let took = exchange(&mut stream).await?;
    tokio::time::sleep_until(end.into()).await;
    Ok(Part {
        bytes: 0,
        took: vec![took],
    })
}

async fn exchange(stream: &mut Box<dyn Stream>) -> Result<Duration> {
    let start = Instant::now();
    let mut message = [0x5a; MESSAGE];
    stream.write_all(&message).await?;
    stream.flush().await?;
    stream
        .read_exact(&mut message)
        .await
        .context("the answer")?;
    Ok(start.elapsed())
}
