//! Pure: which identities a node's proxy may have. Only those of pods that run on its node: a
//! stolen node must not become every workload of the cluster.

use crate::desired::enrolment::{Enrolment, Rules, enrolment};
use crate::identity::SpiffeId;
use crate::names::{NodeName, PodUid};
use crate::snapshot::ClusterSnapshot;

/// A node proxy, as its token says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Caller {
    pub(crate) pod_name: String,
    pub(crate) pod_uid: PodUid,
    pub(crate) node: NodeName,
}

/// The right to sign for an identity; only [`authorize`] makes one.
#[derive(Debug)]
pub(crate) struct Permit {
    identity: SpiffeId,
}

/// Why not.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("{asked:?} is not this mesh's trust domain {ours:?}")]
    TrustDomain { asked: String, ours: String },
    #[error("no enrolled pod on node {node} runs as {identity}")]
    NoSuchPod { node: NodeName, identity: String },
    #[error("pod {pod} runs on node {actual}, but its token says {claimed}")]
    Moved {
        pod: String,
        actual: NodeName,
        claimed: NodeName,
    },
}

impl Permit {
    /// What fuzz targets sign with.
    #[cfg(fuzzing)]
    pub(crate) fn of(identity: SpiffeId) -> Self {
        Self { identity }
    }

    pub(crate) fn identity(&self) -> &SpiffeId {
        &self.identity
    }
}

impl Refusal {
    /// One word, for metrics.
    pub(crate) fn reason(&self) -> &'static str {
        match self {
            Self::TrustDomain { .. } => "TrustDomain",
            Self::NoSuchPod { .. } => "NoSuchPod",
            Self::Moved { .. } => "Moved",
        }
    }
}

pub(crate) fn authorize(
    snapshot: &ClusterSnapshot,
    rules: &Rules,
    trust_domain: &str,
    caller: &Caller,
    identity: SpiffeId,
) -> Result<Permit, Refusal> {
    if identity.trust_domain != trust_domain {
        return Err(Refusal::TrustDomain {
            asked: identity.trust_domain,
            ours: trust_domain.to_owned(),
        });
    }
    let proxy = snapshot.pod(&caller.pod_uid);
    if let Some(actual) = proxy.and_then(|proxy| proxy.node.as_ref())
        && *actual != caller.node
    {
        return Err(Refusal::Moved {
            pod: caller.pod_name.clone(),
            actual: actual.clone(),
            claimed: caller.node.clone(),
        });
    }
    let runs_here = snapshot.pods_on(&caller.node).any(|pod| {
        pod.key.namespace == identity.namespace
            && *pod.service_account == *identity.service_account
            && enrolment(snapshot, rules, pod) == Enrolment::Enrolled
    });
    if !runs_here {
        return Err(Refusal::NoSuchPod {
            node: caller.node.clone(),
            identity: identity.to_string(),
        });
    }
    Ok(Permit { identity })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Cluster, n, pod, rules, set_pod};

    fn caller(node: &str) -> Caller {
        Caller {
            pod_name: "proxy-x".to_owned(),
            pod_uid: "uid-proxy".into(),
            node: n(node),
        }
    }

    fn ask(cluster: &Cluster, node: &str, identity: &str) -> Result<String, &'static str> {
        authorize(
            &cluster.snapshot,
            &rules(),
            "example.org",
            &caller(node),
            identity.parse().unwrap(),
        )
        .map(|permit| permit.identity().to_string())
        .map_err(|refusal| refusal.reason())
    }

    const WEB: &str = "spiffe://example.org/ns/shop/sa/web";

    #[test]
    fn an_enrolled_pods_identity_is_for_its_own_node_only() {
        let cluster = Cluster::with([set_pod(pod("a", "10.0.0.1"))]);
        assert_eq!(ask(&cluster, "n1", WEB), Ok(WEB.to_owned()));
        assert_eq!(ask(&cluster, "n2", WEB), Err("NoSuchPod"));
    }

    #[test]
    fn a_pod_outside_the_mesh_gives_no_identity() {
        let mut host = pod("a", "10.0.0.1");
        host.host_network = true;
        let cluster = Cluster::with([set_pod(host)]);
        assert_eq!(ask(&cluster, "n1", WEB), Err("NoSuchPod"));
    }

    #[test]
    fn another_account_namespace_or_domain_is_refused() {
        let cluster = Cluster::with([set_pod(pod("a", "10.0.0.1"))]);
        for (identity, reason) in [
            ("spiffe://example.org/ns/shop/sa/db", "NoSuchPod"),
            ("spiffe://example.org/ns/plain/sa/web", "NoSuchPod"),
            ("spiffe://evil.org/ns/shop/sa/web", "TrustDomain"),
        ] {
            assert_eq!(ask(&cluster, "n1", identity), Err(reason), "{identity}");
        }
    }

    #[test]
    fn a_terminating_pod_keeps_its_identity_and_one_that_is_gone_does_not() {
        let mut leaving = pod("a", "10.0.0.1");
        leaving.terminating = true;
        let uid = leaving.uid.clone();
        let mut cluster = Cluster::with([set_pod(leaving)]);
        assert!(ask(&cluster, "n1", WEB).is_ok());
        cluster.apply(crate::snapshot::Update::Pod(
            crate::snapshot::Change::Remove(uid),
        ));
        assert_eq!(ask(&cluster, "n1", WEB), Err("NoSuchPod"));
    }

    #[test]
    fn a_proxy_whose_token_names_another_node_than_its_pod_is_refused() {
        let mut proxy = pod("proxy", "10.0.0.8");
        proxy.node = Some(n("n2"));
        let cluster = Cluster::with([set_pod(pod("a", "10.0.0.1")), set_pod(proxy)]);
        assert_eq!(ask(&cluster, "n1", WEB), Err("Moved"));
    }
}
