//! What the mesh knows about workloads and services: an immutable snapshot; a change shares all but
//! what it changes.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use imbl::{HashMap, OrdSet};
use smallvec::SmallVec;

use crate::identity::SpiffeId;
use crate::policy::{Policy, PolicyScope};

/// How long the address of a workload that has gone is known as such: whoever gets it next is announced at a
/// slightly different time than its pod starts to answer.
const GONE_FOR: Duration = Duration::from_secs(10);

/// A workload of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Its resource name; a pod's is its UID.
    pub uid: Arc<str>,
    /// Name of the pod.
    pub name: Arc<str>,
    /// Namespace of the pod.
    pub namespace: Arc<str>,
    /// Service account of the pod; empty where there is none.
    pub service_account: Arc<str>,
    /// Whom its proxy must prove to be, if it is reached by HBONE.
    pub hbone: Option<SpiffeId>,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Whether its addresses are those of its node, which others have too.
    pub host_network: bool,
    /// Node it runs on.
    pub node: Arc<str>,
    /// Its network; empty for the only one.
    pub network: Arc<str>,
    /// Whether it is ready.
    pub healthy: bool,
    /// Where it is.
    pub locality: Locality,
    /// Deployment or other owner.
    pub workload_name: Arc<str>,
    /// Kind of the owner, in the field's words (`deployment`, `pod`, ...).
    pub workload_type: &'static str,
    /// Canonical name, for telemetry.
    pub canonical_name: Arc<str>,
    /// Canonical revision, for telemetry.
    pub canonical_revision: Arc<str>,
    /// Cluster it is in.
    pub cluster: Arc<str>,
    /// What it serves, which it has in common with others.
    pub services: Arc<ServedPorts>,
    /// Policies that select it (`namespace/name`).
    pub policies: Vec<Arc<str>>,
}

/// By service (`namespace/hostname`): service port to the workload's own port.
pub type ServedPorts = BTreeMap<Arc<str>, BTreeMap<u16, u16>>;

impl Workload {
    /// The addresses that say who it is.
    fn unique_addresses(&self) -> &[IpAddr] {
        if self.host_network {
            &[]
        } else {
            &self.addresses
        }
    }
}

/// Where a workload is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Locality {
    /// Region.
    pub region: Arc<str>,
    /// Zone.
    pub zone: Arc<str>,
    /// Subzone.
    pub subzone: Arc<str>,
}

/// A service of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Its resource name, `namespace/hostname`.
    pub key: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its DNS name.
    pub hostname: Arc<str>,
    /// Its virtual addresses.
    pub addresses: Vec<IpAddr>,
    /// Its ports, each with the port that endpoints have by default.
    pub ports: BTreeMap<u16, u16>,
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
    /// Nearly always one: two have an address only while it goes from one to the other.
    by_address: HashMap<IpAddr, SmallVec<[Arc<Workload>; 1]>>,
    services: HashMap<Arc<str>, Arc<Service>>,
    by_vip: HashMap<IpAddr, Arc<str>>,
    endpoints: HashMap<Arc<str>, OrdSet<Arc<str>>>,
    /// Addresses that workloads of the mesh had and nobody has now, with the time until which that counts.
    gone: HashMap<IpAddr, Instant>,
    policies: HashMap<Arc<str>, Arc<Policy>>,
    /// Names of the policies that are for all workloads of a namespace (`Some`) or of all (`None`).
    unselective: HashMap<Option<Arc<str>>, OrdSet<Arc<str>>>,
}

impl Directory {
    /// Adds a workload, or replaces that of its name.
    pub fn put_workload(&mut self, workload: Workload) {
        self.take_workload(&workload.uid);
        let workload = Arc::new(workload);
        for address in workload.unique_addresses() {
            self.gone.remove(address);
            let holders = self.by_address.entry(*address).or_default();
            let place = holders.partition_point(|other| other.uid < workload.uid);
            holders.insert(place, workload.clone());
        }
        for service in workload.services.keys() {
            self.endpoints
                .entry(service.clone())
                .or_default()
                .insert(workload.uid.clone());
        }
        self.workloads.insert(workload.uid.clone(), workload);
    }

    /// Removes the workload of this name, if there is one, at this time.
    pub fn remove_workload(&mut self, uid: &str, now: Instant) {
        let Some(workload) = self.take_workload(uid) else {
            return;
        };
        if workload.hbone.is_none() {
            return;
        }
        for address in workload.unique_addresses() {
            if !self.by_address.contains_key(address) {
                self.gone.insert(*address, now + GONE_FOR);
            }
        }
    }

    fn take_workload(&mut self, uid: &str) -> Option<Arc<Workload>> {
        let workload = self.workloads.remove(uid)?;
        for address in workload.unique_addresses() {
            if let Some(holders) = self.by_address.get_mut(address) {
                holders.retain(|holder| *holder.uid != *uid);
                if holders.is_empty() {
                    self.by_address.remove(address);
                }
            }
        }
        for service in workload.services.keys() {
            remove_from(&mut self.endpoints, service, uid);
        }
        Some(workload)
    }

    /// Forgets who has gone too long ago.
    pub fn forget_gone(&mut self, now: Instant) {
        if self.gone.values().any(|until| *until <= now) {
            self.gone.retain(|_, until| *until > now);
        }
    }

    /// Whether a workload of the mesh had this address a moment ago, and nobody has it now.
    #[must_use]
    pub fn has_gone(&self, address: IpAddr, now: Instant) -> bool {
        self.gone.get(&address).is_some_and(|until| *until > now)
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
        self.remove_policy(&name);
        if let Some(bounds) = bounds_of(&policy) {
            let names = self.unselective.entry(bounds).or_default();
            names.insert(name.clone());
        }
        self.policies.insert(name, Arc::new(policy));
    }

    /// Removes the policy of this name, if there is one.
    pub fn remove_policy(&mut self, name: &str) {
        let Some(policy) = self.policies.remove(name) else {
            return;
        };
        if let Some(bounds) = bounds_of(&policy) {
            remove_from(&mut self.unselective, &bounds, name);
        }
    }

    /// The workload that has this address: a ready one before others.
    #[must_use]
    pub fn workload_at(&self, address: IpAddr) -> Option<&Arc<Workload>> {
        let holders = self.by_address.get(&address)?;
        let ready = holders.iter().find(|workload| workload.healthy);
        ready.or(holders.first())
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

    /// The policies that are for every workload of this namespace, with their names.
    pub fn policies_of(
        &self,
        namespace: &Arc<str>,
    ) -> impl Iterator<Item = (&Arc<str>, &Arc<Policy>)> {
        let of_all = self.unselective.get(&None);
        let of_namespace = self.unselective.get(&Some(namespace.clone()));
        let names = of_all.into_iter().chain(of_namespace).flatten();
        names.filter_map(|name| self.policies.get_key_value(name))
    }

    /// The workload of this name.
    #[must_use]
    pub fn workload(&self, uid: &str) -> Option<&Arc<Workload>> {
        self.workloads.get(uid)
    }
}

/// Whom a policy is for without being named by them: `Some(None)` are all workloads.
fn bounds_of(policy: &Policy) -> Option<Option<Arc<str>>> {
    match policy.scope {
        PolicyScope::Global => Some(None),
        PolicyScope::Namespace => Some(Some(policy.namespace.clone())),
        PolicyScope::Selected => None,
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

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::identity::TrustDomain;

    /// A workload of the mesh that is an endpoint of `shop/web`, port 80 to 8080.
    pub(crate) fn workload(uid: &str, ip: &str, node: &str) -> Workload {
        let identity = SpiffeId::new(&TrustDomain::new("td").unwrap(), "shop", "default");
        Workload {
            uid: uid.into(),
            name: uid.into(),
            namespace: "shop".into(),
            service_account: "default".into(),
            hbone: Some(identity.unwrap()),
            addresses: vec![ip.parse().unwrap()],
            host_network: false,
            node: node.into(),
            network: "".into(),
            healthy: true,
            locality: Locality::default(),
            workload_name: uid.into(),
            workload_type: "pod",
            canonical_name: uid.into(),
            canonical_revision: "latest".into(),
            cluster: "Kubernetes".into(),
            services: Arc::new([("shop/web".into(), [(80, 8080)].into())].into()),
            policies: Vec::new(),
        }
    }

    pub(crate) fn service(balancing: Balancing) -> Service {
        Service {
            key: "shop/web".into(),
            name: "web".into(),
            namespace: "shop".into(),
            hostname: "web.shop.svc.cluster.local".into(),
            addresses: vec!["10.96.0.10".parse().unwrap()],
            ports: BTreeMap::from([(80, 8080)]),
            balancing,
        }
    }

    #[test]
    fn a_ready_workload_has_an_address_before_one_that_is_not() {
        let mut directory = Directory::default();
        directory.put_workload(Workload {
            healthy: false,
            ..workload("a", "10.0.0.1", "n")
        });
        directory.put_workload(workload("b", "10.0.0.1", "n"));
        let at = |directory: &Directory| {
            let found = directory.workload_at("10.0.0.1".parse().unwrap());
            found.map(|workload| workload.uid.to_string())
        };
        assert_eq!(at(&directory).as_deref(), Some("b"));
        directory.remove_workload("b", Instant::now());
        assert_eq!(at(&directory).as_deref(), Some("a"));
        directory.remove_workload("a", Instant::now());
        assert_eq!(at(&directory), None);
    }

    #[test]
    fn the_address_of_a_mesh_workload_that_has_gone_is_known_until_somebody_has_it_or_time_is_over()
    {
        let (now, address) = (Instant::now(), "10.0.0.1".parse().unwrap());
        let mut directory = Directory::default();
        directory.put_workload(workload("a", "10.0.0.1", "n"));
        directory.put_workload(workload("a", "10.0.0.1", "m"));
        assert!(!directory.has_gone(address, now));
        directory.remove_workload("a", now);
        assert!(directory.has_gone(address, now));
        assert!(!directory.has_gone(address, now + GONE_FOR));
        directory.put_workload(Workload {
            hbone: None,
            ..workload("b", "10.0.0.1", "n")
        });
        assert!(!directory.has_gone(address, now));
        directory.remove_workload("b", now);
        assert!(!directory.has_gone(address, now), "it was not of the mesh");
        directory.put_workload(workload("c", "10.0.0.1", "n"));
        directory.remove_workload("c", now);
        directory.forget_gone(now + GONE_FOR);
        assert!(directory.gone.is_empty());
    }

    #[test]
    fn a_virtual_address_that_moved_stays_with_its_new_owner() {
        let mut directory = Directory::default();
        directory.put_service(service(Balancing::default()));
        directory.put_service(Service {
            key: "shop/other".into(),
            ..service(Balancing::default())
        });
        directory.remove_service("shop/web");
        let owner = directory.service_at("10.96.0.10".parse().unwrap());
        assert_eq!(owner.map(|service| &*service.key), Some("shop/other"));
    }

    #[test]
    fn policies_are_found_by_whom_they_are_for() {
        let mut directory = Directory::default();
        let scoped = |scope| Policy {
            namespace: "shop".into(),
            scope,
            ..Policy::default()
        };
        directory.put_policy("shop/all".into(), scoped(PolicyScope::Global));
        directory.put_policy("shop/mine".into(), scoped(PolicyScope::Namespace));
        directory.put_policy("shop/few".into(), scoped(PolicyScope::Selected));
        let of = |directory: &Directory, namespace: &str| {
            let namespace = namespace.into();
            let found = directory.policies_of(&namespace);
            found.map(|(name, _)| name.to_string()).collect::<Vec<_>>()
        };
        assert_eq!(of(&directory, "shop"), ["shop/all", "shop/mine"]);
        assert_eq!(of(&directory, "other"), ["shop/all"]);
        directory.put_policy("shop/mine".into(), scoped(PolicyScope::Selected));
        directory.remove_policy("shop/all");
        assert!(of(&directory, "shop").is_empty());
    }

    proptest! {
        #[test]
        fn indices_are_empty_again_when_everything_is_removed(
            steps in prop::collection::vec((0..4_u8, 0..4_u8, any::<bool>()), 0..40)
        ) {
            let mut directory = Directory::default();
            for (uid, ip, add) in steps {
                let uid = format!("w{uid}");
                if add {
                    directory.put_workload(workload(&uid, &format!("10.0.0.{ip}"), "n"));
                } else {
                    directory.remove_workload(&uid, Instant::now());
                }
                for found in directory.workloads() {
                    let at = directory.workload_at(found.addresses[0]);
                    prop_assert!(at.is_some_and(|at| at.addresses == found.addresses));
                }
                prop_assert_eq!(directory.endpoints("shop/web").count(), directory.workloads.len());
            }
            let all: Vec<_> = directory.workloads().map(|workload| workload.uid.clone()).collect();
            for uid in all {
                directory.remove_workload(&uid, Instant::now());
            }
            prop_assert!(directory.by_address.is_empty() && directory.endpoints.is_empty());
        }
    }
}
