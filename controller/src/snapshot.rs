//! Step 2: what the cluster holds, as one immutable value.
//!
//! Maps share all but what changes, so that a copy costs nothing. [`ClusterSnapshot::apply`] names
//! everything whose derived state may differ now, so that a change costs what it touches.

pub(crate) mod index;
pub(crate) mod objects;
pub(crate) mod owner;
pub(crate) mod services;
mod update;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use imbl::OrdMap;

use self::index::Index;
use self::objects::{Namespace, Node, Pod, WrittenNode};
use self::services::{Endpoint, EndpointSlice, Service};
use crate::names::{NamespaceName, NodeName, PodKey, PodUid, ServiceKey, SliceKey};

/// All objects, and the ways to find them.
#[derive(Clone, Debug, Default)]
pub(crate) struct ClusterSnapshot {
    nodes: OrdMap<NodeName, Arc<Node>>,
    namespaces: OrdMap<NamespaceName, Arc<Namespace>>,
    pods: OrdMap<PodUid, Arc<Pod>>,
    services: OrdMap<ServiceKey, Arc<Service>>,
    slices: OrdMap<SliceKey, Arc<EndpointSlice>>,
    written: OrdMap<NodeName, Arc<WrittenNode>>,

    pod_uids: OrdMap<PodKey, PodUid>,
    pods_by_node: Index<NodeName, PodUid>,
    /// Pods that are labelled themselves, by what the label says.
    pods_by_mode: Index<(NamespaceName, Arc<str>), PodUid>,
    /// Without pods on the host's network: they share the node's address.
    pods_by_address: Index<IpAddr, PodUid>,
    slices_by_service: Index<ServiceKey, SliceKey>,
    slices_by_pod: Index<PodKey, SliceKey>,
    /// Of endpoints that name no pod.
    slices_by_address: Index<IpAddr, SliceKey>,
}

/// One change of one kind of object.
#[derive(Clone, Debug)]
pub(crate) enum Update {
    Node(Change<NodeName, Node>),
    Namespace(Change<NamespaceName, Namespace>),
    Pod(Change<PodUid, Pod>),
    Service(Change<ServiceKey, Service>),
    Slice(Change<SliceKey, EndpointSlice>),
    Written(Change<NodeName, WrittenNode>),
}

#[derive(Clone, Debug)]
pub(crate) enum Change<K, T> {
    Set(T),
    Remove(K),
    /// A complete list: what it does not hold is gone.
    Replace(Vec<T>),
}

/// An endpoint that names no pod.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct EndpointKey {
    pub(crate) slice: SliceKey,
    pub(crate) address: IpAddr,
}

/// What to derive anew after a change.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Touched {
    pub(crate) nodes: BTreeSet<NodeName>,
    pub(crate) pods: BTreeSet<PodUid>,
    pub(crate) services: BTreeSet<ServiceKey>,
    pub(crate) endpoints: BTreeSet<EndpointKey>,
}

// === impl ClusterSnapshot ===

impl ClusterSnapshot {
    pub(crate) fn node(&self, name: &NodeName) -> Option<&Arc<Node>> {
        self.nodes.get(name)
    }

    pub(crate) fn nodes(&self) -> impl Iterator<Item = &Arc<Node>> {
        self.nodes.values()
    }

    pub(crate) fn namespace(&self, name: &NamespaceName) -> Option<&Arc<Namespace>> {
        self.namespaces.get(name)
    }

    /// Namespaces that have this value of the enrolment label, or a pod that has.
    pub(crate) fn namespaces_of_mode(&self, mode: &str) -> BTreeSet<&NamespaceName> {
        let labelled = self.namespaces.values();
        let labelled = labelled.filter(|namespace| namespace.mode.as_deref() == Some(mode));
        let of_pods = self.pods_by_mode.keys();
        let of_pods = of_pods.filter(|(_, of_pod)| **of_pod == *mode);
        labelled
            .map(|namespace| &namespace.name)
            .chain(of_pods.map(|(name, _)| name))
            .collect()
    }

    pub(crate) fn pod(&self, uid: &PodUid) -> Option<&Arc<Pod>> {
        self.pods.get(uid)
    }

    pub(crate) fn pods_on(&self, node: &NodeName) -> impl Iterator<Item = &Arc<Pod>> {
        self.pods_by_node.get(node).filter_map(|uid| self.pod(uid))
    }

    /// Pods that say that this address is theirs.
    pub(crate) fn claimants(&self, address: IpAddr) -> impl Iterator<Item = &Arc<Pod>> {
        self.pods_by_address
            .get(&address)
            .filter_map(|uid| self.pod(uid))
    }

    pub(crate) fn service(&self, key: &ServiceKey) -> Option<&Arc<Service>> {
        self.services.get(key)
    }

    pub(crate) fn slice(&self, key: &SliceKey) -> Option<&Arc<EndpointSlice>> {
        self.slices.get(key)
    }

    /// Slices with an endpoint that names this pod.
    pub(crate) fn slices_of_pod(&self, key: &PodKey) -> impl Iterator<Item = &Arc<EndpointSlice>> {
        self.slices_by_pod
            .get(key)
            .filter_map(|slice| self.slices.get(slice))
    }

    /// Slices with an endpoint that has this address and names no pod.
    pub(crate) fn slices_of_address(
        &self,
        address: IpAddr,
    ) -> impl Iterator<Item = &Arc<EndpointSlice>> {
        self.slices_by_address
            .get(&address)
            .filter_map(|slice| self.slices.get(slice))
    }

    /// The AmbientNode of a node, as it is in the API server.
    pub(crate) fn written(&self, name: &NodeName) -> Option<&Arc<WrittenNode>> {
        self.written.get(name)
    }

    /// Everything, as first lists would bring it.
    #[cfg(test)]
    pub(crate) fn lists(&self) -> Vec<Update> {
        fn all<K: Ord + Clone, T: Clone>(map: &OrdMap<K, Arc<T>>) -> Vec<T> {
            map.values().map(|object| (**object).clone()).collect()
        }
        vec![
            Update::Node(Change::Replace(all(&self.nodes))),
            Update::Namespace(Change::Replace(all(&self.namespaces))),
            Update::Slice(Change::Replace(all(&self.slices))),
            Update::Service(Change::Replace(all(&self.services))),
            Update::Pod(Change::Replace(all(&self.pods))),
        ]
    }

    /// The pod, and whoever claims one of its addresses or gets traffic by it.
    fn touch_pod(&self, pod: &Pod, touched: &mut Touched) {
        touched.pod(pod);
        for address in claimed(pod) {
            for other in self.claimants(*address) {
                touched.pod(other);
            }
            for slice in self.slices_by_address.get(address) {
                touched.endpoints.insert(EndpointKey {
                    slice: slice.clone(),
                    address: *address,
                });
            }
        }
    }

    fn touch_pods_on(&self, node: &NodeName, touched: &mut Touched) {
        for uid in self.pods_by_node.get(node) {
            touched.pods.insert(uid.clone());
        }
    }

    fn touch_pods_in(&self, namespace: &NamespaceName, touched: &mut Touched) {
        let first = PodKey {
            namespace: namespace.clone(),
            name: "".into(),
        };
        let inside = self
            .pod_uids
            .range(first..)
            .take_while(|(key, _)| key.namespace == *namespace);
        for pod in inside.filter_map(|(_, uid)| self.pod(uid)) {
            touched.pod(pod);
        }
    }

    /// Whether there are pods with the label of this one in its namespace.
    fn has_pods_like(&self, pod: &Pod) -> bool {
        mode_of(pod).is_some_and(|key| self.pods_by_mode.get(&key).next().is_some())
    }

    /// What every node is told of a namespace may differ.
    fn touch_nodes(&self, touched: &mut Touched) {
        touched.nodes.extend(self.nodes.keys().cloned());
    }

    fn touch_service(&self, key: &ServiceKey, touched: &mut Touched) {
        touched.services.insert(key.clone());
        let slices = self.slices_by_service.get(key);
        for slice in slices.filter_map(|slice| self.slices.get(slice)) {
            for endpoint in &slice.endpoints {
                self.touch_endpoint(&slice.key, endpoint, touched);
            }
        }
    }

    fn touch_endpoint(&self, slice: &SliceKey, endpoint: &Endpoint, touched: &mut Touched) {
        if let Some(pod) = &endpoint.pod {
            touched.pods.extend(self.pod_uids.get(&pod.key).cloned());
            return;
        }
        for address in &endpoint.addresses {
            touched
                .pods
                .extend(self.pods_by_address.get(address).cloned());
            touched.endpoints.insert(EndpointKey {
                slice: slice.clone(),
                address: *address,
            });
        }
    }
}

/// Addresses that are the pod's alone.
fn claimed(pod: &Pod) -> &[IpAddr] {
    if pod.host_network { &[] } else { &pod.ips }
}

/// A pod's own label, with its namespace.
fn mode_of(pod: &Pod) -> Option<(NamespaceName, Arc<str>)> {
    let mode = pod.mode.clone()?;
    Some((pod.key.namespace.clone(), mode))
}

// === impl Touched ===

impl Touched {
    pub(crate) fn is_empty(&self) -> bool {
        self.nodes.is_empty()
            && self.pods.is_empty()
            && self.services.is_empty()
            && self.endpoints.is_empty()
    }

    fn pod(&mut self, pod: &Pod) {
        self.pods.insert(pod.uid.clone());
        self.nodes.extend(pod.node.clone());
    }
}
