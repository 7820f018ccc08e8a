//! What discovery serves, as one immutable value. Pure.
//!
//! Every resource is encoded once and carries a hash of its content as its version, so that all
//! replicas name equal content equally. [`Directory::update`] derives only what a change touched.

mod service;
mod workload;

use std::sync::Arc;

use imbl::OrdMap;
use imbl::ordmap::DiffItem;
use prost::Message;
use protocol::workload::address::Type;
use protocol::workload::{self as proto, Address, NetworkMode};
use sha2::{Digest, Sha256};

use crate::desired::enrolment::Rules;
use crate::names::{Alias, PodUid, ResourceName, ServiceKey};
use crate::snapshot::index::Index;
use crate::snapshot::{ClusterSnapshot, EndpointKey, Touched};

/// What the cluster is called, and its rules.
#[derive(Clone, Debug)]
pub(crate) struct Facts {
    pub(crate) trust_domain: String,
    pub(crate) cluster_id: String,
    pub(crate) cluster_domain: String,
    pub(crate) rules: Rules,
}

/// All resources, and the ways to find them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Directory {
    resources: OrdMap<ResourceName, Arc<Resource>>,
    by_alias: Index<Alias, ResourceName>,
    /// The workloads of a service.
    members: Index<ResourceName, ResourceName>,
    /// How many changes have led to it.
    changes: usize,
}

/// One workload or service.
#[derive(Debug)]
pub(crate) struct Resource {
    pub(crate) name: ResourceName,
    pub(crate) version: Version,
    pub(crate) aliases: Vec<Alias>,
    /// The services that a workload serves.
    pub(crate) services: Vec<ResourceName>,
    /// Encoded [`Address`].
    pub(crate) body: Vec<u8>,
}

/// Hash of a resource's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Version(u64);

// === impl Directory ===

impl Directory {
    pub(crate) fn get(&self, name: &ResourceName) -> Option<&Arc<Resource>> {
        self.resources.get(name)
    }

    pub(crate) fn resources(&self) -> impl Iterator<Item = &Arc<Resource>> {
        self.resources.values()
    }

    pub(crate) fn len(&self) -> usize {
        self.resources.len()
    }

    /// Resources that have this name or alias.
    pub(crate) fn find(&self, name: &str) -> Vec<&Arc<Resource>> {
        if let Some(resource) = self.get(&name.into()) {
            return vec![resource];
        }
        let named = self.by_alias.get(&name.into());
        named.filter_map(|name| self.get(name)).collect()
    }

    /// The workloads that serve a service.
    pub(crate) fn members(&self, service: &ResourceName) -> impl Iterator<Item = &Arc<Resource>> {
        self.members.get(service).filter_map(|name| self.get(name))
    }

    /// How many changes have led here from there, where it is the same directory earlier; a resource that
    /// changed twice counts twice.
    pub(crate) fn count_since(&self, before: &Directory) -> usize {
        self.changes.saturating_sub(before.changes)
    }

    /// What is another here than there. Costs what differs: equal parts are shared.
    pub(crate) fn changes_since<'a>(
        &'a self,
        before: &'a Directory,
    ) -> impl Iterator<Item = (&'a ResourceName, Option<&'a Arc<Resource>>)> {
        before
            .resources
            .diff(&self.resources)
            .map(|item| match item {
                DiffItem::Add(name, new)
                | DiffItem::Update {
                    new: (name, new), ..
                } => (name, Some(new)),
                DiffItem::Remove(name, _) => (name, None),
            })
    }

    /// Derives what was touched from the snapshot.
    pub(crate) fn update(&mut self, facts: &Facts, snapshot: &ClusterSnapshot, touched: &Touched) {
        for uid in &touched.pods {
            let pod = snapshot.pod(uid);
            let workload = pod.and_then(|pod| workload::of_pod(facts, snapshot, pod));
            self.put(pod_name(uid), workload.map(Type::Workload));
        }
        for key in &touched.endpoints {
            let workload = workload::of_endpoint(facts, snapshot, key);
            self.put(endpoint_name(facts, key), workload.map(Type::Workload));
        }
        for key in &touched.services {
            let service = snapshot
                .service(key)
                .map(|service| service::of_service(facts, service));
            self.put(service_name(facts, key), service.map(Type::Service));
        }
    }

    fn put(&mut self, name: ResourceName, content: Option<Type>) {
        let new = content.map(|content| Resource::new(name.clone(), content));
        let old = self.resources.get(&name).cloned();
        if old.as_deref() == new.as_ref() {
            return;
        }
        self.changes += 1;
        if let Some(old) = old {
            for alias in &old.aliases {
                self.by_alias.remove(alias, &name);
            }
            for service in &old.services {
                self.members.remove(service, &name);
            }
        }
        let Some(new) = new else {
            self.resources.remove(&name);
            return;
        };
        for alias in &new.aliases {
            self.by_alias.insert(alias.clone(), name.clone());
        }
        for service in &new.services {
            self.members.insert(service.clone(), name.clone());
        }
        self.resources.insert(name, Arc::new(new));
    }
}

fn pod_name(uid: &PodUid) -> ResourceName {
    uid.as_str().into()
}

fn endpoint_name(facts: &Facts, key: &EndpointKey) -> ResourceName {
    let EndpointKey { slice, address } = key;
    format!("{}/EndpointSlice/{slice}/{address}", facts.cluster_id).into()
}

fn service_name(facts: &Facts, key: &ServiceKey) -> ResourceName {
    format!("{}/{}", key.namespace, hostname(facts, key)).into()
}

fn hostname(facts: &Facts, key: &ServiceKey) -> String {
    let ServiceKey { namespace, name } = key;
    format!("{name}.{namespace}.svc.{}", facts.cluster_domain)
}

// === impl Resource ===

impl Resource {
    fn new(name: ResourceName, content: Type) -> Self {
        let (aliases, services) = match &content {
            Type::Workload(workload) => (
                workload_aliases(workload),
                workload
                    .services
                    .keys()
                    .map(|key| key.as_str().into())
                    .collect(),
            ),
            Type::Service(service) => (
                service
                    .addresses
                    .iter()
                    .filter_map(|address| alias(&address.network, &address.address))
                    .collect(),
                Vec::new(),
            ),
        };
        let body = Address {
            r#type: Some(content),
        }
        .encode_to_vec();
        Self {
            name,
            version: Version::of(&body),
            aliases,
            services,
            body,
        }
    }
}

/// Equal names and versions have equal content.
impl PartialEq for Resource {
    fn eq(&self, other: &Self) -> bool {
        self.version == other.version && self.name == other.name
    }
}

impl Eq for Resource {}

/// A node's address stands for many, so a pod on the host's network has none.
fn workload_aliases(workload: &proto::Workload) -> Vec<Alias> {
    if workload.network_mode() == NetworkMode::HostNetwork {
        return Vec::new();
    }
    let addresses = workload.addresses.iter();
    addresses
        .filter_map(|address| alias(&workload.network, address))
        .collect()
}

fn alias(network: &str, octets: &[u8]) -> Option<Alias> {
    let address: std::net::IpAddr = match octets.len() {
        4 => <[u8; 4]>::try_from(octets).ok()?.into(),
        _ => <[u8; 16]>::try_from(octets).ok()?.into(),
    };
    Some(format!("{network}/{address}").into())
}

// === impl Version ===

impl Version {
    fn of(body: &[u8]) -> Self {
        let [a, b, c, d, e, f, g, h, ..] = <[u8; 32]>::from(Sha256::digest(body));
        Self(u64::from_be_bytes([a, b, c, d, e, f, g, h]))
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

#[cfg(test)]
mod tests;
