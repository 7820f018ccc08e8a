//! Taking in a change: the maps, their indices, and what the change touches.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use imbl::OrdMap;

use super::objects::{Namespace, Node, Pod, WrittenNode};
use super::services::{Endpoint, EndpointSlice, Service};
use super::{Change, ClusterSnapshot, Touched, Update, claimed, mode_of};
use crate::names::{NamespaceName, NodeName, PodUid, ServiceKey, SliceKey};

/// A kind of object that the snapshot holds.
trait Object: Sized {
    type Key: Ord + Clone;

    fn key(&self) -> &Self::Key;
    fn all(snapshot: &ClusterSnapshot) -> &OrdMap<Self::Key, Arc<Self>>;
    /// Does nothing if the object is as it was.
    fn set(self, snapshot: &mut ClusterSnapshot, touched: &mut Touched);
    /// Does nothing if there is none.
    fn remove(snapshot: &mut ClusterSnapshot, key: &Self::Key, touched: &mut Touched);
}

impl ClusterSnapshot {
    /// Takes in a change and adds to `touched` what it may have changed elsewhere.
    pub(crate) fn apply(&mut self, update: Update, touched: &mut Touched) {
        match update {
            Update::Node(change) => self.change(change, touched),
            Update::Namespace(change) => self.change(change, touched),
            Update::Pod(change) => self.change(change, touched),
            Update::Service(change) => self.change(change, touched),
            Update::Slice(change) => self.change(change, touched),
            Update::Written(change) => self.change(change, touched),
        }
    }

    fn change<O: Object>(&mut self, change: Change<O::Key, O>, touched: &mut Touched) {
        match change {
            Change::Set(object) => object.set(self, touched),
            Change::Remove(key) => O::remove(self, &key, touched),
            Change::Replace(objects) => {
                let listed: BTreeSet<&O::Key> = objects.iter().map(O::key).collect();
                let held = O::all(self).keys();
                let gone: Vec<O::Key> = held.filter(|key| !listed.contains(key)).cloned().collect();
                for key in gone {
                    O::remove(self, &key, touched);
                }
                for object in objects {
                    object.set(self, touched);
                }
            }
        }
    }

    fn unindex_pod(&mut self, pod: &Pod, touched: &mut Touched) {
        let uid = &pod.uid;
        self.pods.remove(uid);
        self.touch_pod(pod, touched);
        self.pod_uids.remove(&pod.key);
        if let Some(node) = &pod.node {
            self.pods_by_node.remove(node, uid);
        }
        if let Some(key) = mode_of(pod) {
            self.pods_by_mode.remove(&key, uid);
        }
        for address in claimed(pod) {
            self.pods_by_address.remove(address, uid);
        }
    }

    fn unindex_slice(&mut self, slice: &EndpointSlice) {
        self.slices_by_service.remove(&slice.service, &slice.key);
        for endpoint in &slice.endpoints {
            match &endpoint.pod {
                Some(pod) => self.slices_by_pod.remove(&pod.key, &slice.key),
                None => endpoint.addresses.iter().for_each(|address| {
                    self.slices_by_address.remove(address, &slice.key);
                }),
            }
        }
    }
}

impl Object for Node {
    type Key = NodeName;

    fn key(&self) -> &NodeName {
        &self.name
    }

    fn all(snapshot: &ClusterSnapshot) -> &OrdMap<NodeName, Arc<Self>> {
        &snapshot.nodes
    }

    fn set(self, snapshot: &mut ClusterSnapshot, touched: &mut Touched) {
        let old = snapshot.nodes.get(&self.name);
        if old.is_some_and(|old| **old == self) {
            return;
        }
        let moved = old.map(|old| &old.locality) != Some(&self.locality);
        touched.nodes.insert(self.name.clone());
        if moved {
            snapshot.touch_pods_on(&self.name, touched);
        }
        snapshot.nodes.insert(self.name.clone(), Arc::new(self));
    }

    fn remove(snapshot: &mut ClusterSnapshot, name: &NodeName, touched: &mut Touched) {
        if snapshot.nodes.remove(name).is_some() {
            touched.nodes.insert(name.clone());
            snapshot.touch_pods_on(name, touched);
        }
    }
}

impl Object for Namespace {
    type Key = NamespaceName;

    fn key(&self) -> &NamespaceName {
        &self.name
    }

    fn all(snapshot: &ClusterSnapshot) -> &OrdMap<NamespaceName, Arc<Self>> {
        &snapshot.namespaces
    }

    fn set(self, snapshot: &mut ClusterSnapshot, touched: &mut Touched) {
        let old = snapshot.namespaces.get(&self.name);
        if old.is_some_and(|old| **old == self) {
            return;
        }
        snapshot.touch_pods_in(&self.name, touched);
        if old.and_then(|old| old.mode.as_ref()) != self.mode.as_ref() {
            snapshot.touch_nodes(touched);
        }
        snapshot
            .namespaces
            .insert(self.name.clone(), Arc::new(self));
    }

    fn remove(snapshot: &mut ClusterSnapshot, name: &NamespaceName, touched: &mut Touched) {
        if let Some(old) = snapshot.namespaces.remove(name) {
            snapshot.touch_pods_in(name, touched);
            if old.mode.is_some() {
                snapshot.touch_nodes(touched);
            }
        }
    }
}

impl Object for Pod {
    type Key = PodUid;

    fn key(&self) -> &PodUid {
        &self.uid
    }

    fn all(snapshot: &ClusterSnapshot) -> &OrdMap<PodUid, Arc<Self>> {
        &snapshot.pods
    }

    fn set(self, snapshot: &mut ClusterSnapshot, touched: &mut Touched) {
        let old = snapshot.pods.get(&self.uid);
        if old.is_some_and(|old| **old == self) {
            return;
        }
        // A pod of the same name that came before is gone, whether its end was seen or not.
        let namesake = snapshot.pod_uids.get(&self.key).cloned();
        let before = [namesake.as_ref(), Some(&self.uid)].into_iter().flatten();
        let before: Vec<Arc<Self>> = before
            .filter_map(|uid| snapshot.pod(uid).cloned())
            .collect();
        let was_like_it = snapshot.has_pods_like(&self);
        for pod in &before {
            snapshot.unindex_pod(pod, touched);
        }
        snapshot.pod_uids.insert(self.key.clone(), self.uid.clone());
        if let Some(node) = &self.node {
            snapshot.pods_by_node.insert(node.clone(), self.uid.clone());
        }
        if let Some(key) = mode_of(&self) {
            snapshot.pods_by_mode.insert(key, self.uid.clone());
        }
        let no_more = |pod: &Arc<Self>| pod.mode.is_some() && !snapshot.has_pods_like(pod);
        if was_like_it != snapshot.has_pods_like(&self) || before.iter().any(no_more) {
            snapshot.touch_nodes(touched);
        }
        for address in claimed(&self) {
            snapshot.pods_by_address.insert(*address, self.uid.clone());
        }
        snapshot.touch_pod(&self, touched);
        snapshot.pods.insert(self.uid.clone(), Arc::new(self));
    }

    fn remove(snapshot: &mut ClusterSnapshot, uid: &PodUid, touched: &mut Touched) {
        let Some(pod) = snapshot.pods.get(uid).cloned() else {
            return;
        };
        snapshot.unindex_pod(&pod, touched);
        if pod.mode.is_some() && !snapshot.has_pods_like(&pod) {
            snapshot.touch_nodes(touched);
        }
    }
}

impl Object for Service {
    type Key = ServiceKey;

    fn key(&self) -> &ServiceKey {
        &self.key
    }

    fn all(snapshot: &ClusterSnapshot) -> &OrdMap<ServiceKey, Arc<Self>> {
        &snapshot.services
    }

    fn set(self, snapshot: &mut ClusterSnapshot, touched: &mut Touched) {
        let old = snapshot.services.get(&self.key);
        if old.is_some_and(|old| **old == self) {
            return;
        }
        snapshot.touch_service(&self.key, touched);
        snapshot.services.insert(self.key.clone(), Arc::new(self));
    }

    fn remove(snapshot: &mut ClusterSnapshot, key: &ServiceKey, touched: &mut Touched) {
        if snapshot.services.remove(key).is_some() {
            snapshot.touch_service(key, touched);
        }
    }
}

impl Object for EndpointSlice {
    type Key = SliceKey;

    fn key(&self) -> &SliceKey {
        &self.key
    }

    fn all(snapshot: &ClusterSnapshot) -> &OrdMap<SliceKey, Arc<Self>> {
        &snapshot.slices
    }

    fn set(self, snapshot: &mut ClusterSnapshot, touched: &mut Touched) {
        let old = snapshot.slices.get(&self.key).cloned();
        if old.as_deref() == Some(&self) {
            return;
        }
        for endpoint in changed_endpoints(old.as_deref(), &self) {
            snapshot.touch_endpoint(&self.key, endpoint, touched);
        }
        if let Some(old) = &old {
            snapshot.unindex_slice(old);
        }
        let key = &self.key;
        snapshot
            .slices_by_service
            .insert(self.service.clone(), key.clone());
        for endpoint in &self.endpoints {
            match &endpoint.pod {
                Some(pod) => snapshot.slices_by_pod.insert(pod.key.clone(), key.clone()),
                None => endpoint.addresses.iter().for_each(|address| {
                    snapshot.slices_by_address.insert(*address, key.clone());
                }),
            }
        }
        snapshot.slices.insert(self.key.clone(), Arc::new(self));
    }

    fn remove(snapshot: &mut ClusterSnapshot, key: &SliceKey, touched: &mut Touched) {
        let Some(slice) = snapshot.slices.remove(key) else {
            return;
        };
        for endpoint in &slice.endpoints {
            snapshot.touch_endpoint(key, endpoint, touched);
        }
        snapshot.unindex_slice(&slice);
    }
}

impl Object for WrittenNode {
    type Key = NodeName;

    fn key(&self) -> &NodeName {
        &self.name
    }

    fn all(snapshot: &ClusterSnapshot) -> &OrdMap<NodeName, Arc<Self>> {
        &snapshot.written
    }

    fn set(self, snapshot: &mut ClusterSnapshot, touched: &mut Touched) {
        let old = snapshot.written.get(&self.name);
        if old.is_some_and(|old| **old == self) {
            return;
        }
        touched.nodes.insert(self.name.clone());
        snapshot.written.insert(self.name.clone(), Arc::new(self));
    }

    fn remove(snapshot: &mut ClusterSnapshot, name: &NodeName, touched: &mut Touched) {
        if snapshot.written.remove(name).is_some() {
            touched.nodes.insert(name.clone());
        }
    }
}

/// Endpoints that are in one of the two and not, or not alike, in the other.
fn changed_endpoints<'a>(
    old: Option<&'a EndpointSlice>,
    new: &'a EndpointSlice,
) -> Vec<&'a Endpoint> {
    let Some(old) = old else {
        return new.endpoints.iter().collect();
    };
    if old.service != new.service || old.ports != new.ports {
        return old.endpoints.iter().chain(&new.endpoints).collect();
    }
    let mut balance: BTreeMap<&Endpoint, i32> = BTreeMap::new();
    for endpoint in &old.endpoints {
        *balance.entry(endpoint).or_default() -= 1;
    }
    for endpoint in &new.endpoints {
        *balance.entry(endpoint).or_default() += 1;
    }
    balance.retain(|_, count| *count != 0);
    balance.into_keys().collect()
}
