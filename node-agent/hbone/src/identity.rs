//! SPIFFE identities (SPIFFE ID specification; path form of the field: `/ns/NAMESPACE/sa/ACCOUNT`).

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// Name of the domain that identities are trusted in.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TrustDomain(Arc<str>);

/// A workload's identity. The only place that writes or reads the form of it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpiffeId {
    trust_domain: TrustDomain,
    namespace: Arc<str>,
    service_account: Arc<str>,
}

/// A text that is no identity.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// Another form.
    #[error("{0:?} is not spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/SERVICE-ACCOUNT")]
    Form(String),
    /// A part is empty or has characters that do not belong there.
    #[error("{part:?} cannot be a part of an identity")]
    Part {
        /// The part.
        part: String,
    },
}

impl TrustDomain {
    /// # Errors
    /// If the name is empty or has other characters than a DNS name.
    pub fn new(name: &str) -> Result<Self, IdentityError> {
        checked(name).map(Self)
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl SpiffeId {
    /// # Errors
    /// If a part is empty or has characters that do not belong there.
    pub fn new(
        trust_domain: &TrustDomain,
        namespace: &str,
        service_account: &str,
    ) -> Result<Self, IdentityError> {
        Ok(Self {
            trust_domain: trust_domain.clone(),
            namespace: checked(namespace)?,
            service_account: checked(service_account)?,
        })
    }

    /// Its trust domain.
    #[must_use]
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// Its namespace.
    #[must_use]
    pub fn namespace(&self) -> &Arc<str> {
        &self.namespace
    }

    /// Its service account.
    #[must_use]
    pub fn service_account(&self) -> &str {
        &self.service_account
    }
}

fn checked(part: &str) -> Result<Arc<str>, IdentityError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
    if part.is_empty() || part.len() > 253 || !part.chars().all(allowed) {
        return Err(IdentityError::Part {
            part: part.to_owned(),
        });
    }
    Ok(part.into())
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            trust_domain,
            namespace,
            service_account,
        } = self;
        write!(
            f,
            "spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}"
        )
    }
}

impl FromStr for SpiffeId {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, IdentityError> {
        let form = || IdentityError::Form(text.to_owned());
        let path = text.strip_prefix("spiffe://").ok_or_else(form)?;
        let parts: Vec<&str> = path.split('/').collect();
        let [trust_domain, "ns", namespace, "sa", service_account] = parts.as_slice() else {
            return Err(form());
        };
        Self::new(&TrustDomain::new(trust_domain)?, namespace, service_account)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn other_forms_are_refused() {
        for text in [
            "",
            "spiffe://",
            "https://td/ns/a/sa/b",
            "spiffe://td/ns/a/sa",
            "spiffe://td/ns/a/sa/b/c",
            "spiffe://td/sa/a/ns/b",
            "spiffe://td/ns//sa/b",
            "spiffe:///ns/a/sa/b",
            "spiffe://td/ns/a/sa/b c",
        ] {
            assert!(text.parse::<SpiffeId>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn a_printed_identity_parses_back(
            td in "[a-z][a-z.]{0,20}", ns in "[a-z][a-z0-9-]{0,20}", sa in "[a-z][a-z0-9.-]{0,20}"
        ) {
            let id = SpiffeId::new(&TrustDomain::new(&td).unwrap(), &ns, &sa).unwrap();
            prop_assert_eq!(id.to_string().parse::<SpiffeId>(), Ok(id));
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in ".*") {
            let _ = text.parse::<SpiffeId>();
        }
    }
}
