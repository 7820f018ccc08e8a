//! The way to the controller: gRPC over TLS, with the proxy's own token.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http::Uri;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const PING_INTERVAL: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(10);

/// Where the controller is, and what the proxy shows it.
#[derive(Clone, Debug)]
pub(crate) struct Controller {
    uri: Uri,
    root_cert: PathBuf,
    token: PathBuf,
    cluster_id: String,
}

/// The controller cannot be asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ControllerError {
    #[error("read {}: the controller publishes its roots in the ConfigMap ambit-ca-root", .0.display())]
    Root(PathBuf, #[source] io::Error),
    #[error("read the token {}: the pod needs a projected service account token", .0.display())]
    Token(PathBuf, #[source] io::Error),
    #[error("the token {} is not a header's value", .0.display())]
    TokenForm(PathBuf),
    #[error("the cluster's name {0:?} is not a header's value")]
    ClusterForm(String),
    #[error("connect to {0}")]
    Connect(Uri, #[source] tonic::transport::Error),
}

impl Controller {
    pub(crate) fn new(uri: Uri, root_cert: PathBuf, token: PathBuf, cluster_id: String) -> Self {
        Self {
            uri,
            root_cert,
            token,
            cluster_id,
        }
    }

    /// A new connection, checked with the roots as they are now.
    pub(crate) async fn connect(&self) -> Result<Channel, ControllerError> {
        let failed = |error| ControllerError::Connect(self.uri.clone(), error);
        let roots = read(&self.root_cert, ControllerError::Root).await?;
        let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(roots));
        Endpoint::from(self.uri.clone())
            .tls_config(tls)
            .map_err(failed)?
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(PING_TIMEOUT)
            .keep_alive_while_idle(true)
            .connect()
            .await
            .map_err(failed)
    }

    /// `message` with the token as it is now.
    pub(crate) async fn request<T>(
        &self,
        message: T,
    ) -> Result<tonic::Request<T>, ControllerError> {
        let token = read(&self.token, ControllerError::Token).await?;
        let bearer: MetadataValue<Ascii> = format!("Bearer {}", token.trim())
            .parse()
            .map_err(|_| ControllerError::TokenForm(self.token.clone()))?;
        let cluster = self
            .cluster_id
            .parse()
            .map_err(|_| ControllerError::ClusterForm(self.cluster_id.clone()))?;
        let mut request = tonic::Request::new(message);
        request.metadata_mut().insert("authorization", bearer);
        request.metadata_mut().insert("clusterid", cluster);
        Ok(request)
    }
}

async fn read(
    path: &Path,
    failed: impl Fn(PathBuf, io::Error) -> ControllerError,
) -> Result<String, ControllerError> {
    tokio::fs::read_to_string(path)
        .await
        .map_err(|error| failed(path.to_owned(), error))
}
