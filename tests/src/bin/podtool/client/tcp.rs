//! TCP clients of the servers that greet and echo, and of the one that answers last.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

use super::{open, within};
use crate::pattern;
use crate::seen::Seen;

/// Time between two lines of a connection that is held.
pub(super) const PAUSE: Duration = Duration::from_millis(100);

pub(super) type Lines = BufReader<TcpStream>;

/// Sends a line and reads it back.
pub(super) async fn send(to: &str, text: &str) -> Result<Value> {
    let start = Instant::now();
    let (mut stream, seen) = greeted(to).await?;
    let (own, to) = (
        stream.get_ref().local_addr()?,
        stream.get_ref().peer_addr()?,
    );
    exchange(&mut stream, text).await?;
    let took = start.elapsed().as_millis();
    Ok(json!({
        "own": own, "to": to, "peer": seen.peer, "pod": seen.pod, "echo": text, "ms": took
    }))
}

/// Sends a line byte by byte and reads it back.
pub(super) async fn dribble(to: &str, length: usize) -> Result<Value> {
    let (mut stream, seen) = greeted(to).await?;
    let text: String = ('a'..='z').cycle().take(length).collect();
    for byte in text.bytes() {
        stream.get_mut().write_all(&[byte]).await?;
        // With TCP_NODELAY set, each write is a packet; the pause keeps the proxies from joining them.
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    exchange_rest(&mut stream, &text).await?;
    Ok(json!({"peer": seen.peer, "pod": seen.pod, "bytes": length}))
}

/// Keeps a connection in use until standard input ends; opening it, and each line, may take so long.
pub(super) async fn hold(to: &str, limit: Duration) -> Result<Value> {
    let (mut stream, seen) = within(limit, greeted(to)).await?;
    println!("{}", json!({"peer": seen.peer, "pod": seen.pod}));
    let end = tokio::spawn(async { tokio::io::stdin().read_to_end(&mut Vec::new()).await });
    let (mut exchanges, mut longest) = (0, Duration::ZERO);
    while !end.is_finished() {
        let start = Instant::now();
        if let Err(error) = within(limit, exchange(&mut stream, "still there?")).await {
            let error = format!("{error:#}");
            return Ok(json!({"exchanges": exchanges, "cut": error}));
        }
        exchanges += 1;
        longest = longest.max(start.elapsed());
        tokio::time::sleep(PAUSE).await;
    }
    let longest = longest.as_millis();
    Ok(json!({"exchanges": exchanges, "cut": null, "longest_ms": longest}))
}

/// Sends a text, ends, and only then reads.
pub(super) async fn half_close(to: &str, text: &str) -> Result<Value> {
    let mut stream = open(to).await?;
    stream.write_all(text.as_bytes()).await?;
    stream.shutdown().await?;
    let mut answer = String::new();
    stream
        .read_to_string(&mut answer)
        .await
        .context("read the answer")?;
    let answer: Value = serde_json::from_str(&answer).with_context(|| format!("{answer:?}"))?;
    let expected = pattern::hex(Sha256::new_with_prefix(text));
    ensure!(
        answer["sha256"] == expected,
        "the server got something else: {answer}"
    );
    Ok(answer)
}

/// Opens a connection and closes it.
pub(super) async fn connect(to: &str) -> Result<Value> {
    let start = Instant::now();
    let outcome = open(to).await;
    let took = start.elapsed().as_millis();
    Ok(match outcome {
        Ok(stream) => json!({"connected": true, "ms": took, "local": stream.local_addr()?}),
        Err(error) => json!({"connected": false, "ms": took, "error": format!("{error:#}")}),
    })
}

pub(super) async fn greeted(to: &str) -> Result<(Lines, Seen)> {
    let mut stream = BufReader::new(open(to).await?);
    let greeting = line(&mut stream).await.context("read the greeting")?;
    let seen = serde_json::from_str(&greeting).with_context(|| format!("{greeting:?}"))?;
    Ok((stream, seen))
}

pub(super) async fn exchange(stream: &mut Lines, text: &str) -> Result<()> {
    stream.get_mut().write_all(text.as_bytes()).await?;
    exchange_rest(stream, text).await
}

async fn exchange_rest(stream: &mut Lines, text: &str) -> Result<()> {
    stream.get_mut().write_all(b"\n").await?;
    let echo = line(stream).await?;
    ensure!(echo == text, "sent {text:?}, {echo:?} came back");
    Ok(())
}

async fn line(stream: &mut Lines) -> Result<String> {
    let mut line = String::new();
    stream.read_line(&mut line).await?;
    ensure!(line.ends_with('\n'), "the server closed after {line:?}");
    line.pop();
    Ok(line)
}
