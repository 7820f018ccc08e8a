//! Asks the controller for certificates, as a node's proxy does or as one who should get none.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result};
use prost_types::value::Kind;
use prost_types::{Struct, Value};
use protocol::certificate::IstioCertificateRequest;
use protocol::certificate::istio_certificate_service_client::IstioCertificateServiceClient;
use rcgen::{CertificateParams, KeyPair};
use tokio::runtime::Runtime;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Code, Request};

use crate::cluster::{Cluster, SYSTEM, items};

/// Name in the controller's own certificate.
const NAME: &str = "ambit-controller.ambit-system.svc";

/// A connection to one replica of the controller.
#[derive(Debug)]
pub struct CertificateApi {
    runtime: Runtime,
    channel: Channel,
}

/// A replica of the controller, at an address with its port, that is known by these roots (PEM).
///
/// # Errors
/// If they are none.
pub fn endpoint(address: &str, roots: &str) -> Result<Endpoint> {
    let tls = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(roots))
        .domain_name(NAME);
    Ok(Endpoint::from_shared(format!("https://{address}"))?.tls_config(tls)?)
}

/// The controller's answer: a chain of certificates, or a code and why.
pub type Answer = Result<Vec<String>, (Code, String)>;

impl CertificateApi {
    /// Connects, and checks the controller by the roots that it publishes.
    ///
    /// # Errors
    /// If no replica answers.
    pub fn connect(cluster: &Cluster) -> Result<Self> {
        let map = cluster.get(&["-n", SYSTEM, "configmap", "ambit-ca-root"])?;
        let roots = map["data"]["root-cert.pem"]
            .as_str()
            .context("no root-cert.pem")?;
        let pods = cluster.get(&[
            "-n",
            SYSTEM,
            "pods",
            "-l",
            "app.kubernetes.io/name=ambit-controller",
        ])?;
        let ip = items(&pods)
            .filter(|pod| pod["metadata"]["deletionTimestamp"].is_null())
            .find_map(|pod| pod["status"]["podIP"].as_str())
            .context("no controller")?;
        let runtime = Runtime::new()?;
        let endpoint = endpoint(&format!("{ip}:15012"), roots)?.timeout(Duration::from_secs(10));
        let channel = runtime
            .block_on(endpoint.connect())
            .context("connect to the controller")?;
        Ok(Self { runtime, channel })
    }

    /// Asks for a certificate of `identity` with this token, if any.
    ///
    /// # Errors
    /// If there is no answer at all.
    pub fn ask(&self, token: Option<&str>, identity: &str) -> Result<Answer> {
        let csr = CertificateParams::default()
            .serialize_request(&KeyPair::generate()?)?
            .pem()?;
        let wanted = Value {
            kind: Some(Kind::StringValue(identity.to_owned())),
        };
        let mut request = Request::new(IstioCertificateRequest {
            csr,
            validity_duration: 3600,
            metadata: Some(Struct {
                fields: BTreeMap::from([("ImpersonatedIdentity".to_owned(), wanted)]),
            }),
        });
        if let Some(token) = token {
            request
                .metadata_mut()
                .insert("authorization", format!("Bearer {token}").parse()?);
        }
        let mut client = IstioCertificateServiceClient::new(self.channel.clone());
        let answer = self.runtime.block_on(client.create_certificate(request));
        Ok(answer
            .map(|answer| answer.into_inner().cert_chain)
            .map_err(|status| (status.code(), status.message().to_owned())))
    }
}

/// A token of a service account in Ambit's namespace, bound to a pod if one is named.
///
/// # Errors
/// If the API server gives none.
pub fn token(
    cluster: &Cluster,
    account: &str,
    audience: Option<&str>,
    pod: Option<&str>,
) -> Result<String> {
    let mut call = vec!["-n", SYSTEM, "create", "token", account];
    if let Some(audience) = audience {
        call.extend(["--audience", audience]);
    }
    if let Some(pod) = pod {
        call.extend(["--bound-object-kind", "Pod", "--bound-object-name", pod]);
    }
    Ok(cluster.kubectl(&call)?.trim().to_owned())
}
