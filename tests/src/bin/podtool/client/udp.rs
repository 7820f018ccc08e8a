//! A UDP client.

use std::net::Ipv4Addr;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tokio::net::UdpSocket;

/// Sends a datagram and reads the answer.
pub(super) async fn send(to: &str, text: &str) -> Result<Value> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).await?;
    socket
        .connect(to)
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
