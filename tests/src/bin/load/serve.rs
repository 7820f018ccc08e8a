//! The server: reads, and sends back what it is asked to.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context, Result, bail};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::exchange::{BULK_WRITE, ECHO, MESSAGE, ONCE, SINK};
use crate::tls;

/// Serves both ports until the process ends.
pub(crate) async fn serve(plain: u16, tls: u16) -> Result<()> {
    let plain = TcpListener::bind(&any(plain)[..])
        .await
        .context("listen for plain TCP")?;
    let encrypted = TcpListener::bind(&any(tls)[..])
        .await
        .context("listen for TLS")?;
    let acceptor = tls::acceptor()?;
    println!("listening");
    loop {
        tokio::select! {
            accepted = plain.accept() => {
                let (stream, _) = accepted?;
                tokio::spawn(async move { report(answer(prepared(stream)).await) });
            }
            accepted = encrypted.accept() => {
                let (stream, _) = accepted?;
                let acceptor = acceptor.clone();
                tokio::spawn(async move {
                    match acceptor.accept(prepared(stream)).await {
                        Ok(stream) => report(answer(stream).await),
                        Err(error) => eprintln!("handshake: {error}"),
                    }
                });
            }
        }
    }
}

/// The first is of both families; the second is for a kernel without IPv6.
fn any(port: u16) -> [SocketAddr; 2] {
    [
        (Ipv6Addr::UNSPECIFIED, port).into(),
        (Ipv4Addr::UNSPECIFIED, port).into(),
    ]
}

fn prepared(stream: TcpStream) -> TcpStream {
    if let Err(error) = stream.set_nodelay(true) {
        eprintln!("TCP_NODELAY: {error}");
    }
    stream
}

fn report(ended: Result<()>) {
    if let Err(error) = ended {
        eprintln!("connection: {error:#}");
    }
}

async fn answer(mut stream: impl AsyncRead + AsyncWrite + Unpin) -> Result<()> {
    match stream.read_u8().await.context("kind of exchange")? {
        SINK => sink(&mut stream).await,
        ECHO => echo(&mut stream).await,
        ONCE => once(&mut stream).await,
        other => bail!("unknown kind of exchange {other}"),
    }
}

async fn sink(stream: &mut (impl AsyncRead + AsyncWrite + Unpin)) -> Result<()> {
    let mut buffer = vec![0; BULK_WRITE];
    let mut total: u64 = 0;
    loop {
        let read = stream.read(&mut buffer).await?;
        if read == 0 {
            break;
        }
        total += read as u64;
    }
    stream.write_u64(total).await?;
    stream.shutdown().await?;
    Ok(())
}

async fn echo(stream: &mut (impl AsyncRead + AsyncWrite + Unpin)) -> Result<()> {
    let mut message = [0; MESSAGE];
    while stream.read_exact(&mut message).await.is_ok() {
        stream.write_all(&message).await?;
        stream.flush().await?;
    }
    Ok(())
}

async fn once(stream: &mut (impl AsyncRead + AsyncWrite + Unpin)) -> Result<()> {
    let mut message = [0; MESSAGE];
    stream.read_exact(&mut message).await?;
    stream.write_all(&message).await?;
    stream.shutdown().await?;
    Ok(())
}
