//! Has certificates signed by the controller, in the field's protocol.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use hbone::certificates::CertificateSource;
use hbone::identity::SpiffeId;
use hbone::with_causes;
use prost_types::value::Kind;
use prost_types::{Struct, Value};
use protocol::certificate::IstioCertificateRequest;
use protocol::certificate::istio_certificate_service_client::IstioCertificateServiceClient;

use crate::control_plane::{CallError, ControlPlane, ControlPlaneError};

/// How long a certificate is asked to be valid.
const VALIDITY: Duration = Duration::from_secs(24 * 3600);
const TIMEOUT: Duration = Duration::from_secs(10);

/// A signature that the controller did not give.
#[derive(Debug, thiserror::Error)]
enum SignError {
    #[error(transparent)]
    ControlPlane(#[from] ControlPlaneError),
    #[error(transparent)]
    Call(#[from] CallError),
}

/// The controller as the signer of certificates.
#[derive(Debug)]
pub(crate) struct Signer {
    pub(crate) control_plane: Arc<ControlPlane>,
}

impl CertificateSource for Signer {
    async fn sign(&self, identity: &SpiffeId, request_pem: String) -> Result<Vec<String>, String> {
        let answer = self.ask(identity, request_pem).await;
        answer.map_err(|error| with_causes(&error))
    }
}

impl Signer {
    async fn ask(&self, identity: &SpiffeId, csr: String) -> Result<Vec<String>, SignError> {
        let channel = self.control_plane.channel().await?;
        let message = request(identity, csr);
        let mut request = self.control_plane.request(message).await?;
        request.set_timeout(TIMEOUT);
        let mut client = IstioCertificateServiceClient::new(channel);
        let answer = client.create_certificate(request).await;
        Ok(answer.map_err(CallError::from)?.into_inner().cert_chain)
    }
}

fn request(identity: &SpiffeId, csr: String) -> IstioCertificateRequest {
    let impersonated = Value {
        kind: Some(Kind::StringValue(identity.to_string())),
    };
    IstioCertificateRequest {
        csr,
        validity_duration: VALIDITY.as_secs().try_into().unwrap_or(i64::MAX),
        metadata: Some(Struct {
            fields: BTreeMap::from([("ImpersonatedIdentity".to_owned(), impersonated)]),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_names_whom_it_is_for() {
        let identity = "spiffe://td/ns/shop/sa/web";
        let request = request(&identity.parse().unwrap(), "CSR".to_owned());
        let metadata = request.metadata.unwrap();
        let named = &metadata.fields["ImpersonatedIdentity"].kind;
        assert_eq!(*named, Some(Kind::StringValue(identity.to_owned())));
        assert_eq!(request.csr, "CSR");
    }
}
