//! The pods of this node that are in the mesh, as the node's agent told.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use crate::identity::SpiffeId;

/// A pod of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalWorkload {
    /// UID of the pod.
    pub uid: Arc<str>,
    /// Namespace of the pod.
    pub namespace: Arc<str>,
    /// Name of the pod.
    pub name: Arc<str>,
    /// Who it is.
    pub identity: SpiffeId,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
}

/// All of them.
#[derive(Clone, Debug, Default)]
pub struct LocalWorkloads {
    by_address: BTreeMap<IpAddr, Arc<LocalWorkload>>,
    by_uid: BTreeMap<Arc<str>, Arc<LocalWorkload>>,
}

impl LocalWorkloads {
    /// The pod that has this address.
    #[must_use]
    pub fn at(&self, address: IpAddr) -> Option<&Arc<LocalWorkload>> {
        self.by_address.get(&address)
    }

    /// The pod of this UID.
    #[must_use]
    pub fn get(&self, uid: &str) -> Option<&Arc<LocalWorkload>> {
        self.by_uid.get(uid)
    }

    /// Every pod.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<LocalWorkload>> {
        self.by_uid.values()
    }

    /// The identities that this node needs certificates for.
    #[must_use]
    pub fn identities(&self) -> BTreeSet<SpiffeId> {
        self.iter()
            .map(|workload| workload.identity.clone())
            .collect()
    }
}

impl FromIterator<LocalWorkload> for LocalWorkloads {
    fn from_iter<I: IntoIterator<Item = LocalWorkload>>(workloads: I) -> Self {
        let mut all = Self::default();
        for workload in workloads {
            let workload = Arc::new(workload);
            for address in &workload.addresses {
                all.by_address.insert(*address, workload.clone());
            }
            all.by_uid.insert(workload.uid.clone(), workload);
        }
        all
    }
}
