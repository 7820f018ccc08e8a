//! Has certificate requests signed by the controller, on behalf of the node's workloads.

use std::collections::BTreeMap;
use std::error::Error;
use std::time::Duration;

use hbone::certificates::CertificateSource;
use hbone::identity::SpiffeId;
use prost_types::{Struct, Value, value::Kind};
use protocol::certificate::IstioCertificateRequest;
use protocol::certificate::istio_certificate_service_client::IstioCertificateServiceClient;
use tokio::sync::Mutex;
use tonic::transport::Channel;

use crate::controller::Controller;

/// The lifetime that is asked for; the controller may shorten it.
const VALIDITY: Duration = Duration::from_secs(24 * 60 * 60);
const TIMEOUT: Duration = Duration::from_secs(10);

/// The controller as the signer of certificates.
#[derive(Debug)]
pub(crate) struct Signer {
    controller: Controller,
    /// Kept while it works.
    channel: Mutex<Option<Channel>>,
}

impl Signer {
    pub(crate) fn new(controller: Controller) -> Self {
        Self {
            controller,
            channel: Mutex::default(),
        }
    }

    async fn channel(&self) -> Result<Channel, String> {
        let mut channel = self.channel.lock().await;
        if let Some(open) = &*channel {
            return Ok(open.clone());
        }
        let open = self.controller.connect().await.map_err(|e| chain(&e))?;
        Ok(channel.insert(open).clone())
    }

    async fn ask(&self, message: IstioCertificateRequest) -> Result<Vec<String>, String> {
        let channel = self.channel().await?;
        let mut request = self
            .controller
            .request(message)
            .await
            .map_err(|e| chain(&e))?;
        request.set_timeout(TIMEOUT);
        let answer = IstioCertificateServiceClient::new(channel)
            .create_certificate(request)
            .await;
        match answer {
            Ok(answer) => Ok(answer.into_inner().cert_chain),
            Err(status) => {
                // The next try connects anew: this replica may be going, or the roots have changed.
                *self.channel.lock().await = None;
                Err(format!("{}: {}", status.code(), status.message()))
            }
        }
    }
}

impl CertificateSource for Signer {
    async fn sign(&self, identity: &SpiffeId, request_pem: String) -> Result<Vec<String>, String> {
        self.ask(IstioCertificateRequest {
            csr: request_pem,
            validity_duration: VALIDITY.as_secs().cast_signed(),
            metadata: Some(impersonate(identity)),
        })
        .await
    }
}

fn impersonate(identity: &SpiffeId) -> Struct {
    let identity = Value {
        kind: Some(Kind::StringValue(identity.to_string())),
    };
    Struct {
        fields: BTreeMap::from([("ImpersonatedIdentity".to_owned(), identity)]),
    }
}

/// An error with its causes, in one line.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}
