//! What tests share: small objects, and clusters made of them.

use std::net::IpAddr;

use jiff::Timestamp;
use protocol::workload::{AppProtocol, IpFamilies, WorkloadType};

use crate::desired::enrolment::Rules;
use crate::directory::{Directory, Facts};
use crate::names::{NodeName, PodKey, ServiceKey, SliceKey};
use crate::snapshot::objects::{Locality, Namespace, Node, Pod};
use crate::snapshot::owner::Owner;
use crate::snapshot::services::{
    Endpoint, EndpointPort, EndpointSlice, Preference, Service, ServicePort, TargetPod,
};
use crate::snapshot::{Change, ClusterSnapshot, Touched, Update};

pub(crate) fn rules() -> Rules {
    Rules {
        label: "mesh".to_owned(),
        enrol: "in".to_owned(),
        opt_out: "out".to_owned(),
        system_namespace: "ambit-system".into(),
    }
}

pub(crate) fn facts() -> Facts {
    Facts {
        trust_domain: "example.org".to_owned(),
        cluster_id: "c1".to_owned(),
        cluster_domain: "cluster.local".to_owned(),
        rules: rules(),
    }
}

pub(crate) fn node(name: &str) -> Node {
    Node {
        name: name.into(),
        uid: format!("uid-of-{name}").into(),
        created: Some(Timestamp::UNIX_EPOCH),
        linux: true,
        boot: Some("boot-1".into()),
        taints: [].into(),
        locality: Locality {
            region: "r1".to_owned(),
            zone: format!("zone-of-{name}"),
            subzone: String::new(),
        },
    }
}

pub(crate) fn namespace(name: &str, mode: Option<&str>) -> Namespace {
    Namespace {
        name: name.into(),
        mode: mode.map(Into::into),
    }
}

/// A ready pod `shop/NAME` on `n1` with UID `uid-NAME`.
pub(crate) fn pod(name: &str, ip: &str) -> Pod {
    Pod {
        uid: format!("uid-{name}").into(),
        key: PodKey::new("shop", name),
        created: Some(Timestamp::UNIX_EPOCH),
        node: Some("n1".into()),
        service_account: "web".into(),
        ips: ip.parse().into_iter().collect(),
        host_network: false,
        terminal: false,
        terminating: false,
        ready: true,
        mode: None,
        sidecar: None,
        owner: Owner {
            kind: WorkloadType::Deployment,
            name: "web".into(),
        },
        canonical_name: "web".into(),
        canonical_revision: "v1".into(),
    }
}

/// Service `shop/NAME` with port 80 to the pods' port named `http`.
pub(crate) fn service(name: &str, ip: &str) -> Service {
    Service {
        key: ServiceKey::new("shop", name),
        addresses: ip.parse().into_iter().collect(),
        ports: vec![ServicePort {
            name: "http".into(),
            port: 80,
            target: None,
            app_protocol: AppProtocol::Http11,
        }],
        families: IpFamilies::Ipv4Only,
        preference: Preference::None,
        publish_not_ready: false,
    }
}

/// Slice `shop/SERVICE-1` with port `http` at 8080.
pub(crate) fn slice(service: &str, endpoints: Vec<Endpoint>) -> EndpointSlice {
    EndpointSlice {
        key: SliceKey::new("shop", &format!("{service}-1")),
        service: ServiceKey::new("shop", service),
        ports: vec![EndpointPort {
            name: "http".into(),
            port: 8080,
        }],
        endpoints,
    }
}

/// An endpoint that is a pod of `shop`.
pub(crate) fn pod_endpoint(pod: &str, ip: &str) -> Endpoint {
    Endpoint {
        pod: Some(TargetPod {
            key: PodKey::new("shop", pod),
            uid: Some(format!("uid-{pod}").into()),
        }),
        ..endpoint(ip)
    }
}

/// An endpoint that names no pod.
pub(crate) fn endpoint(ip: &str) -> Endpoint {
    Endpoint {
        addresses: ip.parse().into_iter().collect(),
        pod: None,
        ready: true,
        node: None,
        zone: None,
    }
}

/// `shop` is labelled, `plain` is not; nodes `n1` and `n2`.
pub(crate) fn base() -> Vec<Update> {
    vec![
        Update::Node(Change::Set(node("n1"))),
        Update::Node(Change::Set(node("n2"))),
        Update::Namespace(Change::Set(namespace("shop", Some("in")))),
        Update::Namespace(Change::Set(namespace("plain", None))),
    ]
}

pub(crate) fn set_pod(pod: Pod) -> Update {
    Update::Pod(Change::Set(pod))
}

pub(crate) fn set_service(service: Service) -> Update {
    Update::Service(Change::Set(service))
}

pub(crate) fn set_slice(slice: EndpointSlice) -> Update {
    Update::Slice(Change::Set(slice))
}

/// A cluster and what is derived from it, kept up change by change.
#[derive(Clone, Default)]
pub(crate) struct Cluster {
    pub(crate) snapshot: ClusterSnapshot,
    pub(crate) directory: Directory,
}

impl Cluster {
    pub(crate) fn new(updates: impl IntoIterator<Item = Update>) -> Self {
        let mut cluster = Self::default();
        for update in updates {
            cluster.apply(update);
        }
        cluster
    }

    pub(crate) fn with(updates: impl IntoIterator<Item = Update>) -> Self {
        Self::new(base().into_iter().chain(updates))
    }

    pub(crate) fn apply(&mut self, update: Update) -> Touched {
        let mut touched = Touched::default();
        self.snapshot.apply(update, &mut touched);
        self.directory.update(&facts(), &self.snapshot, &touched);
        touched
    }
}

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub(crate) fn n(name: &str) -> NodeName {
    name.into()
}
