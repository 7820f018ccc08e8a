//! Whether who says hello is this node's proxy: its pod is asked for at the API server, and its
//! namespace is looked at from both sides.

use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use crds::reasons;
use datapath::attachment::{self, AttachError};
use datapath::names::Names;
use datapath::netns::{Netns, NotNetns};
use datapath::{Family, Slot};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, Client};
use protocol::node::Hello;

use crate::failure::{self, Complaint, root};
use crate::roster::Identity;

/// How long the API server may take to learn the address of a pod that has just started.
const ADDRESS_PATIENCE: Duration = Duration::from_secs(20);

/// Time between two questions about a pod; doubled with each that the API server does not answer.
const RETRY: Duration = Duration::from_millis(250);

/// The longest time between two questions.
const LAST_RETRY: Duration = Duration::from_secs(8);

/// Who is let in.
pub(crate) struct Doorman {
    pub(crate) client: Client,
    pub(crate) expected: Expected,
    /// The host's network namespace.
    pub(crate) host: Netns,
    pub(crate) sysctl_root: PathBuf,
    /// What ours is called.
    pub(crate) names: Names,
}

/// What a proxy's pod looks like.
#[derive(Clone, Debug)]
pub(crate) struct Expected {
    pub(crate) namespace: String,
    pub(crate) node: String,
    pub(crate) service_account: String,
}

/// Who was let in.
#[derive(Debug)]
pub(crate) struct Admitted {
    pub(crate) identity: Identity,
    pub(crate) netns: Netns,
    /// The slot that an earlier agent had given it.
    pub(crate) slot: Option<Slot>,
}

/// What the API server says of a proxy's pod.
#[derive(Clone, Debug, PartialEq, Eq)]
struct ProxyPod {
    addresses: Vec<IpAddr>,
    created: Timestamp,
    /// It is being deleted: it may be draining yet.
    terminating: bool,
}

/// Who says hello is not this node's proxy.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Rejection {
    /// What came with the hello is no network namespace.
    #[error(transparent)]
    NotNetns(#[from] NotNetns),
    /// The namespaces cannot be told apart.
    #[error("ask the kernel which network namespace the descriptor is of")]
    Namespace(#[source] std::io::Error),
    /// The descriptor is of the host's own namespace.
    #[error(
        "pod {0} is on the host's own network: a proxy must have a network namespace of its own (hostNetwork: false)"
    )]
    HostNetwork(String),
    /// There is no such pod.
    #[error("there is no pod {namespace}/{name} with UID {uid}")]
    NoPod {
        /// Where it should be.
        namespace: String,
        /// Its name.
        name: String,
        /// Its UID.
        uid: String,
    },
    /// The pod is something else.
    #[error("pod {name} {problem}")]
    WrongPod {
        /// Its name.
        name: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The API server does not say.
    #[error(
        "ask for pod {namespace}/{name}: {cause} (needs get on pods in {namespace}; config/rbac gives it)"
    )]
    Unanswered {
        /// Where it should be.
        namespace: String,
        /// Its name.
        name: String,
        /// What was said instead.
        cause: String,
    },
    /// The namespace cannot be redirected to.
    #[error("pod {0}")]
    Namespaces(String, #[source] AttachError),
    /// The namespace is another pod's.
    #[error(
        "the network namespace that came with the hello of pod {name} has address {found}, the pod has {expected}"
    )]
    WrongAddress {
        /// The pod.
        name: String,
        /// The address in the namespace.
        found: IpAddr,
        /// The addresses of the pod.
        expected: String,
    },
}

impl Rejection {
    /// As the status tells it.
    pub(crate) fn complaint(&self) -> Complaint {
        let reason = match self {
            Self::Namespaces(_, error) => match Complaint::unusable(error).reason {
                reasons::PROXY_UNUSABLE => reasons::PROXY_REJECTED,
                reason => reason,
            },
            Self::HostNetwork(_) => reasons::PROXY_WITHOUT_VETH,
            _ => reasons::PROXY_REJECTED,
        };
        Complaint {
            reason,
            message: failure::chain(self),
        }
    }
}

impl Doorman {
    /// Checks a hello. Waits while the API server does not answer, and says so: what stands in the
    /// kernel stays meanwhile.
    pub(crate) async fn admit(
        &self,
        hello: Hello,
        descriptor: OwnedFd,
        waiting: impl Fn(Rejection) + Send,
    ) -> Result<Admitted, Rejection> {
        let name = &hello.pod_name;
        let netns = Netns::received(descriptor)?;
        let (theirs, ours) = (netns.id(), self.host.id());
        if theirs.map_err(Rejection::Namespace)? == ours.map_err(Rejection::Namespace)? {
            return Err(Rejection::HostNetwork(name.clone()));
        }
        let pod = self.pod(&hello, waiting).await?;
        let found = attachment::find(&self.host, &netns, &self.sysctl_root)
            .await
            .map_err(|error| Rejection::Namespaces(name.clone(), error))?;
        let own = Family::ALL
            .into_iter()
            .filter_map(|family| found.ends.of(family));
        let wrong = own
            .map(|ends| ends.proxy)
            .find(|ip| !pod.addresses.contains(ip));
        if let Some(found) = wrong {
            let expected: Vec<String> = pod.addresses.iter().map(ToString::to_string).collect();
            return Err(Rejection::WrongAddress {
                name: name.clone(),
                found,
                expected: expected.join(", "),
            });
        }
        let slot = attachment::slot(&netns, &self.names)
            .await
            .map_err(|error| Rejection::Namespaces(name.clone(), error))?;
        let identity = Identity {
            pod_name: hello.pod_name,
            pod_uid: hello.pod_uid,
            version: hello.version,
            created: pod.created,
            terminating: pod.terminating,
        };
        Ok(Admitted {
            identity,
            netns,
            slot,
        })
    }

    /// The pod that says hello, if it is a proxy of this node.
    async fn pod(
        &self,
        hello: &Hello,
        waiting: impl Fn(Rejection) + Send,
    ) -> Result<ProxyPod, Rejection> {
        let namespace = &self.expected.namespace;
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        let started = tokio::time::Instant::now();
        let mut retry = RETRY;
        loop {
            match pods.get_opt(&hello.pod_name).await {
                Ok(pod) => {
                    let pod = check(pod.as_ref(), hello, &self.expected)?;
                    if !pod.addresses.is_empty() {
                        return Ok(pod);
                    }
                    if started.elapsed() > ADDRESS_PATIENCE {
                        return Err(wrong(hello, "has no address".to_owned()));
                    }
                    retry = RETRY;
                }
                Err(error) => {
                    waiting(Rejection::Unanswered {
                        namespace: namespace.clone(),
                        name: hello.pod_name.clone(),
                        cause: root(&error),
                    });
                    retry = (retry * 2).min(LAST_RETRY);
                }
            }
            tokio::time::sleep(retry).await;
        }
    }
}

/// Whether the pod is a proxy of this node; without addresses if it has none yet. Pure.
fn check(pod: Option<&Pod>, hello: &Hello, expected: &Expected) -> Result<ProxyPod, Rejection> {
    let pod = pod.filter(|pod| pod.metadata.uid.as_ref() == Some(&hello.pod_uid));
    let Some(pod) = pod else {
        return Err(Rejection::NoPod {
            namespace: expected.namespace.clone(),
            name: hello.pod_name.clone(),
            uid: hello.pod_uid.clone(),
        });
    };
    let spec = pod.spec.as_ref();
    let node = spec
        .and_then(|spec| spec.node_name.as_deref())
        .unwrap_or_default();
    if node != expected.node {
        return Err(wrong(
            hello,
            format!("runs on node {node:?}, this is {:?}", expected.node),
        ));
    }
    let account = spec
        .and_then(|spec| spec.service_account_name.as_deref())
        .unwrap_or_default();
    if account != expected.service_account {
        let problem = format!(
            "has service account {account:?}, a proxy has {:?}",
            expected.service_account
        );
        return Err(wrong(hello, problem));
    }
    let status = pod.status.as_ref();
    let addresses = status
        .and_then(|status| status.pod_ips.as_ref())
        .into_iter()
        .flatten();
    let created = pod.metadata.creation_timestamp.as_ref();
    Ok(ProxyPod {
        addresses: addresses
            .filter_map(|address| address.ip.parse().ok())
            .collect(),
        created: created.map_or(Timestamp::UNIX_EPOCH, |time| time.0),
        terminating: pod.metadata.deletion_timestamp.is_some(),
    })
}

fn wrong(hello: &Hello, problem: String) -> Rejection {
    Rejection::WrongPod {
        name: hello.pod_name.clone(),
        problem,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn expected() -> Expected {
        Expected {
            namespace: "ambit-system".to_owned(),
            node: "node-1".to_owned(),
            service_account: "ambit-proxy".to_owned(),
        }
    }

    fn hello() -> Hello {
        Hello {
            version: "1".to_owned(),
            pod_uid: "u1".to_owned(),
            pod_name: "ambit-proxy-x".to_owned(),
        }
    }

    fn pod(change: impl FnOnce(&mut Value)) -> Pod {
        let mut pod = json!({
            "metadata": {"name": "ambit-proxy-x", "uid": "u1"},
            "spec": {"nodeName": "node-1", "serviceAccountName": "ambit-proxy", "containers": []},
            "status": {"podIPs": [{"ip": "10.0.0.3"}]},
        });
        change(&mut pod);
        serde_json::from_value(pod).unwrap()
    }

    fn refused(change: impl FnOnce(&mut Value)) -> String {
        check(Some(&pod(change)), &hello(), &expected())
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn the_nodes_own_proxy_is_let_in_with_its_addresses() {
        let found = check(Some(&pod(|_| {})), &hello(), &expected()).unwrap();
        assert_eq!(found.addresses, ["10.0.0.3".parse::<IpAddr>().unwrap()]);
        assert!(!found.terminating);
    }

    #[test]
    fn a_proxy_that_drains_is_let_in_by_an_agent_that_starts_again() {
        let ending =
            pod(|pod| pod["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z"));
        let found = check(Some(&ending), &hello(), &expected()).unwrap();
        assert!(found.terminating && !found.addresses.is_empty());
    }

    #[test]
    fn a_pod_without_an_address_is_asked_for_again() {
        let young = pod(|pod| pod["status"] = json!({}));
        assert_eq!(
            check(Some(&young), &hello(), &expected())
                .unwrap()
                .addresses,
            Vec::<IpAddr>::new()
        );
    }

    #[test]
    fn whoever_is_not_the_nodes_proxy_is_turned_away_with_the_reason() {
        assert!(check(None, &hello(), &expected()).is_err());
        type Change = fn(&mut Value);
        let cases: [(Change, &str); 3] = [
            (|pod| pod["metadata"]["uid"] = json!("other"), "with UID u1"),
            (
                |pod| pod["spec"]["nodeName"] = json!("node-2"),
                "runs on node \"node-2\"",
            ),
            (
                |pod| pod["spec"]["serviceAccountName"] = json!("default"),
                "service account \"default\"",
            ),
        ];
        for (change, part) in cases {
            let message = refused(change);
            assert!(message.contains(part), "{message}");
        }
    }
}
