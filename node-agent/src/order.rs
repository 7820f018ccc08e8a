//! Whose turn it is: who may enter the kernel's set, who is told to the proxy, and when the first
//! change may be made. Pure.
//!
//! ```text
//!  enrol:     spec ─▶ told to the proxy ─▶ proxy is ready ─▶ route and set member ─▶ enrolled
//!  withdraw:  gone from the spec ─▶ set member and route go ─▶ no longer told to the proxy
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use datapath::datapath::{Member, Target};
use datapath::names::Names;
use datapath::{Datapath, Item, Slot};

use crate::desired::Pod;

/// How long an agent that finds a data path of ours waits for its proxy before it changes anything.
const PROXY_GRACE: Duration = Duration::from_secs(10);

/// Who is in the mesh as far as the kernel is concerned.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Enrolment {
    enrolled: BTreeMap<String, Pod>,
    leaving: BTreeMap<String, Pod>,
}

impl Enrolment {
    /// What an earlier agent left: workloads whose every address is a member of the set.
    pub(crate) fn adopt(wanted: &[Pod], observed: &Datapath) -> Self {
        let members = members(observed);
        let enrolled = wanted
            .iter()
            .filter(|pod| pod.ips.iter().all(|ip| members.contains(ip)))
            .map(|pod| (pod.workload.uid.clone(), pod.clone()));
        Self {
            enrolled: enrolled.collect(),
            leaving: BTreeMap::new(),
        }
    }

    /// Pods that the kernel should hold: those the proxy is ready for, and those it holds already. A
    /// pod that is in stays in whatever the proxy says: its traffic must not fall back to plaintext.
    pub(crate) fn select(&self, wanted: &[Pod], is_ready: impl Fn(&str) -> bool) -> Vec<Pod> {
        wanted
            .iter()
            .filter(|pod| {
                is_ready(&pod.workload.uid)
                    || [&self.enrolled, &self.leaving]
                        .iter()
                        .filter_map(|held| held.get(&pod.workload.uid))
                        .any(|held| held.ips == pod.ips)
            })
            .cloned()
            .collect()
    }

    /// Pods that the proxy should serve: those of the spec, and those on their way out.
    pub(crate) fn for_proxy<'a>(&'a self, wanted: &'a [Pod]) -> Vec<&'a Pod> {
        let uids: BTreeSet<&str> = wanted.iter().map(|pod| pod.workload.uid.as_str()).collect();
        let gone = self.enrolled.values().chain(self.leaving.values());
        let mut pods: BTreeMap<&str, &Pod> = gone
            .filter(|pod| !uids.contains(pod.workload.uid.as_str()))
            .map(|pod| (pod.workload.uid.as_str(), pod))
            .collect();
        pods.extend(wanted.iter().map(|pod| (pod.workload.uid.as_str(), pod)));
        pods.into_values().collect()
    }

    /// Takes note of what the kernel holds after the pods of `selected` were asked of it.
    pub(crate) fn settle(&mut self, selected: &[Pod], observed: &Datapath) {
        let members = members(observed);
        let uids: BTreeSet<&str> = selected
            .iter()
            .map(|pod| pod.workload.uid.as_str())
            .collect();
        let kept: BTreeSet<IpAddr> = selected.iter().flat_map(|pod| pod.ips.clone()).collect();
        let before = std::mem::take(&mut self.enrolled);
        self.leaving.extend(before);
        // An address that a selected pod has is that pod's, whoever had it before.
        let held = held(observed);
        self.leaving.retain(|uid, pod| {
            !uids.contains(uid.as_str())
                && pod
                    .ips
                    .iter()
                    .any(|ip| held.contains(ip) && !kept.contains(ip))
        });
        self.enrolled = selected
            .iter()
            .filter(|pod| pod.ips.iter().all(|ip| members.contains(ip)))
            .map(|pod| (pod.workload.uid.clone(), pod.clone()))
            .collect();
    }

    /// The pods that the kernel holds.
    pub(crate) fn pods(&self) -> impl Iterator<Item = &Pod> {
        self.enrolled.values()
    }

    /// UIDs of the workloads that the kernel holds.
    pub(crate) fn uids(&self) -> BTreeSet<String> {
        self.enrolled.keys().cloned().collect()
    }
}

/// Whether the first change may be made. Nothing of a data path that an earlier agent left is touched
/// before its proxy has answered, or has had the time to.
pub(crate) fn may_begin(observed: &Datapath, proxy_has_answered: bool, waited: Duration) -> bool {
    proxy_has_answered || waited >= PROXY_GRACE || !leads_to_proxy(observed)
}

/// The slot of the proxy that new connections are handed to.
pub(crate) fn leads_to(observed: &Datapath, names: &Names) -> Option<Slot> {
    observed.host.iter().find_map(|item| match item {
        Item::Route(route)
            if route.table == names.table_outbound() && route.leads_into_a_tunnel() =>
        {
            names.slot_of(item.device()?)
        }
        _ => None,
    })
}

/// How long to wait at most until [`may_begin`].
pub(crate) fn grace_left(waited: Duration) -> Duration {
    PROXY_GRACE.saturating_sub(waited)
}

fn leads_to_proxy(observed: &Datapath) -> bool {
    observed.host.iter().any(|item| {
        matches!(item, Item::Link(_))
            || matches!(item, Item::Route(route) if matches!(route.target, Target::Via { .. }))
    })
}

fn members(observed: &Datapath) -> BTreeSet<IpAddr> {
    observed
        .host
        .iter()
        .filter_map(|item| match item {
            Item::Member(Member { ip, .. }) => Some(*ip),
            _ => None,
        })
        .collect()
}

/// Addresses whose traffic goes to the proxy in one direction at least.
fn held(observed: &Datapath) -> BTreeSet<IpAddr> {
    let routed = observed.host.iter().filter_map(|item| match item {
        Item::Route(route) => route.pod(),
        _ => None,
    });
    members(observed).into_iter().chain(routed).collect()
}

#[cfg(test)]
mod tests {
    use datapath::Family;
    use datapath::set::Role;
    use proptest::prelude::*;

    use super::*;
    use crate::desired::parse;
    use crate::desired::tests::{spec, workload};

    fn pods(named: &[(&str, &str)]) -> Vec<Pod> {
        let workloads = named.iter().map(|(uid, ip)| workload(uid, ip)).collect();
        parse(&spec(workloads)).unwrap().pods
    }

    fn member(ip: IpAddr) -> Item {
        Item::Member(Member {
            set: Names::default().set(Role::Redirect, Family::of(ip)),
            ip,
        })
    }

    fn holding(ips: &[&str]) -> Datapath {
        let mut datapath = Datapath::default();
        datapath
            .host
            .extend(ips.iter().map(|ip| member(ip.parse().unwrap())));
        datapath
    }

    fn uids(pods: &[Pod]) -> Vec<&str> {
        pods.iter().map(|pod| pod.workload.uid.as_str()).collect()
    }

    fn told(enrolment: &Enrolment, wanted: &[Pod]) -> Vec<String> {
        enrolment
            .for_proxy(wanted)
            .iter()
            .map(|pod| pod.workload.uid.clone())
            .collect()
    }

    #[test]
    fn a_pod_enters_only_when_the_proxy_is_ready_for_it() {
        let wanted = pods(&[("a", "10.0.0.4"), ("b", "10.0.0.5")]);
        let enrolment = Enrolment::default();
        assert_eq!(
            uids(&enrolment.select(&wanted, |_| false)),
            Vec::<&str>::new()
        );
        assert_eq!(uids(&enrolment.select(&wanted, |uid| uid == "b")), ["b"]);
        assert_eq!(told(&enrolment, &wanted), ["a", "b"]);
    }

    #[test]
    fn a_pod_that_is_in_stays_in_when_the_proxy_is_gone() {
        let wanted = pods(&[("a", "10.0.0.4")]);
        let mut enrolment = Enrolment::default();
        enrolment.settle(&wanted, &holding(&["10.0.0.4"]));
        assert_eq!(uids(&enrolment.select(&wanted, |_| false)), ["a"]);
    }

    #[test]
    fn a_pod_that_leaves_is_told_to_the_proxy_until_the_kernel_has_let_it_go() {
        let mut enrolment = Enrolment::default();
        enrolment.settle(&pods(&[("a", "10.0.0.4")]), &holding(&["10.0.0.4"]));
        assert!(enrolment.select(&[], |_| true).is_empty());
        assert_eq!(told(&enrolment, &[]), ["a"]);
        // The kernel refused to remove it: it stays with the proxy.
        enrolment.settle(&[], &holding(&["10.0.0.4"]));
        assert_eq!(told(&enrolment, &[]), ["a"]);
        enrolment.settle(&[], &holding(&[]));
        assert_eq!(told(&enrolment, &[]), Vec::<String>::new());
    }

    #[test]
    fn an_address_that_another_pod_takes_over_waits_for_the_proxy_again() {
        let mut enrolment = Enrolment::default();
        enrolment.settle(&pods(&[("a", "10.0.0.4")]), &holding(&["10.0.0.4"]));
        let successor = pods(&[("b", "10.0.0.4")]);
        assert!(enrolment.select(&successor, |_| false).is_empty());
        enrolment.settle(&[], &holding(&[]));
        let selected = enrolment.select(&successor, |uid| uid == "b");
        enrolment.settle(&selected, &holding(&["10.0.0.4"]));
        assert_eq!(told(&enrolment, &successor), ["b"]);
    }

    #[test]
    fn an_agent_that_starts_again_finds_who_is_in() {
        let wanted = pods(&[("a", "10.0.0.4"), ("b", "10.0.0.5")]);
        let enrolment = Enrolment::adopt(&wanted, &holding(&["10.0.0.4", "10.0.0.9"]));
        assert_eq!(uids(&enrolment.select(&wanted, |_| false)), ["a"]);
    }

    #[test]
    fn nothing_is_changed_before_the_proxy_of_a_standing_data_path_has_answered() {
        let mut standing = Datapath::default();
        standing
            .host
            .insert(Item::Link(datapath::datapath::Link::Veth {
                name: "istioin".to_owned(),
                peer: None,
                mtu: 1500,
            }));
        let short = Duration::from_secs(1);
        assert!(!may_begin(&standing, false, short));
        assert!(may_begin(&standing, true, short));
        assert!(may_begin(&standing, false, PROXY_GRACE));
        assert!(may_begin(&Datapath::default(), false, Duration::ZERO));
    }

    proptest! {
        /// Whatever happens in whatever order: nobody is in before the proxy was ready for them, and
        /// whom the kernel holds the proxy serves.
        #[test]
        fn who_is_in_was_ready_and_is_served(
            steps in prop::collection::vec((prop::collection::vec(0usize..4, 0..4), 0usize..16, any::<bool>()), 1..12)
        ) {
            let all = pods(&[("a", "10.0.0.4"), ("b", "10.0.0.5"), ("c", "10.0.0.6"), ("d", "10.0.0.7")]);
            let mut enrolment = Enrolment::default();
            let mut ever_ready = BTreeSet::new();
            let mut kernel = Datapath::default();
            for (present, ready, applies) in steps {
                let present: BTreeSet<usize> = present.into_iter().collect();
                let wanted: Vec<Pod> = present.iter().map(|index| all[*index].clone()).collect();
                let is_ready = |uid: &str| {
                    all.iter().position(|pod| pod.workload.uid == uid).is_some_and(|index| ready & (1 << index) != 0)
                };
                ever_ready.extend(wanted.iter().map(|pod| pod.workload.uid.clone()).filter(|uid| is_ready(uid)));
                let selected = enrolment.select(&wanted, is_ready);
                if applies {
                    kernel.host = selected.iter().flat_map(|pod| pod.ips.iter().map(|ip| member(*ip))).collect();
                }
                enrolment.settle(&selected, &kernel);
                let served = told(&enrolment, &wanted);
                for pod in &all {
                    if kernel.host.contains(&member(pod.ips[0])) {
                        prop_assert!(ever_ready.contains(&pod.workload.uid));
                        prop_assert!(served.contains(&pod.workload.uid), "{} is not served", pod.workload.uid);
                    }
                }
            }
        }
    }
}
