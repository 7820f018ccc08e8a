//! What fuzz targets call: whatever reads bytes of strangers.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::registry::Registry;
use rcgen::KeyPair;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::identity::{SpiffeId, TrustDomain};
use crate::local::LocalWorkload;
use crate::{Settings, Shared, authority, certificates, inbound, tls, tunnel};

/// How long a peer's bytes may be worked on.
const LIMIT: Duration = Duration::from_secs(5);

/// What a client of HTTP/2 begins with, which no fuzzer has to find.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Reads an identity; what is read is written the same.
pub fn identity(text: &str) {
    if let Ok(identity) = text.parse::<SpiffeId>() {
        assert_eq!(identity.to_string(), text);
    }
}

/// Reads where a CONNECT leads; what is read is written so that it is read the same.
pub fn authority(text: &str) {
    if let Some(to) = authority::parse(text) {
        assert_eq!(authority::parse(&authority::format(to)), Some(to));
    }
}

/// Reads a peer's certificate, and a controller's answer to a request for one.
pub fn certificates(bytes: &[u8]) {
    drop(tls::identity_of(bytes));
    let answer: Vec<String> = String::from_utf8_lossy(bytes)
        .split('\0')
        .map(str::to_owned)
        .collect();
    thread_local! {
        static KEY: KeyPair = own_key();
    }
    KEY.with(|key| drop(certificates::accept(&web(), key, &answer)));
}

/// Serves a peer that sends this, once TLS is done.
#[allow(
    clippy::expect_used,
    reason = "without a runtime there is nothing to show"
)]
pub fn requests(bytes: &[u8]) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let (mut peer, stream) = tokio::io::duplex(1 << 16);
        let (mut answers, mut questions) = tokio::io::split(&mut peer);
        let served = async {
            if let Ok(connection) = tunnel::accept(stream).await {
                let shared = Shared::new(settings(), &mut Registry::default());
                // The pod is not among the node's: nothing is dialled.
                let ends = Arc::new(ends());
                inbound::serve_requests(&shared, connection, ends).await;
            }
        };
        let asked = async {
            // The other side may end at any byte.
            if questions.write_all(PREFACE).await.is_ok() {
                drop(questions.write_all(bytes).await);
            }
            drop(questions.shutdown().await);
        };
        let heard = async { drop(answers.read_to_end(&mut Vec::new()).await) };
        let all = async { tokio::join!(served, asked, heard) };
        let done = tokio::time::timeout(LIMIT, all).await;
        assert!(done.is_ok(), "a peer that has ended is served for ever");
    });
}

#[allow(clippy::expect_used, reason = "they are")]
fn ends() -> inbound::Ends {
    let own: SocketAddr = "10.0.0.1:15008".parse().expect("an address");
    let pod = LocalWorkload {
        uid: "web".into(),
        namespace: "shop".into(),
        name: "web".into(),
        identity: web(),
        addresses: vec![own.ip()],
    };
    inbound::Ends {
        client: web(),
        source: "10.0.0.2:40000".parse().expect("an address"),
        destination: own,
        workload: Arc::new(pod),
    }
}

fn settings() -> Settings {
    Settings {
        trust_domain: trust_domain(),
        cluster: "Kubernetes".to_owned(),
    }
}

#[allow(clippy::expect_used, reason = "it is one")]
fn trust_domain() -> TrustDomain {
    TrustDomain::new("cluster.local").expect("a trust domain")
}

#[allow(clippy::expect_used, reason = "it is one")]
fn web() -> SpiffeId {
    SpiffeId::new(&trust_domain(), "shop", "web").expect("an identity")
}

#[allow(clippy::expect_used, reason = "without a key there is nothing to show")]
fn own_key() -> KeyPair {
    KeyPair::generate().expect("a key")
}
