//! A connection between the ports of an older one that the answering side has reset: conntrack takes it for
//! the older one for some seconds.
#![allow(clippy::unwrap_used, reason = "this is a test")]

mod bed;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use bed::converge::{BACKENDS, attached, converge};
use bed::{Bed, NEXT_PROXY, PODS, input_with, with_successor};
use datapath::{Family, Kernel, Slot, TunnelKind, build};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};

/// The port of every client.
const PORT: u16 = 40000;
const PATIENCE: Duration = Duration::from_secs(3);

/// The way out of pod `a`, which is or comes to be in the mesh, and the way in from pod `b`, which is not: by
/// source, destination and the proxy's port.
fn ways() -> [(&'static str, Ipv4Addr, SocketAddr, u16); 2] {
    let [a, b] = PODS;
    [
        ("a", a, (b, 80).into(), 15001),
        ("b", b, (a, 80).into(), 15006),
    ]
}

/// Opens a connection, has bytes go both ways, and has the answering side reset it.
fn is_reset(bed: &Bed, (from, source, to, _): (&str, Ipv4Addr, SocketAddr, u16), by: &TcpListener) {
    let mut client = bed.dial(from, (source, PORT).into(), to, PATIENCE).unwrap();
    let patience = TimeVal::seconds(PATIENCE.as_secs().try_into().unwrap());
    setsockopt(by, sockopt::ReceiveTimeout, &patience).unwrap();
    let (mut server, peer) = by.accept().unwrap();
    assert_eq!(
        (peer.ip().to_canonical(), peer.port()),
        (source.into(), PORT)
    );
    says(&mut client, &mut server);
    says(&mut server, &mut client);
    let at_once = nix::libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    setsockopt(&server, sockopt::Linger, &at_once).unwrap();
    drop(server);
    let error = client.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}

fn says(from: &mut TcpStream, to: &mut TcpStream) {
    from.write_all(b"ping").unwrap();
    to.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut heard = [0; 4];
    to.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"ping");
}

#[tokio::test]
async fn after_a_reset_the_same_ports_meet_the_proxy_again() {
    for backend in BACKENDS {
        let bed = Bed::new(backend);
        let _kernel = attached(&bed, &input_with(TunnelKind::Veth, 1)).await;
        for way in ways() {
            let listener = bed.listen_transparently("proxy", Family::V4, way.3);
            for _ in 0..3 {
                is_reset(&bed, way, &listener);
            }
        }
    }
}

#[tokio::test]
async fn after_the_reset_of_a_direct_connection_the_same_ports_meet_the_proxy() {
    for backend in BACKENDS {
        let bed = Bed::new(backend);
        let before = build(&input_with(TunnelKind::Veth, 0));
        let kernel = attached(&bed, &input_with(TunnelKind::Veth, 0)).await;
        let servers = ways().map(|way| {
            let server = bed.listen(if way.0 == "a" { "b" } else { "a" }, 80);
            is_reset(&bed, way, &server);
            server
        });
        converge(&kernel, &build(&input_with(TunnelKind::Veth, 1)), &before).await;
        for (way, server) in ways().into_iter().zip(&servers) {
            let listener = bed.listen_transparently("proxy", Family::V4, way.3);
            is_reset(&bed, way, &listener);
            server.set_nonblocking(true).unwrap();
            let past = server.accept();
            assert!(past.is_err(), "it was reached past the proxy: {past:?}");
        }
    }
}

#[tokio::test]
async fn after_a_reset_by_the_old_proxy_the_same_ports_meet_the_new_one() {
    for backend in BACKENDS {
        let mut bed = Bed::new(backend);
        let before = input_with(TunnelKind::Veth, 1);
        let mut kernel = attached(&bed, &before).await;
        for way in ways() {
            let old = bed.listen_transparently("proxy", Family::V4, way.3);
            is_reset(&bed, way, &old);
        }
        bed.pod("next", NEXT_PROXY);
        kernel.attach(Slot::Second, bed.netns("next")).unwrap();
        let both = build(&with_successor(before));
        converge(&kernel, &both, &both).await;
        for way in ways() {
            let new = bed.listen_transparently("next", Family::V4, way.3);
            is_reset(&bed, way, &new);
        }
    }
}
