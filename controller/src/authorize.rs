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
