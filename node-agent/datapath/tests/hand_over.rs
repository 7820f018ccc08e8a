//! A new proxy takes over while the old one carries connections, in a real kernel with real ones.
#![allow(clippy::unwrap_used, reason = "this is a test")]

mod bed;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use bed::converge::{BACKENDS, attached, converge};
use bed::{Bed, NEXT_PROXY, PODS, input_with, succeeded, with_successor};
use datapath::{Family, Kernel, Slot, TunnelKind, build};

const ELSEWHERE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 7);

/// A connection and the proxy's end of it.
struct Carried {
    client: TcpStream,
    proxy: TcpStream,
}

impl Carried {
    /// Bytes go both ways.
    fn works(&mut self) {
        says(&mut self.client, &mut self.proxy);
        says(&mut self.proxy, &mut self.client);
    }
}

fn says(from: &mut TcpStream, to: &mut TcpStream) {
    from.write_all(b"ping").unwrap();
    to.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut heard = [0; 4];
    to.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"ping");
}

/// The way out of mesh pod `a`, and the way in from pod `b`, which is not in the mesh: by the
/// destination and the proxy's port.
fn ways() -> [(&'static str, SocketAddr, u16); 2] {
    [
        ("a", (ELSEWHERE, 80).into(), 15001),
        ("b", (PODS[0], 80).into(), 15006),
    ]
}

fn listeners(bed: &Bed, proxy: &str) -> [TcpListener; 2] {
    ways().map(|(_, _, port)| bed.listen_transparently(proxy, Family::V4, port))
}

fn connect(bed: &Bed, listeners: &[TcpListener; 2]) -> [Carried; 2] {
    let mut listeners = listeners.iter();
    ways().map(|(from, to, _)| {
        let client = bed.connect(from, to);
        let (proxy, _) = listeners.next().unwrap().accept().unwrap();
        Carried { client, proxy }
    })
}

#[tokio::test]
async fn connections_of_the_old_proxy_go_on_while_the_new_one_serves() {
    go_on(TunnelKind::Veth).await;
}

#[tokio::test]
#[ignore = "needs a kernel with geneve: ring 5"]
async fn geneve_connections_of_the_old_proxy_go_on_while_the_new_one_serves() {
    go_on(TunnelKind::Geneve).await;
}

async fn go_on(kind: TunnelKind) {
    for backend in BACKENDS {
        let mut bed = Bed::new(backend);
        // The proxy's answers come from there, and the host takes none from where it has no route to.
        bed.run(
            "host",
            &format!("ip route add {ELSEWHERE} via {} dev vb onlink", PODS[1]),
        );
        let before = input_with(kind, 1);
        let mut kernel = attached(&bed, &before).await;
        let old = listeners(&bed, "proxy");
        let mut carried = connect(&bed, &old);
        carried.iter_mut().for_each(Carried::works);

        bed.pod("next", NEXT_PROXY);
        kernel.attach(Slot::Second, bed.netns("next")).unwrap();
        let both = build(&with_successor(before.clone()));
        converge(&kernel, &both, &both).await;
        let new = listeners(&bed, "next");
        let mut later = connect(&bed, &new);
        for _ in 0..3 {
            carried.iter_mut().for_each(Carried::works);
            later.iter_mut().for_each(Carried::works);
        }

        // The old pod goes while it still carries something.
        bed.run("proxy", "ip link delete eth0");
        kernel.detach(Slot::First);
        converge(&kernel, &build(&succeeded(before)), &both).await;
        let received = bed.sent_over("vb");
        let [outbound, _] = &mut carried;
        assert_unheard(&mut outbound.client);
        assert_eq!(bed.sent_over("vb"), received, "it went directly");
        later.iter_mut().for_each(Carried::works);
        connect(&bed, &new).iter_mut().for_each(Carried::works);
    }
}

/// Nobody answers what is sent.
fn assert_unheard(client: &mut TcpStream) {
    client.write_all(b"ping").unwrap();
    let patience = Some(Duration::from_secs(1));
    client.set_read_timeout(patience).unwrap();
    let heard = client.read(&mut [0; 4]);
    assert!(heard.is_err(), "{heard:?}");
}
