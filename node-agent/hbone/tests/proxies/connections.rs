//! Real connections through two proxies.

use std::io::ErrorKind;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use crate::bed::log::Log;
use crate::bed::*;
use hbone::directory::Workload;
use hbone::policy::{Match, Policy, PolicyAction, Text};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// A connection of the client to the server, with both ends in hand.
async fn pair() -> (Mesh, TcpStream, TcpStream) {
    let mesh = Mesh::new().await;
    let listener = TcpListener::bind(at(SERVER, 8080)).await.unwrap();
    let client = dial(CLIENT, at(VIP, 80)).await.unwrap();
    let (server, peer) = listener.accept().await.unwrap();
    assert_eq!(peer.ip(), IpAddr::from(CLIENT));
    (mesh, client, server)
}

#[test]
fn a_service_is_reached_through_a_tunnel_and_sees_the_client() {
    in_namespace(async || {
        let mesh = Mesh::new().await;
        serve_echo(SERVER, 8080).await;
        for text in ["first", "second"] {
            let stream = dial(CLIENT, at(VIP, 80)).await.unwrap();
            assert_eq!(talk(stream, text).await.unwrap(), greeting(CLIENT, text));
        }
        assert_eq!(
            mesh.near.shared.tunnels(),
            1,
            "the second reused the tunnel of the first"
        );
        let opened = mesh.far.metric("istio_tcp_connections_opened_total");
        assert!(
            opened.contains("source_principal=\"spiffe://td/ns/shop/sa/client\""),
            "{opened}"
        );
        assert!(
            opened.contains("connection_security_policy=\"mutual_tls\""),
            "{opened}"
        );
    });
}

#[test]
fn a_pod_is_reached_by_its_own_address() {
    in_namespace(async || {
        let mesh = Mesh::new().await;
        serve_echo(SERVER, 8080).await;
        let stream = dial(CLIENT, at(SERVER, 8080)).await.unwrap();
        assert_eq!(talk(stream, "x").await.unwrap(), greeting(CLIENT, "x"));
        assert_eq!(mesh.near.shared.tunnels(), 1);
    });
}

#[test]
fn pods_of_one_node_are_joined_and_a_pod_reaches_itself() {
    in_namespace(async || {
        let mesh = Mesh::new().await;
        serve_echo(NEIGHBOUR, 8080).await;
        serve_echo(CLIENT, 8080).await;
        mesh.near
            .change(|directory| directory.put_workload(endpoint("client", CLIENT)));
        mesh.near
            .change(|directory| directory.remove_workload("server", Instant::now()));
        for by_tunnel in [false, true] {
            mesh.near.shared.set_local_by_tunnel(by_tunnel);
            let stream = dial(CLIENT, at(NEIGHBOUR, 8080)).await.unwrap();
            assert_eq!(talk(stream, "x").await.unwrap(), greeting(CLIENT, "x"));
            for to in [at(CLIENT, 8080), at(VIP, 80)] {
                let stream = dial(CLIENT, to).await.unwrap();
                let answer = talk(stream, "x").await.unwrap();
                assert!(answer.ends_with("\nx"), "{to}: {answer}");
            }
        }
        assert_eq!(mesh.near.shared.tunnels(), 2);
    });
}

#[test]
fn what_is_outside_the_mesh_is_passed_through() {
    in_namespace(async || {
        let mesh = Mesh::new().await;
        serve_echo(OUTSIDE, 443).await;
        let stream = dial(CLIENT, at(OUTSIDE, 443)).await.unwrap();
        assert_eq!(talk(stream, "x").await.unwrap(), greeting(CLIENT, "x"));
        assert_eq!(mesh.near.shared.tunnels(), 0);
    });
}

#[test]
fn a_proxy_that_is_not_whom_it_should_be_gets_nothing() {
    in_namespace(async || {
        let mesh = Mesh::new().await;
        serve_echo(SERVER, 8080).await;
        mesh.near.change(|directory| {
            directory.put_workload(Workload {
                hbone: Some(identity("somebody-else")),
                ..endpoint("server", SERVER)
            });
        });
        let refused = refusal(dial(CLIENT, at(VIP, 80)).await).await;
        assert_eq!(refused, ErrorKind::ConnectionReset);
    });
}

#[test]
fn without_a_proxy_on_the_other_side_nothing_goes_in_plaintext() {
    in_namespace(async || {
        let mesh = Mesh::new().await;
        mesh.far.listen(&[]);
        tokio::task::yield_now().await;
        let listener = TcpListener::bind(at(SERVER, 8080)).await.unwrap();
        let refused = refusal(dial(CLIENT, at(SERVER, 8080)).await).await;
        assert_eq!(refused, ErrorKind::ConnectionReset);
        let accepted = tokio::time::timeout(Duration::from_millis(50), listener.accept()).await;
        assert!(accepted.is_err(), "the server was reached");
    });
}

#[test]
fn a_proxy_that_comes_a_moment_later_is_waited_for() {
    in_namespace(async || {
        let mesh = Mesh::new().await;
        mesh.far.listen(&[]);
        serve_echo(SERVER, 8080).await;
        let stream = dial(CLIENT, at(SERVER, 8080)).await.unwrap();
        let answer = tokio::spawn(talk(stream, "x"));
        tokio::time::sleep(Duration::from_millis(250)).await;
        mesh.far.listen(&FAR);
        assert_eq!(answer.await.unwrap().unwrap(), greeting(CLIENT, "x"));
    });
}

#[test]
fn connections_wait_for_the_first_directory() {
    in_namespace(async || {
        let authority = authority::Authority::new("the root");
        let near = Node::undiscovered(&authority, [pod("client", CLIENT)], &NEAR).await;
        serve_echo(OUTSIDE, 443).await;
        let stream = dial(CLIENT, at(OUTSIDE, 443)).await.unwrap();
        let mut answer = tokio::spawn(talk(stream, "x"));
        let early = tokio::time::timeout(Duration::from_millis(300), &mut answer).await;
        assert!(early.is_err(), "nobody knew yet whether it is in the mesh");
        near.shared.set_discovered();
        assert_eq!(answer.await.unwrap().unwrap(), greeting(CLIENT, "x"));
    });
}

#[test]
fn strangers_and_what_was_not_redirected_are_closed() {
    in_namespace(async || {
        let _mesh = Mesh::new().await;
        serve_echo(OUTSIDE, 443).await;
        let stranger = refusal(dial(OUTSIDE, at(OUTSIDE, 443)).await).await;
        assert_eq!(stranger, ErrorKind::ConnectionReset);
        for port in [15001, 15006] {
            let direct = refusal(dial_directly(CLIENT, at(PROXY, port)).await).await;
            assert_eq!(direct, ErrorKind::ConnectionReset);
        }
        let own = refusal(dial(CLIENT, at(PROXY, 15001)).await).await;
        assert_eq!(own, ErrorKind::ConnectionReset);
    });
}

#[test]
fn a_service_without_endpoints_refuses_at_once() {
    in_namespace(async || {
        let mesh = Mesh::new().await;
        mesh.near
            .change(|directory| directory.remove_workload("server", Instant::now()));
        let start = Instant::now();
        let refused = refusal(dial(CLIENT, at(VIP, 80)).await).await;
        assert_eq!(refused, ErrorKind::ConnectionReset);
        assert!(start.elapsed() < Duration::from_secs(1));
    });
}

#[test]
fn plaintext_from_outside_is_passed_on_unless_a_policy_wants_an_identity() {
    in_namespace(async || {
        let mesh = Mesh::new().await;
        serve_echo(SERVER, 8080).await;
        let stream = dial_plainly(OUTSIDE, at(SERVER, 8080)).await.unwrap();
        assert_eq!(talk(stream, "x").await.unwrap(), greeting(OUTSIDE, "x"));
        let strict = Policy {
            action: PolicyAction::Deny,
            rules: vec![vec![vec![Match {
                not_principals: vec![Text::Present],
                ..Match::default()
            }]]],
            ..Policy::default()
        };
        mesh.far
            .change(|directory| directory.put_policy("shop/strict".into(), strict));
        let refused = refusal(dial_plainly(OUTSIDE, at(SERVER, 8080)).await).await;
        assert_eq!(refused, ErrorKind::ConnectionReset);
        let stream = dial(CLIENT, at(VIP, 80)).await.unwrap();
        assert_eq!(talk(stream, "x").await.unwrap(), greeting(CLIENT, "x"));
    });
}

#[test]
fn a_half_that_ended_stays_half_closed() {
    in_namespace(async || {
        let (_mesh, mut client, mut server) = pair().await;
        client.write_all(b"request").await.unwrap();
        client.shutdown().await.unwrap();
        let mut request = String::new();
        server.read_to_string(&mut request).await.unwrap();
        assert_eq!(request, "request");
        server.write_all(b"answer").await.unwrap();
        let mut answer = [0; 6];
        client.read_exact(&mut answer).await.unwrap();
        server.shutdown().await.unwrap();
        assert_eq!(client.read(&mut answer).await.unwrap(), 0);
    });
}

#[test]
fn the_server_may_close_its_half_first() {
    in_namespace(async || {
        let (_mesh, mut client, mut server) = pair().await;
        server.shutdown().await.unwrap();
        assert_eq!(client.read(&mut [0; 1]).await.unwrap(), 0);
        client.write_all(b"still here").await.unwrap();
        client.shutdown().await.unwrap();
        let mut rest = String::new();
        server.read_to_string(&mut rest).await.unwrap();
        assert_eq!(rest, "still here");
    });
}

#[test]
fn a_reset_arrives_as_a_reset_both_ways() {
    in_namespace(async || {
        let (_mesh, mut client, mut server) = pair().await;
        server.write_all(b"half of").await.unwrap();
        let mut begun = [0; 7];
        client.read_exact(&mut begun).await.unwrap();
        server.set_zero_linger().unwrap();
        drop(server);
        let end = client.read(&mut begun).await.map_err(|error| error.kind());
        assert_eq!(end, Err(ErrorKind::ConnectionReset));
    });
    in_namespace(async || {
        let (_mesh, client, mut server) = pair().await;
        client.set_zero_linger().unwrap();
        drop(client);
        let end = server.read(&mut [0; 1]).await.map_err(|error| error.kind());
        assert_eq!(end, Err(ErrorKind::ConnectionReset));
    });
}

#[test]
fn a_reset_after_the_servers_half_ended_is_noticed() {
    in_namespace(async || {
        let (_mesh, mut client, mut server) = pair().await;
        server.shutdown().await.unwrap();
        assert_eq!(client.read(&mut [0; 1]).await.unwrap(), 0);
        server.set_zero_linger().unwrap();
        drop(server);
        // Not by a read, for that half has ended: a client that only sends must notice.
        let failed = async {
            loop {
                if let Err(error) = client.write_all(b"x").await {
                    return error.kind();
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let failed = tokio::time::timeout(Duration::from_secs(5), failed)
            .await
            .unwrap();
        assert!(
            matches!(failed, ErrorKind::BrokenPipe | ErrorKind::ConnectionReset),
            "{failed}"
        );
    });
}

#[test]
fn a_hundred_thousand_writes_of_one_byte_arrive_and_harm_nobody() {
    in_namespace(async || {
        const WRITES: usize = 100_000;
        let (mesh, mut client, mut server) = pair().await;
        let write = tokio::spawn(async move {
            for number in 0..WRITES {
                client.write_all(&[number as u8]).await.unwrap();
                // Lets the proxy see every byte on its own.
                tokio::task::yield_now().await;
            }
            client.shutdown().await.unwrap();
            client
        });
        let mut all = Vec::new();
        server.read_to_end(&mut all).await.unwrap();
        assert_eq!(all.len(), WRITES);
        assert!(
            all.iter()
                .enumerate()
                .all(|(number, byte)| *byte == number as u8)
        );
        drop(write.await.unwrap());
        assert_eq!(mesh.near.shared.tunnels(), 1);
    });
}

#[test]
fn much_data_arrives_whole_both_ways_at_once() {
    in_namespace(async || {
        const SIZE: usize = 32 << 20;
        let (_mesh, client, server) = pair().await;
        let pattern = |seed: usize| {
            (0..SIZE / 8).flat_map(move |n| (n.wrapping_mul(seed) as u64).to_le_bytes())
        };
        let exchange = |stream: TcpStream, out: usize, back: usize| async move {
            let (mut read, mut write) = stream.into_split();
            let sent: Vec<u8> = pattern(out).collect();
            let send = tokio::spawn(async move {
                write.write_all(&sent).await.unwrap();
                write.shutdown().await.unwrap();
            });
            let mut all = Vec::new();
            read.read_to_end(&mut all).await.unwrap();
            send.await.unwrap();
            assert!(all.len() == SIZE && all.into_iter().eq(pattern(back)));
        };
        tokio::join!(exchange(client, 7, 9), exchange(server, 9, 7));
    });
}

#[test]
fn a_slow_reader_holds_up_its_own_connection_only() {
    in_namespace(async || {
        let mesh = Mesh::new().await;
        let listener = TcpListener::bind(at(SERVER, 8080)).await.unwrap();
        let mut bulky = dial(CLIENT, at(VIP, 80)).await.unwrap();
        let (mut sink, _) = listener.accept().await.unwrap();
        let block = vec![0_u8; 1 << 20];
        let mut taken = 0;
        while let Ok(written) =
            tokio::time::timeout(Duration::from_millis(500), bulky.write(&block)).await
        {
            taken += written.unwrap();
            assert!(taken < 200 << 20, "nothing holds the writer back");
        }
        let mut other = dial(CLIENT, at(VIP, 80)).await.unwrap();
        let (mut echo, _) = listener.accept().await.unwrap();
        other.write_all(b"hello").await.unwrap();
        let mut hello = [0; 5];
        echo.read_exact(&mut hello).await.unwrap();
        assert_eq!(mesh.near.shared.tunnels(), 1, "both are in one tunnel");
        bulky.shutdown().await.unwrap();
        let read = tokio::io::copy(&mut sink, &mut tokio::io::sink())
            .await
            .unwrap();
        assert_eq!(read, taken as u64);
    });
}

#[test]
fn the_hundred_and_first_stream_opens_a_second_tunnel() {
    in_namespace(async || {
        let mesh = Mesh::new().await;
        serve_echo(SERVER, 8080).await;
        let mut open = Vec::new();
        for _ in 0..150 {
            let mut stream = dial(CLIENT, at(VIP, 80)).await.unwrap();
            greeted(&mut stream, CLIENT).await;
            open.push(stream);
        }
        assert_eq!(mesh.near.shared.tunnels(), 2);
    });
}

#[test]
fn a_proxy_that_ends_lets_its_connections_finish() {
    in_namespace(async || {
        let mesh = Mesh::new().await;
        serve_echo(SERVER, 8080).await;
        let mut open = dial(CLIENT, at(VIP, 80)).await.unwrap();
        greeted(&mut open, CLIENT).await;
        let ending = mesh.far.server;
        let drain = tokio::spawn(async move { ending.drain(Duration::from_secs(20)).await });
        // The successor takes over the ports.
        tokio::time::sleep(Duration::from_millis(50)).await;
        let successor = Node::new(&mesh.authority, [pod("server", SERVER)], &FAR).await;
        let stream = dial(CLIENT, at(VIP, 80)).await.unwrap();
        assert_eq!(talk(stream, "new").await.unwrap(), greeting(CLIENT, "new"));
        assert_eq!(successor.shared.connections(), 0);
        assert!(!drain.is_finished(), "one connection is still open");
        assert_eq!(talk(open, "old").await.unwrap(), "old");
        assert_eq!(drain.await.unwrap(), 0, "nothing was cut");
    });
}

#[test]
fn each_family_is_kept_from_end_to_end() {
    in_dual_stack_namespace(async || {
        let (log, _guard) = Log::start();
        let mesh = Mesh::new().await;
        let hosts = [CLIENT, SERVER, NEIGHBOUR, OUTSIDE, VIP];
        for [client, server, neighbour, outside, vip] in [
            hosts.map(|host| IpAddr::from(host.v4)),
            hosts.map(|host| IpAddr::from(host.v6)),
        ] {
            for ip in [server, neighbour, outside] {
                serve_echo(ip, 8080).await;
                let stream = dial(client, at(ip, 8080)).await.unwrap();
                assert_eq!(talk(stream, "x").await.unwrap(), greeting(client, "x"));
            }
            let stream = dial(client, at(vip, 80)).await.unwrap();
            assert_eq!(talk(stream, "x").await.unwrap(), greeting(client, "x"));
            let stream = dial_plainly(outside, at(server, 8080)).await.unwrap();
            assert_eq!(talk(stream, "x").await.unwrap(), greeting(outside, "x"));
        }
        assert_eq!(mesh.near.shared.tunnels(), 2, "one for each family");
        // The log of a connection may come after its end.
        while mesh.near.shared.connections() + mesh.far.shared.connections() > 0 {
            tokio::task::yield_now().await;
        }
        let log = log.take();
        assert!(log.contains("src.addr=10.1.0.1:") && log.contains("src.addr=[fd00:1::1]:"));
        assert!(log.contains("dst.addr=[fd00:2::1]:8080"), "{log}");
        assert!(!log.contains("::ffff:"), "{log}");
    });
}

#[test]
fn a_source_port_serves_many_destinations_at_a_time() {
    in_namespace(async || {
        let _mesh = Mesh::new().await;
        std::fs::write("/proc/sys/net/ipv4/ip_local_port_range", "40000 40000").unwrap();
        let mut open = Vec::new();
        for port in [441, 442, 443] {
            serve_echo(OUTSIDE, port).await;
            let from = at(CLIENT, 30_000 + port);
            let mut stream = dial_from(from, at(OUTSIDE, port)).await.unwrap();
            greeted(&mut stream, CLIENT).await;
            open.push(stream);
        }
    });
}

#[test]
fn a_listener_that_somebody_ended_from_outside_listens_again() {
    in_namespace(async || {
        let (log, _guard) = Log::start();
        let mesh = Mesh::new().await;
        serve_echo(SERVER, 8080).await;
        let end = |port: u16| run(&format!("ss -K state listening sport = :{port}"));
        for port in [15001, 15008] {
            end(port);
        }
        let start = Instant::now();
        let answer = loop {
            match dial(CLIENT, at(VIP, 80)).await {
                Ok(stream) => break talk(stream, "again").await.unwrap(),
                Err(error) => assert!(start.elapsed() < Duration::from_secs(5), "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        assert_eq!(answer, greeting(CLIENT, "again"), "{}", log.take());
        drop(mesh);
    });
}
