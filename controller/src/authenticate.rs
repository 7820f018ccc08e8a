//! Who calls: the token of a node's proxy, reviewed by the API server.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus};
use kube::api::PostParams;
use kube::{Api, Client};
use sha2::{Digest, Sha256};
use tokio::time::Instant;
use tonic::Request;
use tonic::metadata::MetadataMap;

use crate::authorize::Caller;
use crate::problems::{Problems, explain};

const PART: &str = "create tokenreviews.authentication.k8s.io";

/// How long a review is believed: short, so that a deleted pod's token soon ends.
const BELIEVED: Duration = Duration::from_secs(30);
/// How many reviews are kept: some for each node.
const MAX_REVIEWS: usize = 8192;

const NODE_NAME: &str = "authentication.kubernetes.io/node-name";
const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";

/// Asks the API server about tokens.
pub(crate) struct Authenticator {
    reviewer: Reviewer,
    /// By the token's hash: a token itself is not kept.
    believed: Mutex<HashMap<[u8; 32], (Caller, Instant)>>,
}

/// The audience and the user that are right, and where to ask.
pub(crate) struct Reviewer {
    api: Api<TokenReview>,
    expected: Expected,
    problems: Problems,
}

/// What a proxy's token must say.
#[derive(Clone, Debug)]
pub(crate) struct Expected {
    pub(crate) audience: String,
    /// `system:serviceaccount:NAMESPACE:NAME`
    pub(crate) user: String,
}

/// A caller that is not believed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unauthenticated {
    #[error("the request has no `authorization: Bearer` token")]
    NoToken,
    #[error("the API server does not accept the token: {0}")]
    NotAccepted(String),
    #[error("the token is not meant for audience {0:?}")]
    Audience(String),
    #[error("{user:?} asked, only {expected:?} may")]
    OtherUser { user: String, expected: String },
    #[error("the token is not bound to a pod on a node (no {0}); Kubernetes 1.32 or newer says so")]
    NotBound(&'static str),
    #[error("the token could not be reviewed: {0}")]
    ReviewFailed(String),
}

impl Expected {
    pub(crate) fn new(audience: &str, namespace: &str, service_account: &str) -> Self {
        Self {
            audience: audience.to_owned(),
            user: format!("system:serviceaccount:{namespace}:{service_account}"),
        }
    }
}

impl Authenticator {
    pub(crate) fn new(client: Client, expected: Expected, problems: Problems) -> Self {
        Self {
            reviewer: Reviewer {
                api: Api::all(client),
                expected,
                problems,
            },
            believed: Mutex::default(),
        }
    }

    pub(crate) async fn authenticate(
        &self,
        metadata: &MetadataMap,
    ) -> Result<Caller, Unauthenticated> {
        let token = bearer(metadata)?;
        let hash: [u8; 32] = Sha256::digest(token.as_bytes()).into();
        if let Some(caller) = self.remembered(&hash) {
            return Ok(caller);
        }
        let caller = self.reviewer.review(token).await?;
        self.remember(hash, caller.clone());
        Ok(caller)
    }

    fn remembered(&self, hash: &[u8; 32]) -> Option<Caller> {
        let believed = self.believed.lock().unwrap_or_else(PoisonError::into_inner);
        let (caller, since) = believed.get(hash)?;
        (since.elapsed() < BELIEVED).then(|| caller.clone())
    }

    fn remember(&self, hash: [u8; 32], caller: Caller) {
        let mut believed = self.believed.lock().unwrap_or_else(PoisonError::into_inner);
        if believed.len() >= MAX_REVIEWS {
            believed.retain(|_, (_, since)| since.elapsed() < BELIEVED);
        }
        if believed.len() < MAX_REVIEWS {
            believed.insert(hash, (caller, Instant::now()));
        }
    }
}

impl Reviewer {
    async fn review(&self, token: &str) -> Result<Caller, Unauthenticated> {
        let review = TokenReview {
            spec: TokenReviewSpec {
                token: Some(token.to_owned()),
                audiences: Some(vec![self.expected.audience.clone()]),
            },
            ..TokenReview::default()
        };
        match self.api.create(&PostParams::default(), &review).await {
            Ok(review) => {
                self.problems.clear(PART);
                caller(review.status.unwrap_or_default(), &self.expected)
            }
            Err(error) => {
                let message = explain(&error);
                self.problems.report(PART, message.clone());
                Err(Unauthenticated::ReviewFailed(message))
            }
        }
    }
}

/// Who is at the other end of a request's connection, before anybody is believed.
pub(crate) fn peer<T>(request: &Request<T>) -> String {
    request.remote_addr().map_or_else(
        || "an unknown address".to_owned(),
        |address| address.to_string(),
    )
}

fn bearer(metadata: &MetadataMap) -> Result<&str, Unauthenticated> {
    metadata
        .get("authorization")
        .and_then(|value| value.to_str().ok())
        .and_then(|value| {
            let (scheme, token) = value.split_once(' ')?;
            scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
        })
        .filter(|token| !token.is_empty())
        .ok_or(Unauthenticated::NoToken)
}

/// Pure: the caller that a review speaks of.
fn caller(review: TokenReviewStatus, expected: &Expected) -> Result<Caller, Unauthenticated> {
    if review.authenticated != Some(true) {
        let why = review.error.unwrap_or_else(|| "no reason given".to_owned());
        return Err(Unauthenticated::NotAccepted(why));
    }
    if !review
        .audiences
        .iter()
        .flatten()
        .any(|audience| *audience == expected.audience)
    {
        return Err(Unauthenticated::Audience(expected.audience.clone()));
    }
    let user = review.user.unwrap_or_default();
    let name = user.username.unwrap_or_default();
    if name != expected.user {
        return Err(Unauthenticated::OtherUser {
            user: name,
            expected: expected.user.clone(),
        });
    }
    let extra = user.extra.unwrap_or_default();
    let value = |key: &'static str| {
        let values = extra.get(key).map(Vec::as_slice);
        match values {
            Some([value]) if !value.is_empty() => Ok(value.clone()),
            _ => Err(Unauthenticated::NotBound(key)),
        }
    };
    Ok(Caller {
        pod_name: value(POD_NAME)?,
        pod_uid: value(POD_UID)?.into(),
        node: value(NODE_NAME)?.into(),
    })
}

// === impl Unauthenticated ===

impl From<Unauthenticated> for tonic::Status {
    fn from(error: Unauthenticated) -> Self {
        let message = error.to_string();
        match error {
            Unauthenticated::ReviewFailed(_) => Self::unavailable(message),
            _ => Self::unauthenticated(message),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use k8s_openapi::api::authentication::v1::UserInfo;

    use super::*;

    fn expected() -> Expected {
        Expected::new("istio-ca", "ambit-system", "ambit-proxy")
    }

    fn review() -> TokenReviewStatus {
        let extra = [
            (NODE_NAME, "node-1"),
            (POD_NAME, "proxy-x"),
            (POD_UID, "uid-x"),
        ];
        TokenReviewStatus {
            authenticated: Some(true),
            audiences: Some(vec!["istio-ca".to_owned()]),
            user: Some(UserInfo {
                username: Some("system:serviceaccount:ambit-system:ambit-proxy".to_owned()),
                extra: Some(BTreeMap::from(
                    extra.map(|(key, value)| (key.to_owned(), vec![value.to_owned()])),
                )),
                ..UserInfo::default()
            }),
            error: None,
        }
    }

    #[test]
    fn a_proxys_token_names_its_pod_and_node() {
        let caller = caller(review(), &expected()).unwrap();
        assert_eq!(caller.node, "node-1".into());
        assert_eq!(caller.pod_uid, "uid-x".into());
    }

    #[test]
    fn a_token_that_is_not_accepted_is_refused_with_the_servers_reason() {
        let mut review = review();
        review.authenticated = Some(false);
        review.error = Some("token expired".to_owned());
        let error = caller(review, &expected()).unwrap_err();
        assert_eq!(
            error,
            Unauthenticated::NotAccepted("token expired".to_owned())
        );
    }

    #[test]
    fn a_token_for_another_audience_is_refused() {
        let mut review = review();
        review.audiences = Some(vec!["kubernetes".to_owned()]);
        let error = caller(review, &expected()).unwrap_err();
        assert_eq!(error, Unauthenticated::Audience("istio-ca".to_owned()));
    }

    #[test]
    fn a_token_of_another_account_is_refused() {
        let mut review = review();
        review.user.as_mut().unwrap().username =
            Some("system:serviceaccount:shop:ambit-proxy".to_owned());
        let error = caller(review, &expected()).unwrap_err();
        assert!(
            matches!(error, Unauthenticated::OtherUser { .. }),
            "{error}"
        );
    }

    #[test]
    fn a_token_that_is_bound_to_no_node_is_refused() {
        let mut review = review();
        let extra = review.user.as_mut().unwrap().extra.as_mut().unwrap();
        extra.remove(NODE_NAME);
        let error = caller(review, &expected()).unwrap_err();
        assert_eq!(error, Unauthenticated::NotBound(NODE_NAME));
    }

    #[test]
    fn a_token_comes_as_bearer() {
        let mut metadata = MetadataMap::new();
        assert_eq!(bearer(&metadata), Err(Unauthenticated::NoToken));
        metadata.insert("authorization", "Basic abc".parse().unwrap());
        assert_eq!(bearer(&metadata), Err(Unauthenticated::NoToken));
        metadata.insert("authorization", "bearer abc".parse().unwrap());
        assert_eq!(bearer(&metadata), Ok("abc"));
    }
}
