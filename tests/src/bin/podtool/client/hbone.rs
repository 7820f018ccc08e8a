//! Speaks to a node's proxy as another proxy would, or as one that should not be let in.

use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use h2::client::SendRequest;
use http::{Method, Request};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use tokio_rustls::TlsConnector;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::open;

/// Dials; tells the server's identity, and the code of its answer or the error that it gave.
pub(super) async fn dial(
    to: &str,
    authority: &str,
    certificate: bool,
    text: &str,
) -> Result<Value> {
    let certificate = if certificate {
        Some(from_standard_input().await?)
    } else {
        None
    };
    let server = Arc::new(AnyServer::default());
    let connector = connector(server.clone(), certificate)?;
    let stream = open(to).await?;
    let outcome = async {
        // No name is sent, as between proxies; the address stands for it.
        let name = ServerName::IpAddress(stream.peer_addr()?.ip().into());
        let stream = connector.connect(name, stream).await.context("TLS")?;
        let (sender, connection) = h2::client::handshake(stream).await.context("HTTP/2")?;
        tokio::spawn(connection);
        through(sender, authority, text).await
    };
    let mut seen = outcome
        .await
        .unwrap_or_else(|error| json!({"refused": format!("{error:#}")}));
    seen["identities"] = json!(server.identities()?);
    Ok(seen)
}

/// Sends a CONNECT and, behind it, a line; tells the code and what came back.
async fn through(sender: SendRequest<Bytes>, authority: &str, text: &str) -> Result<Value> {
    let mut sender = sender.ready().await.context("HTTP/2")?;
    let request = Request::builder()
        .method(Method::CONNECT)
        .uri(authority)
        .body(())?;
    let (response, mut send) = sender.send_request(request, false).context("CONNECT")?;
    let response = response.await.context("CONNECT")?;
    let status = response.status().as_u16();
    if !response.status().is_success() {
        return Ok(json!({"status": status}));
    }
    send.send_data(Bytes::from(format!("{text}\n")), true)?;
    let mut body = response.into_body();
    let mut received = Vec::new();
    while let Some(data) = body.data().await {
        let data = data.context("the server's bytes")?;
        body.flow_control().release_capacity(data.len())?;
        received.extend_from_slice(&data);
    }
    Ok(json!({"status": status, "received": String::from_utf8_lossy(&received)}))
}

type Identity = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

async fn from_standard_input() -> Result<Identity> {
    let mut pem = Vec::new();
    tokio::io::stdin().read_to_end(&mut pem).await?;
    let chain: Vec<_> = CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<_, _>>()
        .context("certificates on standard input")?;
    ensure!(!chain.is_empty(), "no certificate on standard input");
    let key = PrivateKeyDer::from_pem_slice(&pem).context("a key on standard input")?;
    Ok((chain, key))
}

fn connector(server: Arc<AnyServer>, certificate: Option<Identity>) -> Result<TlsConnector> {
    let builder = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(server);
    let mut config = match certificate {
        Some((chain, key)) => builder.with_client_auth_cert(chain, key)?,
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.enable_sni = false;
    Ok(TlsConnector::from(Arc::new(config)))
}

/// Takes every server and keeps its certificate: who it says it is is for the test to judge.
#[derive(Debug, Default)]
struct AnyServer {
    leaf: Mutex<Option<CertificateDer<'static>>>,
}

impl AnyServer {
    fn identities(&self) -> Result<Vec<String>> {
        let Some(leaf) = self.leaf.lock().ok().and_then(|leaf| leaf.clone()) else {
            return Ok(Vec::new());
        };
        let (_, certificate) = X509Certificate::from_der(&leaf)?;
        let names = certificate.subject_alternative_name()?;
        Ok(names
            .iter()
            .flat_map(|names| &names.value.general_names)
            .filter_map(|name| match name {
                GeneralName::URI(uri) => Some((*uri).to_owned()),
                _ => None,
            })
            .collect())
    }
}

impl ServerCertVerifier for AnyServer {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if let Ok(mut kept) = self.leaf.lock() {
            *kept = Some(leaf.clone().into_owned());
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not offered".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = aws_lc_rs::default_provider().signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signed, &algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        aws_lc_rs::default_provider()
            .signature_verification_algorithms
            .supported_schemes()
    }
}
