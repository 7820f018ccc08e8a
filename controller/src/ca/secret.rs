//! The Secret that holds the CA: made on the first start, read, and watched.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures::StreamExt;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{ObjectMeta, PostParams};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{Config, Event, watcher};
use kube::{Api, Client};
use tokio::sync::watch;

use super::{Ca, CaError, CaPem, new_root};
use crate::problems::{Problems, explain};
use crate::watch::backoff;

const PART: &str = "certificate authority";
const WATCH_PART: &str = "watch the secret of the certificate authority";

/// Between two attempts to reach an API server that does not answer.
const RETRY: Duration = Duration::from_secs(2);

/// The CA that signs now.
pub(crate) type CurrentCa = watch::Receiver<Arc<Ca>>;

/// Where the CA is kept.
#[derive(Clone)]
pub(crate) struct CaSecret {
    api: Api<Secret>,
    namespace: String,
    name: String,
    trust_domain: String,
    problems: Problems,
}

/// A CA that cannot be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SecretError {
    #[error("Secret {secret}: {cause}; correct or delete it (a new CA is then made)")]
    Unusable { secret: String, cause: CaError },
    #[error("Secret {secret} has no key {key}; it needs tls.crt and tls.key")]
    NoKey { secret: String, key: &'static str },
    #[error("Secret {secret} cannot be read: {reason}")]
    Read { secret: String, reason: String },
    #[error("Secret {secret} cannot be created: {reason}")]
    Create { secret: String, reason: String },
    #[error("a new CA cannot be made: {0}")]
    New(CaError),
}

impl CaSecret {
    pub(crate) fn new(
        client: Client,
        (namespace, name): (&str, &str),
        trust_domain: &str,
        problems: Problems,
    ) -> Self {
        Self {
            api: Api::namespaced(client, namespace),
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            trust_domain: trust_domain.to_owned(),
            problems,
        }
    }

    /// The CA of the Secret, which is made if there is none. Waits for an API server that does
    /// not answer; anything else that is wrong needs a person.
    pub(crate) async fn load_or_create(&self) -> Result<Ca, SecretError> {
        let secret = loop {
            match self.read_or_create().await {
                Err(Attempt::NoAnswer(reason)) => self.problems.report(PART, reason),
                Err(Attempt::Failed(error)) => return Err(error),
                Ok(Some(secret)) => break secret,
                // Another replica made it between our two looks.
                Ok(None) => continue,
            }
            tokio::time::sleep(RETRY).await;
        };
        self.problems.clear(PART);
        self.parse(&secret)
    }

    /// Follows the Secret until the receivers are gone. What is not usable is reported, and the
    /// last CA that was goes on.
    pub(crate) async fn follow(self, current: watch::Sender<Arc<Ca>>) {
        let one = Config::default().fields(&format!("metadata.name={}", self.name));
        let mut events = std::pin::pin!(watcher(self.api.clone(), one).backoff(backoff()));
        let mut seen = false;
        while let Some(event) = events.next().await {
            if matches!(
                event,
                Ok(Event::InitDone | Event::Apply(_) | Event::Delete(_))
            ) {
                self.problems.clear(WATCH_PART);
            }
            match event {
                Ok(Event::Apply(secret) | Event::InitApply(secret)) => {
                    seen = true;
                    self.take(&secret, &current);
                }
                Ok(Event::Init) => seen = false,
                Ok(Event::InitDone) if seen => {}
                Ok(Event::InitDone | Event::Delete(_)) => self.problems.report(
                    PART,
                    format!(
                        "Secret {} is gone; the CA in memory goes on signing until this program \
                         restarts; restore the Secret",
                        self.full_name()
                    ),
                ),
                Err(error) => self.problems.report_watch(WATCH_PART, &error),
            }
        }
    }

    fn take(&self, secret: &Secret, current: &watch::Sender<Arc<Ca>>) {
        match self.parse(secret) {
            Ok(ca) => {
                self.problems.clear(PART);
                let new = current.send_if_modified(|current| {
                    let differs = !current.same_as(&ca);
                    if differs {
                        *current = Arc::new(ca);
                    }
                    differs
                });
                if new {
                    tracing::info!(secret = self.full_name(), "took over a new CA");
                }
            }
            Err(error) => self
                .problems
                .report(PART, format!("{error}; the CA before it goes on signing")),
        }
    }

    async fn read_or_create(&self) -> Result<Option<Secret>, Attempt> {
        let found = self.api.get_opt(&self.name).await.map_err(|error| {
            self.attempt(error, |secret, reason| SecretError::Read { secret, reason })
        })?;
        if found.is_some() {
            return Ok(found);
        }
        let secret = self.new_secret().map_err(Attempt::Failed)?;
        match self.api.create(&PostParams::default(), &secret).await {
            Ok(secret) => {
                tracing::info!(secret = self.full_name(), "made a new CA");
                Ok(Some(secret))
            }
            Err(kube::Error::Api(status)) if status.is_already_exists() => Ok(None),
            Err(error) => Err(self.attempt(error, |secret, reason| SecretError::Create {
                secret,
                reason,
            })),
        }
    }

    fn attempt(
        &self,
        error: kube::Error,
        failed: impl Fn(String, String) -> SecretError,
    ) -> Attempt {
        let error_of = |reason| failed(self.full_name(), reason);
        match &error {
            kube::Error::Api(status) if status.code < 500 && status.code != 429 => {
                Attempt::Failed(error_of(explain(&error)))
            }
            other => Attempt::NoAnswer(error_of(explain(other)).to_string()),
        }
    }

    fn new_secret(&self) -> Result<Secret, SecretError> {
        let root = new_root(&self.trust_domain, SystemTime::now()).map_err(SecretError::New)?;
        let bytes = |text: &str| ByteString(text.as_bytes().to_vec());
        Ok(Secret {
            metadata: ObjectMeta {
                name: Some(self.name.clone()),
                namespace: Some(self.namespace.clone()),
                ..ObjectMeta::default()
            },
            type_: Some("kubernetes.io/tls".to_owned()),
            data: Some(BTreeMap::from([
                ("tls.crt".to_owned(), bytes(&root.certificate)),
                ("tls.key".to_owned(), bytes(&root.key)),
                ("ca.crt".to_owned(), bytes(&root.certificate)),
            ])),
            ..Secret::default()
        })
    }

    fn parse(&self, secret: &Secret) -> Result<Ca, SecretError> {
        let data = secret.data.as_ref();
        let part = |key: &str| {
            data.and_then(|data| data.get(key))
                .map(|part| part.0.as_slice())
        };
        let needed = |key: &'static str| {
            part(key).ok_or_else(|| SecretError::NoKey {
                secret: self.full_name(),
                key,
            })
        };
        let pem = CaPem {
            certificate: needed("tls.crt")?,
            key: needed("tls.key")?,
            roots: part("ca.crt"),
        };
        Ca::parse(&pem, SystemTime::now()).map_err(|cause| SecretError::Unusable {
            secret: self.full_name(),
            cause,
        })
    }

    fn full_name(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }
}

/// Why one attempt to read or make the Secret led nowhere.
enum Attempt {
    /// Worth another.
    NoAnswer(String),
    Failed(SecretError),
}
