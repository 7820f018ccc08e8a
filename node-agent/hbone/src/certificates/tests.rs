use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;
use rcgen::{BasicConstraints, CertificateSigningRequestParams, CertifiedIssuer, DnType, IsCa};

use super::*;

type Root = CertifiedIssuer<'static, KeyPair>;

fn root(name: &str) -> Root {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, name);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

fn web() -> SpiffeId {
    "spiffe://td/ns/shop/sa/web".parse().unwrap()
}

/// A request for the identity, and the key of it.
fn requested() -> (KeyPair, String) {
    let key = KeyPair::generate().unwrap();
    let request = signing_request(&web(), &key).unwrap();
    (key, request)
}

fn signed(root: &Root, request: &str) -> String {
    let request = CertificateSigningRequestParams::from_pem(request).unwrap();
    request.signed_by(root).unwrap().pem()
}

#[test]
fn a_request_has_the_identity_as_its_only_name() {
    let (_, request) = requested();
    let request = CertificateSigningRequestParams::from_pem(&request).unwrap();
    let name = SanType::URI(web().to_string().try_into().unwrap());
    assert_eq!(request.params.subject_alt_names, [name]);
    assert_eq!(request.params.distinguished_name.iter().count(), 0);
}

#[test]
fn the_last_element_may_hold_several_roots() {
    let (old, new) = (root("old"), root("new"));
    let (key, request) = requested();
    let answer = [signed(&new, &request), old.pem() + &new.pem()];
    let certificate = accept(&web(), &key, &answer).unwrap();
    assert_eq!((certificate.chain.len(), certificate.roots.len()), (1, 2));
    assert_eq!(certificate.trusted.len(), 2);
}

#[test]
fn answers_that_are_not_what_was_asked_for_are_refused() {
    let root = root("root");
    let (key, request) = requested();
    let good = signed(&root, &request);
    let (_, of_another_key) = requested();
    let refused = |identity: &SpiffeId, answer: &[String]| {
        accept(identity, &key, answer).map(drop).unwrap_err()
    };
    let other = "spiffe://td/ns/shop/sa/other".parse().unwrap();
    assert_eq!(refused(&web(), &[]), "the answer is empty");
    assert!(refused(&web(), &[root.pem()]).contains("before the roots"));
    let wrong = refused(&other, &[good.clone(), root.pem()]);
    assert_eq!(wrong, format!("it was signed for {}", web()));
    let foreign = [signed(&root, &of_another_key), root.pem()];
    assert_eq!(refused(&web(), &foreign), "it is for another key");
    assert!(refused(&web(), &[good, "nonsense".to_owned()]).contains("no root"));
}

/// Signs once what is due for renewal at once, and then fails.
struct Failing {
    root: Root,
    asked: AtomicUsize,
}

impl CertificateSource for Failing {
    async fn sign(&self, _: &SpiffeId, request: String) -> Result<Vec<String>, String> {
        if self.asked.fetch_add(1, Ordering::Relaxed) > 0 {
            return Err("the controller is away".to_owned());
        }
        let mut request = CertificateSigningRequestParams::from_pem(&request).unwrap();
        let now = std::time::SystemTime::now();
        request.params.not_before = (now - Duration::from_secs(7200)).into();
        request.params.not_after = (now + Duration::from_secs(3600)).into();
        let certificate = request.signed_by(&self.root).unwrap().pem();
        Ok(vec![certificate, self.root.pem()])
    }
}

#[tokio::test]
async fn a_renewal_that_fails_keeps_the_last_good_certificate() {
    let source = Arc::new(Failing {
        root: root("root"),
        asked: AtomicUsize::new(0),
    });
    let all = Arc::new(Certificates::default());
    let mut changes = all.changes();
    all.want(&BTreeSet::from([web()]), &source);
    while all.states()[&web()].error.is_none() {
        changes.changed().await.unwrap();
    }
    let error = all.states()[&web()].error.clone().unwrap();
    assert!(error.contains("the controller is away"), "{error}");
    assert!(all.get(&web()).is_some());
    all.want(&BTreeSet::new(), &source);
    assert!(all.states().is_empty() && all.get(&web()).is_none());
}

#[test]
fn a_certificate_that_has_expired_is_none() {
    let root = root("root");
    let (key, request) = requested();
    let answer = [signed(&root, &request), root.pem()];
    let certificate = accept(&web(), &key, &answer).unwrap();
    let end = certificate.not_after;
    let state = State {
        certificate: Some(Arc::new(certificate)),
        error: None,
    };
    assert!(state.valid(end - Duration::from_secs(1)).is_some());
    assert!(state.valid(end).is_none());
}

proptest! {
    #[test]
    fn waits_grow_up_to_a_bound(failures in 1..u32::MAX, jitter in 0.0..1.0) {
        let wait = backoff(failures, jitter);
        prop_assert!(wait >= Duration::from_millis(80) && wait <= Duration::from_secs(18));
    }

    #[test]
    fn renewal_is_due_around_half_of_life(jitter in 0.0..1.0) {
        let root = root("root");
        let (key, request) = requested();
        let answer = [signed(&root, &request), root.pem()];
        let certificate = accept(&web(), &key, &answer).unwrap();
        let life = certificate.not_after.duration_since(certificate.not_before).unwrap();
        let wait = certificate.renew_in(certificate.not_before, jitter);
        let share = wait.as_secs_f64() / life.as_secs_f64();
        prop_assert!((0.44..0.56).contains(&share), "{share}");
        let late = certificate.renew_in(certificate.not_after, jitter);
        prop_assert_eq!(late, Duration::from_secs(1));
    }
}
