//! The pods of this node that are in the mesh, as the node's agent told, and those that have just left it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::identity::SpiffeId;

/// How long a pod that has left the mesh is still served: connections were on their way to us when the kernel let it go,
/// and proxies of other nodes hear of it later.
const SERVED_AFTER_LEAVING: Duration = Duration::from_secs(10);

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
    /// By UID, with the time until which it is served.
    left: BTreeMap<Arc<str>, (Arc<LocalWorkload>, Instant)>,
}

impl LocalWorkloads {
    /// These, come at this time after others: who was there before and is not here has left.
    #[must_use]
    pub fn after(mut self, before: &Self, now: Instant) -> Self {
        let until = now + SERVED_AFTER_LEAVING;
        let gone = before
            .by_uid
            .iter()
            .map(|(uid, pod)| (uid, (pod.clone(), until)));
        let earlier = before.left.iter().map(|(uid, left)| (uid, left.clone()));
        self.left = gone
            .chain(earlier)
            .filter(|(uid, (_, until))| !self.by_uid.contains_key(*uid) && *until > now)
            .map(|(uid, left)| (uid.clone(), left))
            .collect();
        self
    }

    /// These without those that have left too long ago, if there are such.
    #[must_use]
    pub fn without_expired(&self, now: Instant) -> Option<Self> {
        let expired = self.left.values().any(|(_, until)| *until <= now);
        expired.then(|| {
            let mut rest = self.clone();
            rest.left.retain(|_, (_, until)| *until > now);
            rest
        })
    }

    /// The pod that had this address and has just left the mesh.
    pub(crate) fn left_at(&self, address: IpAddr, now: Instant) -> Option<&Arc<LocalWorkload>> {
        let mut served = self.left.values().filter(|(_, until)| *until > now);
        served
            .find(|(pod, _)| pod.addresses.contains(&address))
            .map(|(pod, _)| pod)
    }

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
        let left = self.left.values().map(|(pod, _)| pod);
        self.iter()
            .chain(left)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::TrustDomain;

    fn pods(uids: &[&str]) -> LocalWorkloads {
        let pod = |uid: &&str| LocalWorkload {
            uid: Arc::from(*uid),
            namespace: "shop".into(),
            name: Arc::from(*uid),
            identity: SpiffeId::new(&TrustDomain::new("td").unwrap(), "shop", uid).unwrap(),
            addresses: vec![address()],
        };
        uids.iter().map(pod).collect()
    }

    fn address() -> IpAddr {
        "10.0.0.1".parse().unwrap()
    }

    fn left(all: &LocalWorkloads, now: Instant) -> Option<&str> {
        all.left_at(address(), now).map(|pod| &*pod.uid)
    }

    #[test]
    fn who_leaves_is_served_for_some_time() {
        let now = Instant::now();
        let later = now + SERVED_AFTER_LEAVING;
        let all = pods(&[]).after(&pods(&["a"]), now);
        assert!(all.at(address()).is_none());
        assert_eq!(left(&all, now), Some("a"));
        assert_eq!(all.identities().len(), 1);
        // What comes meanwhile does not make it longer.
        let all = pods(&["b"]).after(&all, later - Duration::from_secs(1));
        assert_eq!(left(&all, now), Some("a"));
        assert!(all.without_expired(now).is_none());
        assert_eq!(left(&all, later), None);
        let rest = all.without_expired(later).unwrap();
        assert_eq!(rest.identities().len(), 1);
        assert_eq!(rest.iter().count(), 1);
    }

    #[test]
    fn who_comes_back_has_not_left() {
        let now = Instant::now();
        let gone = pods(&[]).after(&pods(&["a"]), now);
        let back = pods(&["a"]).after(&gone, now);
        assert_eq!(left(&back, now), None);
    }
}
