//! The clients: each makes one kind of traffic and tells what came of it.

mod hbone;
mod http;
mod ping;
mod tcp;
mod traffic;
mod udp;

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use tokio::net::{TcpStream, lookup_host};

use crate::args::Command;

/// How long an answer to a ping may take.
const PING_LIMIT: Duration = Duration::from_secs(5);

/// Runs one client, which may take so long, or lasts until standard input ends.
pub(crate) async fn run(command: Command, limit: Duration) -> Result<Value> {
    match command {
        Command::Hold { to } => tcp::hold(&to, limit).await,
        Command::Traffic(wanted) => traffic::run(wanted, limit).await,
        other => within(limit, once(other)).await,
    }
}

async fn once(command: Command) -> Result<Value> {
    match command {
        Command::Serve(_) | Command::Obey | Command::Hold { .. } | Command::Traffic(_) => {
            bail!("not a client that is done once")
        }
        Command::Send { to, text } => tcp::send(&to, &text).await,
        Command::Dribble { to, bytes } => tcp::dribble(&to, bytes).await,
        Command::HalfClose { to, text } => tcp::half_close(&to, &text).await,
        Command::Connect { to } => tcp::connect(&to).await,
        Command::Http {
            url,
            requests,
            keep_alive,
            h2,
        } => http::get(&url, requests, keep_alive, h2).await,
        Command::Download { url } => http::download(&url).await,
        Command::Upload { url, bytes } => http::upload(&url, bytes).await,
        Command::Udp { to, text } => udp::send(&to, &text).await,
        Command::Ping { to } => {
            tokio::task::spawn_blocking(move || ping::send(to, PING_LIMIT)).await?
        }
        Command::Resolve { name } => resolve(&name).await,
        Command::Hbone {
            to,
            authority,
            certificate,
            text,
        } => hbone::dial(&to, &authority, certificate, &text).await,
    }
}

async fn resolve(name: &str) -> Result<Value> {
    let found = lookup_host((name, 0))
        .await
        .with_context(|| format!("look {name} up"))?;
    let addresses: BTreeSet<_> = found.map(|address| address.ip()).collect();
    Ok(json!({"addresses": addresses}))
}

async fn within<T>(limit: Duration, work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::time::timeout(limit, work)
        .await
        .with_context(|| format!("not done after {limit:?}"))?
}

async fn open(to: &str) -> Result<TcpStream> {
    let stream = TcpStream::connect(to)
        .await
        .with_context(|| format!("connect to {to}"))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}
