//! TCP servers: one speaks first and echoes, the other speaks last.

use std::net::SocketAddr;

use anyhow::Result;
use serde_json::json;
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::pattern;
use crate::seen::Seen;

/// Answers every connection with `answer`.
pub(super) async fn serve<F>(
    listener: TcpListener,
    answer: impl Fn(TcpStream, SocketAddr) -> F,
) -> Result<()>
where
    F: Future<Output = Result<()>> + Send + 'static,
{
    loop {
        let (stream, peer) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let answered = answer(stream, peer);
        tokio::spawn(async move {
            if let Err(error) = answered.await {
                eprintln!("{peer}: {error:#}");
            }
        });
    }
}

/// Greets with a line of JSON, then sends back what it gets.
pub(super) async fn echo(mut stream: TcpStream, peer: SocketAddr) -> Result<()> {
    let greeting = serde_json::to_string(&Seen::new(peer))? + "\n";
    stream.write_all(greeting.as_bytes()).await?;
    let (mut read, mut write) = stream.split();
    tokio::io::copy(&mut read, &mut write).await?;
    write.shutdown().await?;
    Ok(())
}

/// Reads to the client's end, then answers with a line of JSON.
pub(super) async fn after_end(mut stream: TcpStream, peer: SocketAddr) -> Result<()> {
    let mut received = Vec::new();
    stream.read_to_end(&mut received).await?;
    let Seen { peer, pod } = Seen::new(peer);
    let sum = pattern::hex(Sha256::new_with_prefix(&received));
    let answer = json!({"peer": peer, "pod": pod, "bytes": received.len(), "sha256": sum});
    stream.write_all(format!("{answer}\n").as_bytes()).await?;
    stream.shutdown().await?;
    Ok(())
}
