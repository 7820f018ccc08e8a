//! Discovery and certificates with a real client over TLS on loopback. Only the API server's
//! review of tokens is played.

use http::{Request, Response};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewStatus, UserInfo};
use kube::client::Body;
use protocol::certificate::istio_certificate_service_client::IstioCertificateServiceClient;
use protocol::certificate::{IstioCertificateRequest, IstioCertificateResponse};
use protocol::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use protocol::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use protocol::{ADDRESS_TYPE, AUTHORIZATION_TYPE};
use rcgen::{CertificateParams, KeyPair};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::sync::watch;
use tokio_rustls::TlsConnector;
use tonic::metadata::MetadataValue;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Status, Streaming};

use super::*;
use crate::authenticate::{Authenticator, Expected};
use crate::ca::{CaPem, new_root};
use crate::metrics::Metrics;
use crate::model::Model;
use crate::snapshot::{Change, Update};
use crate::testing::{Cluster, facts, pod, set_pod};

const NAME: &str = "ambit-controller.ambit-system.svc";
const DAY: Duration = Duration::from_secs(24 * 3600);
const WEB: &str = "spiffe://example.org/ns/shop/sa/web";

/// A controller on loopback, without an API server.
struct Controller {
    address: std::net::SocketAddr,
    cluster: Cluster,
    publish: watch::Sender<Option<Arc<Model>>>,
    ca: watch::Sender<Arc<Ca>>,
    metrics: Metrics,
    stop: CancellationToken,
    served: tokio::task::JoinHandle<Result<(), ServeError>>,
}

impl Controller {
    async fn start() -> Self {
        let cluster = Cluster::with([set_pod(pod("a", "10.0.0.1"))]);
        let (publish, published) = watch::channel(Some(Arc::new(model(&cluster))));
        let (ca, current) = watch::channel(Arc::new(new_ca()));
        let names = vec![NAME.to_owned()];
        let (certificate, renew_at) =
            ServingCertificate::new(&current.borrow(), names, DAY).unwrap();
        let problems = Problems::default();
        tokio::spawn(
            certificate
                .clone()
                .renew(current.clone(), renew_at, problems.clone()),
        );
        let authenticator = Arc::new(Authenticator::new(
            kube::Client::new(tower::service_fn(review), "default"),
            Expected::new("istio-ca", "ambit-system", "ambit-proxy"),
            problems,
        ));
        let (stop, metrics) = (CancellationToken::new(), Metrics::default());
        let discovery = Discovery::new(
            authenticator.clone(),
            published.clone(),
            metrics.clone(),
            stop.clone(),
        );
        let certificates = Certificates {
            authenticator,
            published,
            facts: facts(),
            ca: current,
            validity: DAY,
            metrics: metrics.clone(),
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let served = serve(listener, certificate, discovery, certificates, stop.clone());
        Self {
            address,
            cluster,
            publish,
            ca,
            metrics,
            stop,
            served: tokio::spawn(served),
        }
    }

    fn change(&mut self, update: Update) {
        self.cluster.apply(update);
        self.publish
            .send_replace(Some(Arc::new(model(&self.cluster))));
    }

    /// A connection that trusts these roots only.
    async fn connect(&self, roots: &str) -> Result<Channel, tonic::transport::Error> {
        let mut store = RootCertStore::empty();
        for root in CertificateDer::pem_slice_iter(roots.as_bytes()) {
            store.add(root.unwrap()).unwrap();
        }
        let provider = Arc::new(aws_lc_rs::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(store)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        let connector = TlsConnector::from(Arc::new(config));
        let address = self.address;
        let connect = tower::service_fn(move |_: Uri| {
            let connector = connector.clone();
            async move {
                let stream = TcpStream::connect(address).await?;
                let name = ServerName::try_from(NAME).unwrap();
                Ok::<_, std::io::Error>(TokioIo::new(connector.connect(name, stream).await?))
            }
        });
        // The connector does the TLS, so the scheme must not ask for it again.
        Endpoint::from_static("http://controller")
            .connect_with_connector(connect)
            .await
    }

    async fn channel(&self) -> Channel {
        let roots = self.ca.borrow().roots_pem();
        self.connect(&roots).await.unwrap()
    }
}

fn model(cluster: &Cluster) -> Model {
    Model {
        snapshot: cluster.snapshot.clone(),
        directory: cluster.directory.clone(),
    }
}

fn new_ca() -> Ca {
    let root = new_root("example.org", SystemTime::now()).unwrap();
    let pem = CaPem {
        certificate: root.certificate.as_bytes(),
        key: root.key.as_bytes(),
        roots: None,
    };
    Ca::parse(&pem, SystemTime::now()).unwrap()
}

/// Plays the API server: a token `proxy-on-NODE` is the proxy of that node.
async fn review(request: Request<Body>) -> Result<Response<Body>, std::convert::Infallible> {
    let body = request.into_body().collect_bytes().await.unwrap();
    let mut review: TokenReview = serde_json::from_slice(&body).unwrap();
    let token = review.spec.token.clone().unwrap();
    let extra = |key: &str, value: &str| {
        let key = format!("authentication.kubernetes.io/{key}");
        (key, vec![value.to_owned()])
    };
    review.status = Some(match token.strip_prefix("proxy-on-") {
        None => TokenReviewStatus {
            error: Some("unknown token".to_owned()),
            ..TokenReviewStatus::default()
        },
        Some(node) => TokenReviewStatus {
            authenticated: Some(true),
            audiences: review.spec.audiences.clone(),
            user: Some(UserInfo {
                username: Some("system:serviceaccount:ambit-system:ambit-proxy".to_owned()),
                extra: Some(
                    [
                        extra("node-name", node),
                        extra("pod-name", "proxy-x"),
                        extra("pod-uid", "uid-x"),
                    ]
                    .into(),
                ),
                ..UserInfo::default()
            }),
            error: None,
        },
    });
    let body = serde_json::to_vec(&review).unwrap();
    Ok(Response::new(Body::from(body)))
}

fn with_token<T>(message: T, token: &str) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    let value: MetadataValue<_> = format!("Bearer {token}").parse().unwrap();
    request.metadata_mut().insert("authorization", value);
    request
}

async fn sign(
    channel: Channel,
    token: &str,
    identity: &str,
) -> Result<IstioCertificateResponse, Status> {
    let key = KeyPair::generate().unwrap();
    let csr = CertificateParams::default()
        .serialize_request(&key)
        .unwrap();
    let identity = prost_types::Value {
        kind: Some(prost_types::value::Kind::StringValue(identity.to_owned())),
    };
    let request = IstioCertificateRequest {
        csr: csr.pem().unwrap(),
        validity_duration: 3600,
        metadata: Some(prost_types::Struct {
            fields: [("ImpersonatedIdentity".to_owned(), identity)].into(),
        }),
    };
    IstioCertificateServiceClient::new(channel)
        .create_certificate(with_token(request, token))
        .await
        .map(tonic::Response::into_inner)
}

/// The requests of a stream, and its responses.
struct Stream {
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    responses: Streaming<DeltaDiscoveryResponse>,
}

impl Stream {
    async fn open(channel: Channel, token: &str) -> Result<Self, Status> {
        let (requests, receiver) = mpsc::channel(8);
        let request = with_token(ReceiverStream::new(receiver), token);
        let responses = AggregatedDiscoveryServiceClient::new(channel)
            .delta_aggregated_resources(request)
            .await?
            .into_inner();
        Ok(Self {
            requests,
            responses,
        })
    }

    async fn ask(&mut self, type_url: &str) -> DeltaDiscoveryResponse {
        let request = DeltaDiscoveryRequest {
            type_url: type_url.to_owned(),
            ..DeltaDiscoveryRequest::default()
        };
        self.requests.send(request).await.unwrap();
        self.next().await
    }

    async fn next(&mut self) -> DeltaDiscoveryResponse {
        self.responses.message().await.unwrap().unwrap()
    }
}

#[tokio::test]
async fn a_proxy_gets_the_directory_and_then_its_changes() {
    let mut controller = Controller::start().await;
    let channel = controller.channel().await;
    let mut stream = Stream::open(channel, "proxy-on-n1").await.unwrap();
    let first = stream.ask(ADDRESS_TYPE).await;
    assert_eq!(first.resources[0].name, "uid-a");
    assert_eq!(first.resources[0].aliases, ["/10.0.0.1"]);
    let policies = stream.ask(AUTHORIZATION_TYPE).await;
    assert_eq!(policies.type_url, AUTHORIZATION_TYPE);
    assert!(policies.resources.is_empty());
    assert_eq!(controller.metrics.clients.get(), 1);

    controller.change(set_pod(pod("b", "10.0.0.2")));
    let added = stream.next().await;
    assert_eq!(added.resources.len(), 1);
    assert_eq!(added.resources[0].name, "uid-b");
    controller.change(Update::Pod(Change::Remove("uid-a".into())));
    assert_eq!(stream.next().await.removed_resources, ["uid-a"]);
}

/// What it has does not fit into what it may send before somebody reads it.
#[tokio::test]
async fn a_proxy_that_comes_back_with_much_is_told_the_difference() {
    let mut controller = Controller::start().await;
    let channel = controller.channel().await;
    let mut stream = Stream::open(channel, "proxy-on-n1").await.unwrap();
    let has = (0..20_000).map(|index| (format!("uid-that-was-{index}"), "1".to_owned()));
    let request = DeltaDiscoveryRequest {
        type_url: ADDRESS_TYPE.to_owned(),
        initial_resource_versions: has.collect(),
        ..DeltaDiscoveryRequest::default()
    };
    stream.requests.send(request).await.unwrap();
    let (mut names, mut removed) = (Vec::new(), 0);
    while removed < 20_000 || names.is_empty() {
        let response = stream.next().await;
        names.extend(response.resources.into_iter().map(|resource| resource.name));
        removed += response.removed_resources.len();
    }
    assert_eq!((names, removed), (vec!["uid-a".to_owned()], 20_000));
    let policies = stream.ask(AUTHORIZATION_TYPE).await;
    assert_eq!(policies.type_url, AUTHORIZATION_TYPE);
    controller.change(set_pod(pod("b", "10.0.0.2")));
    assert_eq!(stream.next().await.resources[0].name, "uid-b");
}

#[tokio::test]
async fn a_proxy_gets_certificates_of_its_nodes_pods_only() {
    let controller = Controller::start().await;
    let channel = controller.channel().await;
    let signed = sign(channel.clone(), "proxy-on-n1", WEB).await.unwrap();
    assert_eq!(signed.cert_chain.len(), 2);
    let refused = sign(channel.clone(), "proxy-on-n2", WEB).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert!(refused.message().contains("n2"), "{refused}");
    let bad = sign(channel, "proxy-on-n1", "web").await.unwrap_err();
    assert_eq!(bad.code(), Code::InvalidArgument);
    assert_eq!(controller.metrics.certificates_signed.get(), 1);
}

#[tokio::test]
async fn a_certificate_waits_for_a_pod_that_this_replica_does_not_know_yet() {
    let mut controller = Controller::start().await;
    let channel = controller.channel().await;
    let mut late = pod("late", "10.0.0.9");
    late.service_account = "late".into();
    let identity = "spiffe://example.org/ns/shop/sa/late";
    let idle = controller.publish.receiver_count();
    let signing = tokio::spawn(sign(channel, "proxy-on-n1", identity));
    // A request that waits watches the model.
    while controller.publish.receiver_count() == idle {
        tokio::task::yield_now().await;
    }
    controller.change(set_pod(late));
    assert!(signing.await.unwrap().is_ok());
}

#[tokio::test]
async fn nobody_is_served_without_a_proxys_token() {
    let controller = Controller::start().await;
    let channel = controller.channel().await;
    for token in ["stolen", ""] {
        let signed = sign(channel.clone(), token, WEB).await;
        assert_eq!(signed.unwrap_err().code(), Code::Unauthenticated);
        let stream = Stream::open(channel.clone(), token).await;
        assert_eq!(stream.err().unwrap().code(), Code::Unauthenticated);
    }
    assert_eq!(controller.metrics.unauthenticated.get(), 4);
}

#[tokio::test]
async fn a_new_ca_gives_the_server_a_new_certificate() {
    let controller = Controller::start().await;
    let old = controller.ca.borrow().roots_pem();
    controller.connect(&old).await.unwrap();
    controller.ca.send_replace(Arc::new(new_ca()));
    let new = controller.ca.borrow().roots_pem();
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    while controller.connect(&new).await.is_err() {
        assert!(tokio::time::Instant::now() < deadline);
        tokio::task::yield_now().await;
    }
    assert!(controller.connect(&old).await.is_err());
}

#[tokio::test]
async fn an_end_closes_open_streams() {
    let controller = Controller::start().await;
    let channel = controller.channel().await;
    let mut stream = Stream::open(channel.clone(), "proxy-on-n1").await.unwrap();
    stream.ask(ADDRESS_TYPE).await;
    controller.stop.cancel();
    let end = stream.responses.message().await.unwrap_err();
    assert_eq!(end.code(), Code::Unavailable);
    drop((stream, channel));
    controller.served.await.unwrap().unwrap();
}
