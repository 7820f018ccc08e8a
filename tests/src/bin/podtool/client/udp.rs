//! A UDP client.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tokio::net::{UdpSocket, lookup_host};

/// Sends a datagram and reads the answer.
pub(super) async fn send(to: &str, text: &str) -> Result<Value> {
    let server = lookup_host(to)
        .await
        .with_context(|| format!("look {to} up"))?
        .next()
        .with_context(|| format!("{to} has no address"))?;
    let any: SocketAddr = match server {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any).await?;
    socket
        .connect(server)
        .await
        .with_context(|| format!("the way to {to}"))?;
    socket.send(text.as_bytes()).await?;
    let mut buffer = vec![0; 65536];
    let length = socket
        .recv(&mut buffer)
        .await
        .with_context(|| format!("the answer of {to}"))?;
    let answer: Value = serde_json::from_slice(&buffer[..length])?;
    ensure!(answer["echo"] == text, "sent {text:?}, {answer} came back");
    Ok(answer)
}
