//! Certificates are read back with another library than the one that writes them.

use rcgen::CertificateSigningRequest;
use x509_parser::extensions::GeneralName;

use super::*;
use crate::authorize::{Caller, authorize};
use crate::testing::{Cluster, n, pod, rules, set_pod};

const DAY: Duration = Duration::from_secs(24 * 3600);
const WEB: &str = "spiffe://example.org/ns/shop/sa/web";

fn now() -> SystemTime {
    SystemTime::now()
}

fn root() -> NewRoot {
    new_root("example.org", now()).unwrap()
}

fn parse(certificate: &str, key: &str, roots: Option<&str>) -> Result<Ca, CaError> {
    let pem = CaPem {
        certificate: certificate.as_bytes(),
        key: key.as_bytes(),
        roots: roots.map(str::as_bytes),
    };
    Ca::parse(&pem, now())
}

fn ca() -> Ca {
    let root = root();
    parse(&root.certificate, &root.key, None).unwrap()
}

fn permit() -> Permit {
    let cluster = Cluster::with([set_pod(pod("a", "10.0.0.1"))]);
    let caller = Caller {
        pod_name: "proxy".to_owned(),
        pod_uid: "uid-proxy".into(),
        node: n("n1"),
    };
    let identity = WEB.parse().unwrap();
    authorize(
        &cluster.snapshot,
        &rules(),
        "example.org",
        &caller,
        identity,
    )
    .unwrap()
}

/// A request that asks for far more than it may have.
fn greedy_request(key: &KeyPair) -> CertificateSigningRequest {
    let mut params = CertificateParams::new(vec!["kubernetes.default.svc".to_owned()]).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, "admin");
    params.serialize_request(key).unwrap()
}

fn der(pem: &str) -> CertificateDer<'static> {
    CertificateDer::from_pem_slice(pem.as_bytes()).unwrap()
}

fn seconds(time: SystemTime) -> i64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap();
    i64::try_from(since.as_secs()).unwrap()
}

#[test]
fn a_workloads_certificate_holds_its_identity_its_key_and_nothing_else() {
    let ca = ca();
    let key = KeyPair::generate().unwrap();
    let csr = greedy_request(&key).pem().unwrap();
    let now = now();
    let chain = ca.sign_workload(&permit(), &csr, DAY, now).unwrap();
    assert_eq!(chain.len(), 2);
    assert_eq!(chain[1], ca.roots_pem());

    let (leaf, root) = (der(&chain[0]), der(&chain[1]));
    let leaf = X509Certificate::from_der(&leaf).unwrap().1;
    let root = X509Certificate::from_der(&root).unwrap().1;
    leaf.verify_signature(Some(root.public_key())).unwrap();
    assert_eq!(leaf.subject().iter().count(), 0);
    assert!(!leaf.is_ca());
    let sans = leaf.subject_alternative_name().unwrap().unwrap().value;
    assert_eq!(sans.general_names, [GeneralName::URI(WEB)]);
    let usages = leaf.extended_key_usage().unwrap().unwrap().value;
    assert!(usages.client_auth && usages.server_auth && !usages.any);
    assert_eq!(
        &*leaf.public_key().subject_public_key.data,
        key.public_key_raw()
    );
    assert_eq!(leaf.validity().not_after.timestamp(), seconds(now + DAY));
    assert!(leaf.validity().not_before.timestamp() <= seconds(now));
}

#[test]
fn no_two_certificates_have_one_serial() {
    let ca = ca();
    let csr = greedy_request(&KeyPair::generate().unwrap()).pem().unwrap();
    let serials: std::collections::BTreeSet<Vec<u8>> = (0..20)
        .map(|_| {
            let chain = ca.sign_workload(&permit(), &csr, DAY, now()).unwrap();
            let leaf = der(&chain[0]);
            X509Certificate::from_der(&leaf)
                .unwrap()
                .1
                .raw_serial()
                .to_vec()
        })
        .collect();
    assert_eq!(serials.len(), 20);
    assert!(
        serials
            .iter()
            .all(|serial| serial.len() <= 20 && serial[0] < 0x80)
    );
}

#[test]
fn a_request_that_its_key_did_not_sign_is_refused() {
    let request = greedy_request(&KeyPair::generate().unwrap());
    let mut forged = request.der().to_vec();
    *forged.last_mut().unwrap() ^= 1;
    let forged = pem::encode(&Pem::new("CERTIFICATE REQUEST", forged));
    for csr in [forged.as_str(), "", "-----BEGIN"] {
        let result = ca().sign_workload(&permit(), csr, DAY, now());
        assert!(matches!(result, Err(RequestError::Csr(_))), "{csr}");
    }
}

#[test]
fn validity_is_what_is_asked_within_bounds() {
    assert_eq!(validity(3600, DAY), Duration::from_secs(3600));
    assert_eq!(validity(i64::MAX, DAY), DAY);
    assert_eq!(validity(0, DAY), DAY);
    assert_eq!(validity(-1, DAY), DAY);
}

#[test]
fn no_leaf_outlives_the_ca() {
    let ca = ca();
    let late = ca.not_after - Duration::from_secs(3600);
    let csr = greedy_request(&KeyPair::generate().unwrap()).pem().unwrap();
    let chain = ca.sign_workload(&permit(), &csr, DAY, late).unwrap();
    let leaf = der(&chain[0]);
    let leaf = X509Certificate::from_der(&leaf).unwrap().1;
    assert_eq!(leaf.validity().not_after.timestamp(), seconds(ca.not_after));
    let after = ca.not_after + Duration::from_secs(1);
    let result = ca.sign_workload(&permit(), &csr, DAY, after);
    assert!(matches!(
        result,
        Err(RequestError::Ca(CaError::NotValidNow { .. }))
    ));
}

#[test]
fn several_roots_are_all_handed_out() {
    let (new, old) = (root(), root());
    let both = format!("{}{}", new.certificate, old.certificate);
    let ca = parse(&new.certificate, &new.key, Some(&both)).unwrap();
    assert_eq!(ca.roots.len(), 2);
    assert_eq!(
        CertificateDer::pem_slice_iter(ca.roots_pem().as_bytes()).count(),
        2
    );
}

#[test]
fn an_intermediate_ca_comes_with_its_root() {
    let root = root();
    let root_key = KeyPair::from_pem(&root.key).unwrap();
    let issuer = Issuer::from_ca_cert_pem(&root.certificate, root_key).unwrap();
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params
        .distinguished_name
        .push(DnType::CommonName, "intermediate");
    let own = params.signed_by(&key, &issuer).unwrap().pem();
    let key = key.serialize_pem();
    assert!(matches!(parse(&own, &key, None), Err(CaError::NoRoot)));
    let ca = parse(&own, &key, Some(&root.certificate)).unwrap();
    let csr = greedy_request(&KeyPair::generate().unwrap()).pem().unwrap();
    let chain = ca.sign_workload(&permit(), &csr, DAY, now()).unwrap();
    assert_eq!(chain.len(), 3);
    assert_eq!(der(&chain[1]), der(&own));
    assert_eq!(der(&chain[2]), der(&root.certificate));
}

#[test]
fn what_cannot_sign_is_named() {
    let (one, other) = (root(), root());
    let leaf_key = KeyPair::generate().unwrap();
    let leaf = CertificateParams::default().self_signed(&leaf_key).unwrap();
    let cases = [
        (
            one.certificate.as_str(),
            other.key.as_str(),
            "tls.key does not belong",
        ),
        ("nonsense", one.key.as_str(), "tls.crt"),
        (one.certificate.as_str(), "nonsense", "tls.key"),
        (&leaf.pem(), &leaf_key.serialize_pem(), "not a CA"),
    ];
    for (certificate, key, expected) in cases {
        let error = parse(certificate, key, None).map(|_| ()).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
    let error = parse(
        &one.certificate,
        &one.key,
        Some("-----BEGIN CERTIFICATE-----\n!\n"),
    );
    assert!(
        error
            .map(|_| ())
            .unwrap_err()
            .to_string()
            .contains("ca.crt")
    );
}

#[test]
fn a_ca_out_of_its_time_is_refused() {
    let root = new_root("example.org", now() - 2 * ROOT_VALIDITY).unwrap();
    let error = parse(&root.certificate, &root.key, None)
        .map(|_| ())
        .unwrap_err();
    assert!(matches!(error, CaError::NotValidNow { .. }), "{error}");
}

#[test]
fn a_key_as_openssl_writes_it_is_read() {
    // `openssl ecparam -name prime256v1 -genkey` puts the curve before the key, in SEC1 form.
    let pem = CaPem {
        certificate: SEC1_CERTIFICATE.as_bytes(),
        key: SEC1_KEY.as_bytes(),
        roots: None,
    };
    let in_2050 = SystemTime::UNIX_EPOCH + DAY * 80 * 365;
    Ca::parse(&pem, in_2050).unwrap();
}

/// Made for this test, and known to everybody.
const SEC1_KEY: &str = "\
-----BEGIN EC PARAMETERS-----\n\
BggqhkjOPQMBBw==\n\
-----END EC PARAMETERS-----\n\
-----BEGIN EC PRIVATE KEY-----\n\
MHcCAQEEIF4gnPy169RZ68qRJp/5PoGBWnrZ0ZDCwVFgRLYBTMDZoAoGCCqGSM49\n\
AwEHoUQDQgAE107N8pIT4nrxxlFpKuml/znQWZrtw6w1BhXp9WPOaVua1bwpaxTE\n\
3Eq950EYzkfVL4u9lbUBoClHACzgZorTFA==\n\
-----END EC PRIVATE KEY-----\n";

const SEC1_CERTIFICATE: &str = "\
-----BEGIN CERTIFICATE-----\n\
MIIBjzCCATWgAwIBAgIUfWPVgeq8coZ+IEMKxX1wYCmUfqowCgYIKoZIzj0EAwIw\n\
FDESMBAGA1UEAwwJdGVzdCByb290MCAXDTI2MTEyNDIyNDQxMFoYDzIxMjYxMDMx\n\
MjI0NDEwWjAUMRIwEAYDVQQDDAl0ZXN0IHJvb3QwWTATBgcqhkjOPQIBBggqhkjO\n\
PQMBBwNCAATXTs3ykhPievHGUWkq6aX/OdBZmu3DrDUGFen1Y85pW5rVvClrFMTc\n\
Sr3nQRjOR9Uvi72VtQGgKUcALOBmitMUo2MwYTAdBgNVHQ4EFgQUbm9+uAeJoNiy\n\
KTNdAdRl8tCpOrYwHwYDVR0jBBgwFoAUbm9+uAeJoNiyKTNdAdRl8tCpOrYwDwYD\n\
VR0TAQH/BAUwAwEB/zAOBgNVHQ8BAf8EBAMCAgQwCgYIKoZIzj0EAwIDSAAwRQIh\n\
ANjdpx60dmvOlCvUuH8mftDo0Jqu0lDKcIOui1+ST/goAiAS11XdTXwT7Rl/HZzW\n\
5ui+UCwEtsL5VT8jDP76ezPwCg==\n\
-----END CERTIFICATE-----\n";
