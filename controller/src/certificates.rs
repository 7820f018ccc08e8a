//! Certificate signing over gRPC: who asks, may it, sign.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use prost_types::value::Kind;
use protocol::certificate::istio_certificate_service_server::IstioCertificateService;
use protocol::certificate::{IstioCertificateRequest, IstioCertificateResponse};
use tonic::{Request, Response, Status};

use crate::authenticate::{Authenticator, Unauthenticated, peer};
use crate::authorize::{Caller, Permit, Refusal, authorize};
use crate::ca::secret::CurrentCa;
use crate::ca::{RequestError, validity};
use crate::directory::Facts;
use crate::identity::{NotAnIdentity, SpiffeId};
use crate::metrics::{Metrics, ReasonLabel};
use crate::model::Published;
use crate::problems::chain;

/// Key of the request's metadata: the identity that a node's proxy asks for.
const IMPERSONATED_IDENTITY: &str = "ImpersonatedIdentity";

/// A pod may be known to its node a moment before it is to this replica.
const WAIT_FOR_POD: Duration = Duration::from_secs(2);

/// The service.
pub(crate) struct Certificates {
    pub(crate) authenticator: Arc<Authenticator>,
    pub(crate) published: Published,
    pub(crate) facts: Facts,
    pub(crate) ca: CurrentCa,
    /// What is signed for at most, and when nothing else is asked for.
    pub(crate) validity: Duration,
    pub(crate) metrics: Metrics,
}

/// A request that gets no certificate.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error(transparent)]
    Unauthenticated(#[from] Unauthenticated),
    #[error("the request names no {IMPERSONATED_IDENTITY} in its metadata")]
    NoIdentity,
    #[error(transparent)]
    NotAnIdentity(#[from] NotAnIdentity),
    #[error(transparent)]
    Unauthorized(#[from] Refusal),
    #[error(transparent)]
    NotSigned(#[from] RequestError),
}

#[tonic::async_trait]
impl IstioCertificateService for Certificates {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let from = peer(&request);
        let asked = asked_identity(request.get_ref())
            .unwrap_or_default()
            .to_owned();
        let caller = match self.authenticator.authenticate(request.metadata()).await {
            Ok(caller) => caller,
            Err(error) => {
                self.metrics.unauthenticated.inc();
                let error = Refused::from(error);
                return Err(self.refuse(&error, &from, &asked));
            }
        };
        let who = format!("{} on {}", caller.pod_name, caller.node);
        match self.create(&caller, request.get_ref()).await {
            Ok(cert_chain) => {
                self.metrics.certificates_signed.inc();
                tracing::info!(who, identity = asked, "signed a certificate");
                Ok(Response::new(IstioCertificateResponse { cert_chain }))
            }
            Err(error) => Err(self.refuse(&error, &who, &asked)),
        }
    }
}

impl Certificates {
    async fn create(
        &self,
        caller: &Caller,
        request: &IstioCertificateRequest,
    ) -> Result<Vec<String>, Refused> {
        let identity: SpiffeId = asked_identity(request)
            .ok_or(Refused::NoIdentity)?
            .parse()?;
        let permit = self.permit(caller, &identity).await?;
        let ca = self.ca.borrow().clone();
        let validity = validity(request.validity_duration, self.validity);
        Ok(ca.sign_workload(&permit, &request.csr, validity, SystemTime::now())?)
    }

    async fn permit(&self, caller: &Caller, identity: &SpiffeId) -> Result<Permit, Refusal> {
        let mut published = self.published.clone();
        let deadline = tokio::time::Instant::now() + WAIT_FOR_POD;
        loop {
            let model = published.borrow_and_update().clone().unwrap_or_default();
            let Facts {
                rules,
                trust_domain,
                ..
            } = &self.facts;
            let decision = authorize(
                &model.snapshot,
                rules,
                trust_domain,
                caller,
                identity.clone(),
            );
            if !matches!(decision, Err(Refusal::NoSuchPod { .. })) {
                return decision;
            }
            match tokio::time::timeout_at(deadline, published.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) | Err(_) => return decision,
            }
        }
    }

    fn refuse(&self, error: &Refused, who: &str, identity: &str) -> Status {
        let message = chain(error);
        tracing::warn!(who, identity, "refused a certificate: {message}");
        self.metrics
            .certificates_refused
            .get_or_create(&ReasonLabel {
                reason: error.reason(),
            })
            .inc();
        error.status(message)
    }
}

fn asked_identity(request: &IstioCertificateRequest) -> Option<&str> {
    let fields = &request.metadata.as_ref()?.fields;
    match fields.get(IMPERSONATED_IDENTITY)?.kind.as_ref()? {
        Kind::StringValue(identity) => Some(identity),
        _ => None,
    }
}

// === impl Refused ===

impl Refused {
    fn reason(&self) -> &'static str {
        match self {
            Self::Unauthenticated(_) => "Unauthenticated",
            Self::NoIdentity | Self::NotAnIdentity(_) => "BadIdentity",
            Self::Unauthorized(refusal) => refusal.reason(),
            Self::NotSigned(RequestError::Csr(_)) => "BadRequest",
            Self::NotSigned(RequestError::Ca(_)) => "CaFailed",
        }
    }

    fn status(&self, message: String) -> Status {
        match self {
            Self::Unauthenticated(Unauthenticated::ReviewFailed(_)) => Status::unavailable(message),
            Self::Unauthenticated(_) => Status::unauthenticated(message),
            Self::NoIdentity | Self::NotAnIdentity(_) | Self::NotSigned(RequestError::Csr(_)) => {
                Status::invalid_argument(message)
            }
            Self::Unauthorized(_) => Status::permission_denied(message),
            Self::NotSigned(RequestError::Ca(_)) => Status::unavailable(message),
        }
    }
}
