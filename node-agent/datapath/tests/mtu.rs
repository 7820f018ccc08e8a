//! Bodies arrive whole, whatever the MTU of the pods' network, and the tunnels' devices have the MTU
//! that is left.
#![allow(clippy::unwrap_used, reason = "this is a test")]

mod bed;

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use bed::converge::attached;
use bed::{Bed, PODS, dual, input_with, ipv6_of, set_mtu};
use datapath::{Family, IptablesBackend, TunnelKind};

/// What the pods' devices may have: Ethernet's, less that of a tunnel, jumbo frames.
const MTUS: [u32; 3] = [1500, 1400, 9000];

/// Sizes of bodies: less than a window, and a good deal more.
const BODIES: [usize; 2] = [60 << 10, 1 << 20];

const MESH: Ipv4Addr = PODS[0];
const OTHER: Ipv4Addr = PODS[1];

#[tokio::test]
async fn bodies_arrive_whole() {
    arrive_whole(TunnelKind::Veth, 0).await;
}

#[tokio::test]
#[ignore = "needs a kernel with geneve: ring 5"]
async fn geneve_bodies_arrive_whole() {
    // Outer Ethernet, IPv4, UDP and geneve.
    arrive_whole(TunnelKind::Geneve, 50).await;
}

async fn arrive_whole(kind: TunnelKind, overhead: u32) {
    for mtu in MTUS {
        let bed = Bed::dual(IptablesBackend::Nft);
        for (pod, device) in [("proxy", "vproxy"), ("a", "va"), ("b", "vb")] {
            bed.run(pod, &format!("ip link set eth0 mtu {mtu}"));
            bed.run("host", &format!("ip link set {device} mtu {mtu}"));
        }
        let mut input = dual(input_with(kind, 1));
        set_mtu(&mut input, mtu - overhead);
        attached(&bed, &input).await;
        for (netns, device) in [
            ("host", "istioin"),
            ("host", "istioout"),
            ("proxy", "pistioin"),
            ("proxy", "pistioout"),
        ] {
            let shown = bed.run(netns, &format!("ip -d link show {device}"));
            let wanted = format!(" mtu {} ", mtu - overhead);
            assert!(shown.contains(&wanted), "{wanted} is not in\n{shown}");
        }
        for family in Family::ALL {
            for length in BODIES {
                carry(&bed, family, length, mtu);
            }
        }
    }
}

/// Carries a body on every way there is: from a mesh pod to the proxy, from somebody to a mesh pod's
/// proxy, and from the proxy to a pod, as another pod.
fn carry(bed: &Bed, family: Family, length: usize, mtu: u32) {
    let ip = |ip: Ipv4Addr| -> IpAddr {
        match family {
            Family::V4 => ip.into(),
            Family::V6 => ipv6_of(ip).into(),
        }
    };
    let ways = [
        (
            "a",
            MESH,
            OTHER,
            bed.listen_transparently("proxy", family, 15001),
        ),
        (
            "b",
            OTHER,
            MESH,
            bed.listen_transparently("proxy", family, 15006),
        ),
        ("proxy", OTHER, MESH, bed.listen("a", 80)),
        ("proxy", MESH, OTHER, bed.listen("b", 80)),
    ];
    for (from, source, to, listener) in ways {
        let way = format!("{length} bytes from {from} as {source} to {to}, {family:?}, MTU {mtu}");
        let echo = thread::spawn(move || echo(&listener));
        let to = SocketAddr::new(ip(to), 80);
        let client = bed.dial(
            from,
            SocketAddr::new(ip(source), 0),
            to,
            Duration::from_secs(5),
        );
        assert!(client.is_ok(), "{way}: {client:?}");
        let heard = exchange(client.unwrap(), body(length));
        assert!(heard == body(length), "{way}: {} came back", heard.len());
        echo.join().unwrap();
    }
}

/// Sends a body while what comes back is read.
fn exchange(stream: TcpStream, body: Vec<u8>) -> Vec<u8> {
    impatient(&stream);
    let mut back = stream.try_clone().unwrap();
    let send = thread::spawn(move || {
        let mut stream = stream;
        stream.write_all(&body).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
    });
    let mut heard = Vec::new();
    back.read_to_end(&mut heard).unwrap();
    send.join().unwrap();
    heard
}

fn echo(listener: &TcpListener) {
    let (stream, _) = listener.accept().unwrap();
    impatient(&stream);
    std::io::copy(&mut &stream, &mut &stream).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
}

/// What is stuck fails.
fn impatient(stream: &TcpStream) {
    let patience = Some(Duration::from_secs(20));
    stream.set_read_timeout(patience).unwrap();
    stream.set_write_timeout(patience).unwrap();
}

/// Bytes that do not repeat where segments do.
fn body(length: usize) -> Vec<u8> {
    let byte = |place: usize| u8::try_from(place * 31 % 251).unwrap();
    (0..length).map(byte).collect()
}
