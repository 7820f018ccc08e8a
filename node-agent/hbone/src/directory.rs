//! What the mesh knows about workloads and services: an immutable snapshot; a change shares all but
//! what it changes.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use imbl::{HashMap, OrdSet};

use crate::identity::SpiffeId;
use crate::policy::Policy;

/// A workload of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Its resource name.
    pub uid: Arc<str>,
    /// Name of the pod.
    pub name: String,
    /// Namespace of the pod.
    pub namespace: String,
    /// Who it is.
    pub identity: SpiffeId,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Node it runs on.
    pub node: String,
    /// Its network; empty for the only one.
    pub network: String,
    /// Whether it is reached by HBONE.
    pub hbone: bool,
    /// Whether it is ready.
    pub healthy: bool,
    /// Where it is.
    pub locality: Locality,
    /// Deployment or other owner.
    pub workload_name: String,
    /// Canonical name, for metrics.
    pub canonical_name: String,
    /// Canonical revision, for metrics.
    pub canonical_revision: String,
    /// Cluster it is in.
    pub cluster: String,
    /// By service (`namespace/hostname`): service port to its own port.
    pub services: BTreeMap<Arc<str>, BTreeMap<u16, u16>>,
    /// Policies that select it (`namespace/name`).
    pub policies: Vec<Arc<str>>,
}

/// Where a workload is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Locality {
    /// Region.
    pub region: String,
    /// Zone.
    pub zone: String,
    /// Subzone.
    pub subzone: String,
}

/// A service of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Its resource name, `namespace/hostname`.
    pub key: Arc<str>,
    /// Its name.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Its DNS name.
    pub hostname: String,
    /// Its virtual addresses.
    pub addresses: Vec<IpAddr>,
    /// Its ports.
    pub ports: Vec<u16>,
    /// How endpoints are preferred.
    pub balancing: Balancing,
}

/// How endpoints are preferred.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Balancing {
    /// What an endpoint should share with the client, the most important first.
    pub preference: Vec<Scope>,
    /// Only endpoints that share all of it.
    pub strict: bool,
    /// Also endpoints that are not ready.
    pub allow_unhealthy: bool,
}

/// Something that two workloads can share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// The region.
    Region,
    /// The zone.
    Zone,
    /// The subzone.
    Subzone,
    /// The node.
    Node,
    /// The cluster.
    Cluster,
    /// The network.
    Network,
}

/// The snapshot.
#[derive(Clone, Debug, Default)]
pub struct Directory {
    workloads: HashMap<Arc<str>, Arc<Workload>>,
    by_address: HashMap<IpAddr, OrdSet<Arc<str>>>,
    services: HashMap<Arc<str>, Arc<Service>>,
    by_vip: HashMap<IpAddr, Arc<str>>,
    endpoints: HashMap<Arc<str>, OrdSet<Arc<str>>>,
    policies: HashMap<Arc<str>, Arc<Policy>>,
}

impl Directory {
    /// Adds a workload, or replaces that of its name.
    pub fn put_workload(&mut self, workload: Workload) {
        self.remove_workload(&workload.uid);
        for address in &workload.addresses {
            self.by_address
                .entry(*address)
                .or_default()
                .insert(workload.uid.clone());
        }
        for service in workload.services.keys() {
            self.endpoints
                .entry(service.clone())
                .or_default()
                .insert(workload.uid.clone());
        }
        self.workloads
            .insert(workload.uid.clone(), Arc::new(workload));
    }

    /// Removes the workload of this name, if there is one.
    pub fn remove_workload(&mut self, uid: &str) {
        let Some(workload) = self.workloads.remove(uid) else {
            return;
        };
        for address in &workload.addresses {
            remove_from(&mut self.by_address, address, uid);
        }
        for service in workload.services.keys() {
            remove_from(&mut self.endpoints, service, uid);
        }
    }

    /// Adds a service, or replaces that of its name.
    pub fn put_service(&mut self, service: Service) {
        self.remove_service(&service.key);
        for address in &service.addresses {
            self.by_vip.insert(*address, service.key.clone());
        }
        self.services.insert(service.key.clone(), Arc::new(service));
    }

    /// Removes the service of this name, if there is one.
    pub fn remove_service(&mut self, key: &str) {
        let Some(service) = self.services.remove(key) else {
            return;
        };
        for address in &service.addresses {
            if self
                .by_vip
                .get(address)
                .is_some_and(|owner| **owner == *key)
            {
                self.by_vip.remove(address);
            }
        }
    }

    /// Adds a policy, or replaces that of its name (`namespace/name`).
    pub fn put_policy(&mut self, name: Arc<str>, policy: Policy) {
        self.policies.insert(name, Arc::new(policy));
    }

    /// Removes the policy of this name, if there is one.
    pub fn remove_policy(&mut self, name: &str) {
        self.policies.remove(name);
    }

    /// The workload that has this address: a ready one before others.
    #[must_use]
    pub fn workload_at(&self, address: IpAddr) -> Option<&Arc<Workload>> {
        let uids = self.by_address.get(&address)?;
        let mut found = uids
            .iter()
            .filter_map(|uid| self.workloads.get(uid))
            .peekable();
        let first = found.peek().copied();
        found.find(|workload| workload.healthy).or(first)
    }

    /// The service that has this virtual address.
    #[must_use]
    pub fn service_at(&self, address: IpAddr) -> Option<&Arc<Service>> {
        self.services.get(self.by_vip.get(&address)?)
    }

    /// The workloads behind a service.
    pub fn endpoints(&self, service: &str) -> impl Iterator<Item = &Arc<Workload>> {
        let uids = self.endpoints.get(service).into_iter().flatten();
        uids.filter_map(|uid| self.workloads.get(uid))
    }

    /// Every workload.
    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads.values()
    }

    /// Every service.
    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.values()
    }

    /// Every policy with its name.
    pub fn policies(&self) -> impl Iterator<Item = (&Arc<str>, &Arc<Policy>)> {
        self.policies.iter()
    }

    /// The policy of this name.
    #[must_use]
    pub fn policy(&self, name: &str) -> Option<&Arc<Policy>> {
        self.policies.get(name)
    }

    /// Whether a workload of this name is there.
    #[must_use]
    pub fn has_workload(&self, uid: &str) -> bool {
        self.workloads.contains_key(uid)
    }
}

fn remove_from<K: Clone + Eq + std::hash::Hash>(
    index: &mut HashMap<K, OrdSet<Arc<str>>>,
    key: &K,
    uid: &str,
) {
    let Some(uids) = index.get_mut(key) else {
        return;
    };
    uids.remove(uid);
    if uids.is_empty() {
        index.remove(key);
    }
}
