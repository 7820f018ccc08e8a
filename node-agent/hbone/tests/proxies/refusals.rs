//! What the inbound listener refuses, with which code, and what its log says.

use std::sync::{Arc, Mutex};

use crate::bed::authority::{Authority, handshake, http2};
use crate::bed::*;
use bytes::Bytes;
use h2::client::SendRequest;
use hbone::policy::{Match, Policy, PolicyAction, Text};
use http::{Method, Request, StatusCode};
use tokio::io::AsyncReadExt;
use tracing::subscriber::DefaultGuard;

const CLIENT_ID: &str = "spiffe://td/ns/shop/sa/client";

/// What was logged by this thread.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    fn start() -> (Self, DefaultGuard) {
        let log = Self::default();
        let writer = log.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_ansi(false)
            .with_writer(move || writer.clone())
            .finish();
        (log, tracing::subscriber::set_default(subscriber))
    }

    fn take(&self) -> String {
        String::from_utf8(std::mem::take(&mut self.0.lock().unwrap())).unwrap()
    }
}

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

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
    let stream = dial_directly(CLIENT, at(SERVER, 15008)).await.unwrap();
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

        assert_eq!(connect(proxy, "10.2.0.1:8080").await.0, 200);
        for (authority, status, why) in [
            (
                "10.1.0.2:8080",
                400,
                "is not the address of the destination pod",
            ),
            ("web.shop:80", 400, "is no address and port"),
            ("10.2.0.1:9", 503, "Connection refused"),
            ("10.2.0.1:15001", 503, "port 15001 is the proxy's own"),
            ("10.2.0.1:15006", 503, "port 15006 is the proxy's own"),
            ("10.2.0.1:15008", 503, "port 15008 is the proxy's own"),
        ] {
            let (got, said) = connect(proxy, authority).await;
            assert_eq!(got, status, "{authority}");
            assert!(said.contains(why), "{authority}: {said}");
            assert!(
                said.contains(&format!("src.identity={CLIENT_ID}")),
                "{said}"
            );
        }
        let get = ask(proxy, Method::GET, "https://10.2.0.1:8080/").await;
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
        let (denied, said) = connect(proxy, "10.2.0.1:8080").await;
        assert_eq!(denied, 401);
        assert!(said.contains("denied by policy shop/deny"), "{said}");
        mesh.far
            .change(|directory| directory.remove_policy("shop/deny"));

        mesh.far
            .set_pods(&mesh.authority, [pod("other", SERVER)])
            .await;
        let (gone, said) = connect(proxy, "10.2.0.1:8080").await;
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
        let request = Request::connect("10.2.0.1:8080").body(()).unwrap();
        let (answer, _send) = proxy.send_request(request, false).unwrap();
        let answer = answer.await.unwrap();
        let baggage = answer.headers()["baggage"].to_str().unwrap();
        assert!(
            baggage.contains("k8s.namespace.name=shop,k8s.pod.name=server"),
            "{baggage}"
        );
        let greeting = answer.into_body().data().await.unwrap().unwrap();
        assert_eq!(&*greeting, b"10.1.0.1\n");
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
