//! A controller that says what a test wants, and signs whatever it is asked to.

use std::collections::HashMap;
use std::io::ErrorKind;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use prost::Message;
use prost_types::value::Kind;
use protocol::ADDRESS_TYPE;
use protocol::authorization::Authorization;
use protocol::certificate::istio_certificate_service_server::{
    IstioCertificateService, IstioCertificateServiceServer,
};
use protocol::certificate::{IstioCertificateRequest, IstioCertificateResponse};
use protocol::discovery::aggregated_discovery_service_server::{
    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
};
use protocol::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource};
use protocol::workload::{Address, TunnelProtocol, Workload, address};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, CertifiedIssuer, IsCa,
    KeyPair,
};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::transport::{Identity, Server, ServerTlsConfig};
use tonic::{Request, Response, Status, Streaming};

use crate::program::{CONTROLLER_PORT, Program, TOKEN};

/// A program has replaced itself by another within this time.
const HELD: Duration = Duration::from_secs(5);

type Responses = mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>;

/// One stream of a proxy: what it sends, and the way to answer.
type Stream = (Streaming<DeltaDiscoveryRequest>, Responses);

pub(crate) struct Controller {
    streams: mpsc::Receiver<Stream>,
    stream: Option<Stream>,
    signed: Arc<Mutex<Vec<String>>>,
    stop: oneshot::Sender<()>,
    server: JoinHandle<()>,
}

struct Discovery(mpsc::Sender<Stream>);

struct Signer {
    ca: CertifiedIssuer<'static, KeyPair>,
    signed: Arc<Mutex<Vec<String>>>,
}

/// A program that another test starts has every socket of this process until its exec, so that the port of a
/// controller that has ended may be in use for a moment longer.
async fn listener() -> TcpListener {
    let start = Instant::now();
    loop {
        match TcpListener::bind(("127.0.0.1", CONTROLLER_PORT)).await {
            Err(error) if error.kind() == ErrorKind::AddrInUse && start.elapsed() < HELD => {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            bound => return bound.unwrap(),
        }
    }
}

impl Controller {
    /// Serves; its roots are published where the program looks for them.
    pub(crate) async fn start(program: &Program) -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        std::fs::write(program.folder().join("root-cert.pem"), ca.pem()).unwrap();
        let key = KeyPair::generate().unwrap();
        let own = CertificateParams::new(["localhost".to_owned()]).unwrap();
        let own = own.signed_by(&key, &ca).unwrap();
        let identity = Identity::from_pem(own.pem(), key.serialize_pem());
        let tls = ServerTlsConfig::new().identity(identity);

        let (new_stream, streams) = mpsc::channel(4);
        let signed = Arc::new(Mutex::new(Vec::new()));
        let signer = Signer {
            ca,
            signed: signed.clone(),
        };
        let (stop, stopped) = oneshot::channel::<()>();
        let listener = listener().await;
        let server = Server::builder()
            .tls_config(tls)
            .unwrap()
            .add_service(AggregatedDiscoveryServiceServer::new(Discovery(new_stream)))
            .add_service(IstioCertificateServiceServer::new(signer));
        let serve = async move {
            let serve = server.serve_with_incoming(TcpListenerStream::new(listener));
            tokio::select! {
                served = serve => served.unwrap(),
                _ = stopped => {}
            }
        };
        Self {
            streams,
            stream: None,
            signed,
            stop,
            server: tokio::spawn(serve),
        }
    }

    /// Ends, with all of its connections.
    pub(crate) async fn stop(self) {
        drop(self.stop);
        self.server.await.unwrap();
    }

    /// Identities that were asked for.
    pub(crate) fn signed(&self) -> Vec<String> {
        self.signed.lock().unwrap().clone()
    }

    async fn stream(&mut self) -> &mut Stream {
        if self.stream.is_none() {
            self.stream = Some(self.streams.recv().await.unwrap());
        }
        self.stream.as_mut().unwrap()
    }

    /// The next requests, by type.
    pub(crate) async fn requests(
        &mut self,
        count: usize,
    ) -> HashMap<String, DeltaDiscoveryRequest> {
        let (requests, _) = self.stream().await;
        let mut all = HashMap::new();
        for _ in 0..count {
            let request = requests.message().await.unwrap().expect("a request");
            all.insert(request.type_url.clone(), request);
        }
        all
    }

    pub(crate) async fn send(
        &mut self,
        type_url: &str,
        resources: Vec<Resource>,
        removed: &[&str],
    ) {
        let (_, responses) = self.stream().await;
        let response = DeltaDiscoveryResponse {
            type_url: type_url.to_owned(),
            resources,
            removed_resources: removed.iter().map(ToString::to_string).collect(),
            nonce: "nonce".to_owned(),
            ..DeltaDiscoveryResponse::default()
        };
        responses.send(Ok(response)).await.unwrap();
    }

    /// The answer to what was sent.
    pub(crate) async fn answer(&mut self) -> DeltaDiscoveryRequest {
        let (requests, _) = self.stream().await;
        loop {
            let request = requests.message().await.unwrap().expect("an answer");
            if request.response_nonce == "nonce" {
                return request;
            }
        }
    }

    /// Sends resources, and sees that they are taken.
    pub(crate) async fn accept(&mut self, all: &[(&str, Vec<Resource>)]) {
        for (type_url, resources) in all {
            self.send(type_url, resources.clone(), &[]).await;
            let answer = self.answer().await;
            assert_eq!(answer.type_url, *type_url);
            assert_eq!(answer.error_detail, None);
        }
    }
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for Discovery {
    type DeltaAggregatedResourcesStream = ReceiverStream<Result<DeltaDiscoveryResponse, Status>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        check_token(&request);
        let (responses, outgoing) = mpsc::channel(4);
        let stream = (request.into_inner(), responses);
        let given = self.0.send(stream).await;
        given.map_err(|_| Status::unavailable("the test is over"))?;
        Ok(Response::new(ReceiverStream::new(outgoing)))
    }
}

#[tonic::async_trait]
impl IstioCertificateService for Signer {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        check_token(&request);
        let request = request.into_inner();
        let metadata = request.metadata.unwrap();
        let Some(Kind::StringValue(identity)) = &metadata.fields["ImpersonatedIdentity"].kind
        else {
            panic!("no identity: {metadata:?}");
        };
        self.signed.lock().unwrap().push(identity.clone());
        let csr = CertificateSigningRequestParams::from_pem(&request.csr).unwrap();
        let certificate = csr.signed_by(&self.ca).unwrap();
        Ok(Response::new(IstioCertificateResponse {
            cert_chain: vec![certificate.pem(), self.ca.pem()],
        }))
    }
}

fn check_token<T>(request: &Request<T>) {
    let token = request.metadata().get("authorization").unwrap();
    assert_eq!(token, format!("Bearer {TOKEN}").as_str());
    assert_eq!(request.metadata().get("clusterid").unwrap(), "Kubernetes");
}

pub(crate) fn resource(name: &str, type_url: &str, message: &impl Message) -> Resource {
    Resource {
        name: name.to_owned(),
        version: "1".to_owned(),
        resource: Some(prost_types::Any {
            type_url: type_url.to_owned(),
            value: message.encode_to_vec(),
        }),
        ..Resource::default()
    }
}

/// A pod of the mesh; its addresses by commas.
pub(crate) fn workload(uid: &str, account: &str, ips: &str) -> Resource {
    let octets = |ip: &str| match ip.parse().unwrap() {
        IpAddr::V4(ip) => ip.octets().to_vec().into(),
        IpAddr::V6(ip) => ip.octets().to_vec().into(),
    };
    let workload = Workload {
        uid: uid.to_owned(),
        name: uid.to_owned(),
        namespace: "shop".to_owned(),
        service_account: account.to_owned(),
        tunnel_protocol: TunnelProtocol::Hbone.into(),
        addresses: ips.split(',').map(octets).collect(),
        ..Workload::default()
    };
    let address = Address {
        r#type: Some(address::Type::Workload(workload)),
    };
    resource(uid, ADDRESS_TYPE, &address)
}

pub(crate) fn authorization(name: &str, action: i32) -> Authorization {
    Authorization {
        name: name.to_owned(),
        namespace: "shop".to_owned(),
        action,
        ..Authorization::default()
    }
}
