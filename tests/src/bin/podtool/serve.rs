//! The servers.

mod http;
mod tcp;
mod udp;

use std::net::Ipv4Addr;

use anyhow::{Context, Result};
use tokio::net::{TcpListener, UdpSocket};

use crate::args::Ports;

/// Serves all ports until the process ends.
pub(crate) async fn serve(ports: Ports) -> Result<()> {
    let echo = listen(ports.tcp).await?;
    let after_end = listen(ports.after_end).await?;
    let web = listen(ports.http).await?;
    let datagrams = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, ports.udp))
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
    TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))
        .await
        .with_context(|| format!("listen on TCP port {port}"))
}
