//! Sockets: transparent listeners, and dials from a pod's own address.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, TcpKeepalive, Type};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

/// How long a dial may take.
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

const BACKLOG: i32 = 4096;

/// A socket that could not be made or connected.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DialError {
    #[error("{1} cannot be reached from {0}: one is IPv4, the other IPv6")]
    Family(IpAddr, SocketAddr),
    #[error("make a socket that is bound to {0:?}")]
    Socket(Option<IpAddr>, #[source] io::Error),
    #[error("connect to {0}")]
    Connect(SocketAddr, #[source] io::Error),
    #[error("connect to {0}: no answer in {CONNECT_TIMEOUT:?}")]
    Timeout(SocketAddr),
    #[error("{0} has gone to another pod meanwhile")]
    Moved(SocketAddr),
}

impl DialError {
    /// Whether the destination said that nobody listens.
    pub(crate) fn is_refusal(&self) -> bool {
        matches!(self, Self::Connect(_, error) if error.kind() == io::ErrorKind::ConnectionRefused)
    }
}

/// Listens on a port for connections to any address of both families (TPROXY), or of IPv4 where the
/// kernel has no IPv6. A socket for each: one for both would show IPv4 addresses as IPv4-mapped ones.
pub(crate) fn listen(port: u16) -> io::Result<Vec<TcpListener>> {
    let v4 = listen_at(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)))?;
    let v6 = listen_at(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)));
    with_ipv6(v4, v6)
}

fn with_ipv6<S>(v4: S, v6: io::Result<S>) -> io::Result<Vec<S>> {
    match v6 {
        Ok(v6) => Ok(vec![v4, v6]),
        Err(error) if error.raw_os_error() == Some(Errno::EAFNOSUPPORT as i32) => Ok(vec![v4]),
        Err(error) => Err(error),
    }
}

/// Accepted sockets inherit its options.
fn listen_at(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = new(address)?;
    socket.set_reuse_address(true)?;
    set_transparent(&socket, address.ip())?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// Whether somebody has ended a listener from outside (`ss -K`): it keeps its address, and every accept
/// fails.
pub(crate) fn is_ended(failure: &io::Error) -> bool {
    failure.raw_os_error() == Some(Errno::EINVAL as i32)
}

/// Listens again in the place of a listener that was ended. That one could be told to, but whatever it
/// accepted then would have ended as well.
pub(crate) fn replace(ended: TcpListener) -> io::Result<TcpListener> {
    let address = ended.local_addr()?;
    drop(ended);
    listen_at(address)
}

/// A socket of the address's family.
fn new(address: SocketAddr) -> io::Result<Socket> {
    let domain = Domain::for_address(address);
    let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?;
    set_common(&socket)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// Whose address it is does not matter any more.
fn set_transparent(socket: &Socket, family_of: IpAddr) -> io::Result<()> {
    match family_of {
        IpAddr::V4(_) => socket.set_ip_transparent_v4(true),
        IpAddr::V6(_) => socket.set_ip_transparent_v6(true),
    }
}

fn set_common(socket: &Socket) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    // Finds a dead peer after twelve minutes of silence at most.
    let keepalive = TcpKeepalive::new()
        .with_time(Duration::from_secs(180))
        .with_interval(Duration::from_secs(60))
        .with_retries(9);
    socket.set_tcp_keepalive(&keepalive)
}

/// Connects, from this address if one is given: it need not be one of this namespace's own.
pub(crate) async fn dial(source: Option<IpAddr>, to: SocketAddr) -> Result<TcpStream, DialError> {
    if let Some(source) = source.filter(|source| source.is_ipv4() != to.is_ipv4()) {
        return Err(DialError::Family(source, to));
    }
    let socket = prepare(source, to).map_err(|error| DialError::Socket(source, error))?;
    match tokio::time::timeout(CONNECT_TIMEOUT, socket.connect(to)).await {
        Ok(connected) => connected.map_err(|error| DialError::Connect(to, error)),
        Err(_) => Err(DialError::Timeout(to)),
    }
}

/// Connects a client to a pod of this node, from the client's address.
pub(crate) async fn dial_pod(client: IpAddr, pod: SocketAddr) -> Result<TcpStream, DialError> {
    // A pod does not accept packets from its own address that come from outside.
    let source = (client != pod.ip()).then_some(client);
    dial(source, pod).await
}

fn prepare(source: Option<IpAddr>, to: SocketAddr) -> io::Result<TcpSocket> {
    let socket = new(to)?;
    if let Some(source) = source {
        set_transparent(&socket, source)?;
        // The port is chosen at connect, when the whole tuple is known: more than one per port.
        setsockopt(&socket, sockopt::IpBindAddressNoPort, &true)?;
        socket.bind(&SocketAddr::new(source, 0).into())?;
    }
    Ok(TcpSocket::from_std_stream(socket.into()))
}

/// Ends a connection with RST instead of FIN: what was sent on it did not arrive.
pub(crate) fn reset(stream: TcpStream) {
    if let Err(error) = stream.set_zero_linger() {
        tracing::debug!(%error, "reset a connection");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_kernel_without_ipv6_is_content_with_ipv4() {
        let failed = |errno: Errno| Err(io::Error::from_raw_os_error(errno as i32));
        assert_eq!(with_ipv6(4, Ok(6)).unwrap(), [4, 6]);
        assert_eq!(with_ipv6(4, failed(Errno::EAFNOSUPPORT)).unwrap(), [4]);
        assert!(with_ipv6(4, failed(Errno::EADDRINUSE)).is_err());
    }

    #[tokio::test]
    async fn a_dial_between_families_says_so() {
        let source = Some(IpAddr::from(Ipv4Addr::LOCALHOST));
        let to = SocketAddr::from((Ipv6Addr::LOCALHOST, 80));
        let error = dial(source, to).await.unwrap_err().to_string();
        let expected = "[::1]:80 cannot be reached from 127.0.0.1: one is IPv4, the other IPv6";
        assert_eq!(error, expected);
    }
}
