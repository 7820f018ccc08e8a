//! The servers.

mod http;
mod tcp;
mod udp;

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context, Result};
use tokio::net::{TcpListener, UdpSocket};

use crate::args::Ports;

/// Serves all ports until the process ends.
pub(crate) async fn serve(ports: Ports) -> Result<()> {
    let echo = listen(ports.tcp).await?;
    let after_end = listen(ports.after_end).await?;
    let web = listen(ports.http).await?;
    let datagrams = UdpSocket::bind(&any(ports.udp)[..])
        .await
        .with_context(|| format!("listen on UDP port {}", ports.udp))?;
    println!("listening");
    tokio::try_join!(
        tcp::serve(echo, tcp::echo),
        tcp::serve(after_end, tcp::after_end),
        http::serve(web),
        udp::serve(datagrams),
    )?;
    Ok(())
}

async fn listen(port: u16) -> Result<TcpListener> {
    TcpListener::bind(&any(port)[..])
        .await
        .with_context(|| format!("listen on TCP port {port}"))
}

/// The first is of both families; the second is for a kernel without IPv6.
fn any(port: u16) -> [SocketAddr; 2] {
    [
        (Ipv6Addr::UNSPECIFIED, port).into(),
        (Ipv4Addr::UNSPECIFIED, port).into(),
    ]
}
