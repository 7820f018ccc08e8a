//! Connections as the proxy opens them, and as they fail.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::time::Duration;

use datapath::Family;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

use super::Bed;

impl Bed {
    /// A listener of a pod, for both families.
    pub(crate) fn listen(&self, name: &str, port: u16) -> TcpListener {
        let any = IpAddr::from(std::net::Ipv6Addr::UNSPECIFIED);
        let listen = || TcpListener::bind((any, port)).unwrap();
        self.netns(name).run(listen).unwrap()
    }

    /// A connection from a namespace and from an address that need not be its own.
    pub(crate) fn dial(
        &self,
        name: &str,
        source: SocketAddr,
        to: SocketAddr,
        patience: Duration,
    ) -> io::Result<TcpStream> {
        let family = match Family::of(to.ip()) {
            Family::V4 => AddressFamily::Inet,
            Family::V6 => AddressFamily::Inet6,
        };
        let dial = || -> io::Result<TcpStream> {
            let stream = SockType::Stream;
            let socket = socket(family, stream, SockFlag::SOCK_CLOEXEC, None)?;
            setsockopt(&socket, sockopt::IpTransparent, &true)?;
            // A program that another test is just starting may still hold a closed socket of the same port.
            setsockopt(&socket, sockopt::ReuseAddr, &true)?;
            let patience = TimeVal::milliseconds(patience.as_millis().try_into().unwrap());
            setsockopt(&socket, sockopt::SendTimeout, &patience)?;
            let source = SockaddrStorage::from(source);
            bind(socket.as_raw_fd(), &source)?;
            connect(socket.as_raw_fd(), &SockaddrStorage::from(to))?;
            Ok(TcpStream::from(socket))
        };
        self.netns(name).run(dial)?
    }
}
