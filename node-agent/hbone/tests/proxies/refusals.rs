//! What the inbound listener refuses, with which code, and what its log says.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use crate::bed::authority::{Authority, handshake, http2};
use crate::bed::log::Log;
use crate::bed::*;
use bytes::Bytes;
use h2::client::SendRequest;
use hbone::policy::{Match, Policy, PolicyAction, Text};
use http::{Method, Request, StatusCode};
use socket2::{Domain, Socket, Type};
use tokio::io::AsyncReadExt;

const CLIENT_ID: &str = "spiffe://td/ns/shop/sa/client";

/// Tries to get in with a certificate; gives what the proxy's log says.
async fn refused_handshake(log: &Log, certificate: Option<(&Authority, &[&str])>) -> String {
    let certificate = certificate.map(|(authority, names)| authority.issue(names));
    let stream = dial_directly(CLIENT, at(SERVER, 15008)).await.unwrap();
    // With TLS 1.3 a client learns of a refusal when it reads.
    let read = match handshake(stream, certificate).await {
        Ok(mut tls) => tls.read(&mut [0; 1024]).await,
        Err(error) => Err(error),
    };
    // The settings of HTTP/2 would be something.
    let read = read.unwrap_or_default();
    assert_eq!(read, 0, "it got in");
    log.take()
}

#[test]
fn peers_without_a_good_certificate_are_refused_and_the_log_says_why() {
    in_namespace(async || {
        let (log, _guard) = Log::start();
        let mesh = Mesh::new().await;
        let ours = &*mesh.authority;
        let others = Authority::new("another root");
        log.take();
        let none = refused_handshake(&log, None).await;
        assert!(none.contains("peer sent no certificates"), "{none}");
        let elsewhere = "spiffe://elsewhere/ns/shop/sa/client";
        let domain = refused_handshake(&log, Some((ours, &[elsewhere]))).await;
        let why = format!("{elsewhere} is not of this trust domain (td)");
        assert!(domain.contains(&why), "{domain}");
        let root = refused_handshake(&log, Some((&others, &[CLIENT_ID]))).await;
        assert!(root.contains("UnknownIssuer"), "{root}");
        let two = refused_handshake(&log, Some((ours, &[CLIENT_ID, elsewhere]))).await;
        assert!(two.contains("2 URI names"), "{two}");
        let other_form = refused_handshake(&log, Some((ours, &["spiffe://td/client"]))).await;
        assert!(other_form.contains("is not spiffe://"), "{other_form}");
        for line in [none, domain, root, two, other_form] {
            assert!(line.contains("access: connection failed"), "{line}");
            assert!(
                line.contains(&format!("dst.addr={}", at(SERVER, 15008))),
                "{line}"
            );
            assert!(line.contains("direction=\"inbound\""), "{line}");
        }
    });
}

#[test]
fn a_client_that_expected_somebody_else_says_so_in_its_log() {
    in_namespace(async || {
        let (log, _guard) = Log::start();
        let mesh = Mesh::new().await;
        mesh.near.change(|directory| {
            directory.put_workload(hbone::directory::Workload {
                hbone: Some(identity("somebody-else")),
                ..endpoint("server", SERVER)
            });
        });
        log.take();
        refusal(dial(CLIENT, at(VIP, 80)).await).await;
        let log = log.take();
        let why = "the peer is spiffe://td/ns/shop/sa/server, \
                   expected is spiffe://td/ns/shop/sa/somebody-else";
        assert!(log.contains(why), "{log}");
    });
}

async fn get_in(mesh: &Mesh) -> SendRequest<Bytes> {
    get_in_from(mesh, CLIENT.into(), at(SERVER, 15008)).await
}

async fn get_in_from(mesh: &Mesh, client: IpAddr, proxy: SocketAddr) -> SendRequest<Bytes> {
    let stream = dial_directly(client, proxy).await.unwrap();
    let certificate = mesh.authority.issue(&[CLIENT_ID]);
    http2(handshake(stream, Some(certificate)).await.unwrap())
        .await
        .unwrap()
}

async fn ask(proxy: &mut SendRequest<Bytes>, method: Method, uri: &str) -> StatusCode {
    let request = Request::builder().method(method).uri(uri).body(()).unwrap();
    let (answer, _send) = proxy.send_request(request, false).unwrap();
    answer.await.unwrap().status()
}

#[test]
fn requests_get_the_codes_of_the_field_and_the_log_says_why() {
    in_namespace(async || {
        let (log, _guard) = Log::start();
        let mesh = Mesh::new().await;
        serve_echo(SERVER, 8080).await;
        let proxy = &mut get_in(&mesh).await;
        let connect = async |proxy: &mut SendRequest<Bytes>, authority: &str| {
            log.take();
            let status = ask(proxy, Method::CONNECT, authority).await;
            (status.as_u16(), log.take())
        };

        let server = |port| at(SERVER, port).to_string();
        assert_eq!(connect(proxy, &server(8080)).await.0, 200);
        for (authority, status, why) in [
            (
                &*at(NEIGHBOUR, 8080).to_string(),
                400,
                "is not an address of the destination pod",
            ),
            ("web.shop:80", 400, "is no address and port"),
            (&server(9), 503, "Connection refused"),
            (&server(15001), 503, "port 15001 is the proxy's own"),
            (&server(15006), 503, "port 15006 is the proxy's own"),
            (&server(15008), 503, "port 15008 is the proxy's own"),
        ] {
            let (got, said) = connect(proxy, authority).await;
            assert_eq!(got, status, "{authority}");
            assert!(said.contains(why), "{authority}: {said}");
            assert!(
                said.contains(&format!("src.identity={CLIENT_ID}")),
                "{said}"
            );
        }
        let page = format!("https://{}/", server(8080));
        let get = ask(proxy, Method::GET, &page).await;
        assert_eq!(get, StatusCode::BAD_REQUEST);

        let deny = Policy {
            action: PolicyAction::Deny,
            rules: vec![vec![vec![Match {
                principals: vec![Text::Suffix("/sa/client".to_owned())],
                ..Match::default()
            }]]],
            ..Policy::default()
        };
        mesh.far
            .change(|directory| directory.put_policy("shop/deny".into(), deny));
        let (denied, said) = connect(proxy, &server(8080)).await;
        assert_eq!(denied, 401);
        assert!(said.contains("denied by policy shop/deny"), "{said}");
        mesh.far
            .change(|directory| directory.remove_policy("shop/deny"));

        mesh.far
            .set_pods(&mesh.authority, [pod("other", SERVER)])
            .await;
        let (gone, said) = connect(proxy, &server(8080)).await;
        assert_eq!(gone, 503, "the address is another pod's now");
        assert!(said.contains("no longer in the mesh"), "{said}");
    });
}

#[test]
fn an_accepted_request_says_who_is_there() {
    in_namespace(async || {
        let mesh = Mesh::new().await;
        serve_echo(SERVER, 8080).await;
        let mut proxy = get_in(&mesh).await;
        let request = Request::connect(at(SERVER, 8080).to_string())
            .body(())
            .unwrap();
        let (answer, _send) = proxy.send_request(request, false).unwrap();
        let answer = answer.await.unwrap();
        let baggage = answer.headers()["baggage"].to_str().unwrap();
        assert!(
            baggage.contains("k8s.namespace.name=shop,k8s.pod.name=server"),
            "{baggage}"
        );
        let greeting = answer.into_body().data().await.unwrap().unwrap();
        assert_eq!(greeting, format!("{CLIENT}\n"));
    });
}

#[test]
fn a_pod_that_is_not_in_the_mesh_is_not_served() {
    in_namespace(async || {
        let (log, _guard) = Log::start();
        let mesh = Mesh::new().await;
        log.take();
        let stream = dial_directly(CLIENT, at(OUTSIDE, 15008)).await.unwrap();
        let certificate = mesh.authority.issue(&[CLIENT_ID]);
        assert!(handshake(stream, Some(certificate)).await.is_err());
        let log = log.take();
        assert!(
            log.contains("no pod of this node that is in the mesh has this address"),
            "{log}"
        );
    });
}

#[test]
fn a_pod_of_both_families_is_named_by_either_but_called_by_one() {
    in_dual_stack_namespace(async || {
        let (log, _guard) = Log::start();
        let mesh = Mesh::new().await;
        serve_echo(SERVER.v4, 8080).await;
        serve_echo(SERVER.v6, 8080).await;
        let [v4, v6] = [at(SERVER.v4, 8080), at(SERVER.v6, 8080)];
        let mapped = at(SERVER.v4.to_ipv6_mapped(), 8080);
        let other = "one is IPv4, the other IPv6";
        for (client, proxy, authority, status, why) in [
            (IpAddr::from(CLIENT.v4), at(SERVER.v4, 15008), v4, 200, ""),
            (CLIENT.v4.into(), at(SERVER.v4, 15008), v6, 400, other),
            (CLIENT.v6.into(), at(SERVER.v6, 15008), v6, 200, ""),
            (CLIENT.v6.into(), at(SERVER.v6, 15008), v4, 400, other),
            (
                CLIENT.v4.into(),
                at(SERVER.v4, 15008),
                mapped,
                400,
                "is no address and port",
            ),
            (
                CLIENT.v6.into(),
                at(SERVER.v6, 15008),
                at(NEIGHBOUR.v6, 8080),
                400,
                "is not an address of the destination pod",
            ),
        ] {
            let mut inside = get_in_from(&mesh, client, proxy).await;
            log.take();
            let got = ask(&mut inside, Method::CONNECT, &authority.to_string()).await;
            let said = log.take();
            assert_eq!(got.as_u16(), status, "{proxy} {authority}");
            assert!(said.contains(why), "{proxy} {authority}: {said}");
        }
    });
}

#[test]
fn an_endpoint_of_the_other_family_only_is_refused_at_once_and_counted() {
    in_dual_stack_namespace(async || {
        let (log, _guard) = Log::start();
        let mesh = Mesh::new().await;
        serve_echo(SERVER.v4, 8080).await;
        let only_v4 = hbone::directory::Workload {
            addresses: vec![SERVER.v4.into()],
            ..endpoint("server", SERVER)
        };
        mesh.near
            .change(|directory| directory.put_workload(only_v4));
        log.take();
        let refused = refusal(dial(CLIENT.v6, at(VIP.v6, 80)).await).await;
        assert_eq!(refused, ErrorKind::ConnectionReset);
        let said = log.take();
        assert!(said.contains("none with an IPv6 address"), "{said}");
        assert!(said.contains("src.addr=[fd00:1::1]:"), "{said}");
        let counted = mesh.near.metric("istio_tcp_connections_failed_total");
        assert!(
            counted.contains("response_flags=\"ADDRESS_FAMILY\""),
            "{counted}"
        );
        let stream = dial(CLIENT.v4, at(VIP.v4, 80)).await.unwrap();
        assert!(talk(stream, "x").await.unwrap().ends_with("\nx"));
    });
}

#[test]
fn a_port_that_is_taken_in_one_family_is_not_listened_on_in_the_other() {
    in_dual_stack_namespace(async || {
        let mesh = Mesh::new().await;
        mesh.near.listen(&[]);
        tokio::task::yield_now().await;
        let taken = Socket::new(Domain::IPV6, Type::STREAM, None).unwrap();
        taken.set_only_v6(true).unwrap();
        let address = "[::]:15001".parse::<SocketAddr>().unwrap().into();
        once_free(|| taken.bind(&address));
        taken.listen(1).unwrap();
        let results = mesh.near.server.listen(&NEAR.into());
        let error = results[&NEAR[0]].as_ref().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AddrInUse);
        let v4 = dial_directly(OUTSIDE.v4, at(Ipv4Addr::LOCALHOST, 15001)).await;
        assert_eq!(v4.unwrap_err().kind(), ErrorKind::ConnectionRefused);
        drop(taken);
        mesh.near.listen(&NEAR);
    });
}
