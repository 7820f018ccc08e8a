//! The controller: TLS with its published roots, and our token on every call.

use std::error::Error;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use hbone::with_causes;
use tonic::metadata::errors::InvalidMetadataValue;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Uri};
use tonic::{Request, Status, transport};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Time between two pings of HTTP/2, and how long the answer may take.
const PING_EVERY: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(10);

/// The controller that cannot be called.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ControlPlaneError {
    #[error("read {} (the controller publishes it in ConfigMap ambit-ca-root)", .0.display())]
    Roots(PathBuf, #[source] io::Error),
    #[error("read the token in {}", .0.display())]
    Token(PathBuf, #[source] io::Error),
    #[error("the token in {} does not fit in a header", .0.display())]
    TokenForm(PathBuf, #[source] InvalidMetadataValue),
    #[error("the cluster's name does not fit in a header")]
    ClusterForm(#[source] InvalidMetadataValue),
    #[error("{0} is no URL with a name, as in https://NAME:PORT")]
    Name(Uri),
    #[error("prepare TLS to the controller")]
    Tls(#[source] transport::Error),
}

/// A call that did not succeed. In few words: a status prints its causes as a program would.
#[derive(Debug)]
pub(crate) struct CallError(Box<Status>);

impl From<Status> for CallError {
    fn from(status: Status) -> Self {
        Self(Box::new(status))
    }
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let status = &*self.0;
        write!(
            f,
            "the controller: {:?}: {}",
            status.code(),
            status.message()
        )?;
        let causes = status.source().map(with_causes).unwrap_or_default();
        if status.message().contains(&causes) {
            return Ok(());
        }
        write!(f, ": {causes}")
    }
}

impl Error for CallError {}

/// Where the controller is, and how to talk to it.
#[derive(Debug)]
pub(crate) struct ControlPlane {
    pub(crate) url: Uri,
    pub(crate) roots: PathBuf,
    pub(crate) token: PathBuf,
    pub(crate) cluster: String,
    /// The channel, and the roots that it was made with.
    pub(crate) channel: Mutex<Option<(Vec<u8>, Channel)>>,
}

impl ControlPlane {
    /// A channel that trusts the roots as they are now. It connects when it is used.
    pub(crate) async fn channel(&self) -> Result<Channel, ControlPlaneError> {
        let roots = tokio::fs::read(&self.roots).await;
        let roots = roots.map_err(|error| ControlPlaneError::Roots(self.roots.clone(), error))?;
        let mut held = self.channel.lock().unwrap_or_else(PoisonError::into_inner);
        match &*held {
            Some((with, channel)) if *with == roots => Ok(channel.clone()),
            _ => {
                let channel = self.endpoint(&roots)?.connect_lazy();
                *held = Some((roots, channel.clone()));
                Ok(channel)
            }
        }
    }

    fn endpoint(&self, roots: &[u8]) -> Result<Endpoint, ControlPlaneError> {
        let name = self.url.host();
        let name = name.ok_or_else(|| ControlPlaneError::Name(self.url.clone()))?;
        let tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(roots))
            .domain_name(name);
        Endpoint::from(self.url.clone())
            .tls_config(tls)
            .map_err(ControlPlaneError::Tls)
            .map(|endpoint| {
                endpoint
                    .connect_timeout(CONNECT_TIMEOUT)
                    .tcp_keepalive(Some(Duration::from_secs(300)))
                    .http2_keep_alive_interval(PING_EVERY)
                    .keep_alive_timeout(PING_TIMEOUT)
                    .keep_alive_while_idle(true)
            })
    }

    /// A request that says who we are.
    pub(crate) async fn request<T>(&self, message: T) -> Result<Request<T>, ControlPlaneError> {
        let token = tokio::fs::read_to_string(&self.token).await;
        let token = token.map_err(|error| ControlPlaneError::Token(self.token.clone(), error))?;
        let mut request = Request::new(message);
        let bearer = format!("Bearer {}", token.trim()).parse();
        let bearer =
            bearer.map_err(|error| ControlPlaneError::TokenForm(self.token.clone(), error))?;
        request.metadata_mut().insert("authorization", bearer);
        let cluster = self.cluster.parse();
        let cluster = cluster.map_err(ControlPlaneError::ClusterForm)?;
        request.metadata_mut().insert("clusterid", cluster);
        Ok(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_that_did_not_succeed_says_why_once() {
        let cause = io::Error::other("Connection refused");
        let status = Status::from_error(Box::new(cause));
        let said = CallError::from(status).to_string();
        assert_eq!(said.matches("Connection refused").count(), 1, "{said}");
        assert!(!said.contains("Custom"), "{said}");
    }
}
