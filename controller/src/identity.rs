//! SPIFFE identities of workloads: the only file that reads or writes their form.

use std::fmt;
use std::str::FromStr;

use crate::names::NamespaceName;

/// `spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/SERVICE-ACCOUNT`
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SpiffeId {
    pub(crate) trust_domain: String,
    pub(crate) namespace: NamespaceName,
    pub(crate) service_account: String,
}

/// A text that is no identity of a workload.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/SERVICE-ACCOUNT")]
pub(crate) struct NotAnIdentity(String);

impl FromStr for SpiffeId {
    type Err = NotAnIdentity;

    fn from_str(text: &str) -> Result<Self, NotAnIdentity> {
        let error = || NotAnIdentity(text.chars().take(256).collect());
        let path = text.strip_prefix("spiffe://").ok_or_else(error)?;
        let parts: Vec<&str> = path.split('/').collect();
        let [trust_domain, "ns", namespace, "sa", service_account] = parts.as_slice() else {
            return Err(error());
        };
        if ![trust_domain, namespace, service_account]
            .into_iter()
            .all(|part| is_name(part))
        {
            return Err(error());
        }
        Ok(Self {
            trust_domain: (*trust_domain).to_owned(),
            namespace: (*namespace).into(),
            service_account: (*service_account).to_owned(),
        })
    }
}

/// What Kubernetes allows in the names of namespaces and service accounts, and SPIFFE in those of
/// trust domains.
fn is_name(part: &str) -> bool {
    let allowed = |byte: u8| {
        byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'.' | b'_')
    };
    !part.is_empty() && part.len() <= 253 && part.bytes().all(allowed)
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn other_forms_are_refused() {
        for text in [
            "",
            "cluster.local/ns/a/sa/b",
            "spiffe://cluster.local/ns/a/sa/",
            "spiffe://cluster.local/ns/a/sa/b/c",
            "spiffe://cluster.local/sa/a/ns/b",
            "spiffe:///ns/a/sa/b",
            "spiffe://cluster.local/ns/a b/sa/c",
            "spiffe://cluster.local/ns/a/sa/b?x",
        ] {
            assert!(text.parse::<SpiffeId>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn what_is_printed_is_read_back(
            text in "spiffe://[a-z][a-z0-9.-]{0,20}/ns/[a-z][a-z0-9-]{0,20}/sa/[a-z][a-z0-9.-]{0,20}"
        ) {
            let id: SpiffeId = text.parse().unwrap();
            prop_assert_eq!(id.to_string(), text);
        }

        #[test]
        fn nothing_makes_the_parser_panic(text in ".*") {
            let _ = text.parse::<SpiffeId>();
        }
    }
}
