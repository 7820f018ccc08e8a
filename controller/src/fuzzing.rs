//! What fuzz targets call: whatever reads bytes of strangers.

use std::time::{Duration, SystemTime};

use crate::authorize::Permit;
use crate::ca::{Ca, CaPem, new_root};
use crate::identity::SpiffeId;

/// Signs a request for a certificate, if it is one.
pub fn signing_request(text: &str) {
    thread_local! {
        static CA: Ca = own_ca();
    }
    let identity = SpiffeId {
        trust_domain: "cluster.local".to_owned(),
        namespace: "shop".into(),
        service_account: "web".to_owned(),
    };
    let permit = Permit::of(identity);
    CA.with(|ca| {
        let chain = ca.sign_workload(&permit, text, Duration::from_hours(1), SystemTime::now());
        // Whatever the request said, the certificate is for whom it was permitted.
        if let Ok(chain) = chain {
            assert_eq!(chain.len(), 2);
        }
    });
}

#[allow(clippy::expect_used, reason = "without a CA there is nothing to show")]
fn own_ca() -> Ca {
    let now = SystemTime::now();
    let root = new_root("cluster.local", now).expect("make a root");
    let pem = CaPem {
        certificate: root.certificate.as_bytes(),
        key: root.key.as_bytes(),
        roots: None,
    };
    Ca::parse(&pem, now).expect("read it")
}

/// Reads a CA as a user may give it: certificates, key and roots one after the other.
pub fn ca(bytes: &[u8]) {
    let third = bytes.len() / 3;
    let pem = CaPem {
        certificate: &bytes[..third],
        key: &bytes[third..2 * third],
        roots: Some(&bytes[2 * third..]),
    };
    drop(Ca::parse(&pem, SystemTime::now()));
}

/// Reads an identity; what is read is written the same.
pub fn identity(text: &str) {
    if let Ok(identity) = text.parse::<SpiffeId>() {
        assert_eq!(identity.to_string(), text);
    }
}
