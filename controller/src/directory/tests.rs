//! The directory of small clusters, and that keeping it up equals making it anew.

use proptest::prelude::*;
use protocol::workload::{TunnelProtocol, WorkloadStatus};

use super::*;
use crate::desired::node_state;
use crate::names::{PodKey, SliceKey};
use crate::snapshot::objects::Pod;
use crate::snapshot::services::{Endpoint, EndpointSlice, Preference};
use crate::snapshot::{Change, Update};
use crate::testing::{
    Cluster, endpoint, facts, ip, n, namespace, node, pod, pod_endpoint, rules, service, set_pod,
    set_service, set_slice, slice,
};

const WEB: &str = "shop/web.shop.svc.cluster.local";

fn workload(cluster: &Cluster, name: &str) -> proto::Workload {
    match content(cluster, name) {
        Some(Type::Workload(workload)) => workload,
        other => panic!("{name}: {other:?}"),
    }
}

fn content(cluster: &Cluster, name: &str) -> Option<Type> {
    let resource = cluster.directory.get(&name.into())?;
    Address::decode(resource.body.as_slice()).unwrap().r#type
}

#[test]
fn an_enrolled_pod_is_a_workload_with_its_services_and_place() {
    let cluster = Cluster::with([
        set_pod(pod("a", "10.0.0.1")),
        set_service(service("web", "10.96.0.1")),
        set_slice(slice("web", vec![pod_endpoint("a", "10.0.0.1")])),
    ]);
    let workload = workload(&cluster, "uid-a");
    assert_eq!(workload.tunnel_protocol(), TunnelProtocol::Hbone);
    assert_eq!(workload.addresses, [[10, 0, 0, 1].as_slice()]);
    assert_eq!(workload.node, "n1");
    assert_eq!(workload.locality.unwrap().zone, "zone-of-n1");
    assert_eq!(workload.trust_domain, "example.org");
    let port = &workload.services[WEB].ports[0];
    assert_eq!((port.service_port, port.target_port), (80, 8080));
    assert_eq!(cluster.directory.find("/10.0.0.1")[0].name, "uid-a".into());
    assert_eq!(cluster.directory.find("/10.96.0.1")[0].name, WEB.into());
    let members: Vec<_> = cluster.directory.members(&WEB.into()).collect();
    assert_eq!(members[0].name, "uid-a".into());
}

#[test]
fn a_pod_that_is_not_ready_or_leaves_is_unhealthy_but_there() {
    let (mut unready, mut leaving) = (pod("a", "10.0.0.1"), pod("b", "10.0.0.2"));
    unready.ready = false;
    leaving.terminating = true;
    let mut not_ready = pod_endpoint("a", "10.0.0.1");
    not_ready.ready = false;
    let cluster = Cluster::with([
        set_pod(unready),
        set_pod(leaving),
        set_service(service("web", "")),
        set_slice(slice("web", vec![not_ready])),
    ]);
    for name in ["uid-a", "uid-b"] {
        assert_eq!(workload(&cluster, name).status(), WorkloadStatus::Unhealthy);
    }
    assert!(workload(&cluster, "uid-a").services.contains_key(WEB));
}

#[test]
fn an_endpoint_that_is_not_ready_though_its_pod_is_does_not_count() {
    let mut not_ready = pod_endpoint("a", "10.0.0.1");
    not_ready.ready = false;
    let cluster = Cluster::with([
        set_pod(pod("a", "10.0.0.1")),
        set_service(service("web", "10.96.0.1")),
        set_slice(slice("web", vec![not_ready])),
    ]);
    assert!(workload(&cluster, "uid-a").services.is_empty());
}

#[test]
fn an_endpoint_of_an_older_pod_of_the_same_name_does_not_count() {
    let mut stale = pod_endpoint("a", "10.0.0.1");
    stale.pod.as_mut().unwrap().uid = Some("uid-of-an-older-a".into());
    let cluster = Cluster::with([
        set_pod(pod("a", "10.0.0.1")),
        set_service(service("web", "10.96.0.1")),
        set_slice(slice("web", vec![stale])),
    ]);
    assert!(workload(&cluster, "uid-a").services.is_empty());
}

#[test]
fn a_pod_that_has_ended_is_no_workload() {
    let mut ended = pod("a", "10.0.0.1");
    ended.terminal = true;
    let cluster = Cluster::with([set_pod(ended)]);
    assert!(content(&cluster, "uid-a").is_none());
}

#[test]
fn a_pod_on_the_hosts_network_has_its_address_but_no_alias() {
    let mut host = pod("a", "192.168.0.1");
    host.host_network = true;
    let cluster = Cluster::with([set_pod(host)]);
    let workload = workload(&cluster, "uid-a");
    assert_eq!(workload.network_mode(), NetworkMode::HostNetwork);
    assert_eq!(workload.tunnel_protocol(), TunnelProtocol::None);
    assert_eq!(workload.addresses.len(), 1);
    assert!(cluster.directory.find("/192.168.0.1").is_empty());
}

#[test]
fn an_endpoint_without_a_pod_is_a_workload_until_a_pod_has_its_address() {
    let mut cluster = Cluster::with([
        set_service(service("web", "10.96.0.1")),
        set_slice(slice("web", vec![endpoint("10.0.0.7")])),
    ]);
    let name = "c1/EndpointSlice/shop/web-1/10.0.0.7";
    let external = workload(&cluster, name);
    assert_eq!(external.tunnel_protocol(), TunnelProtocol::None);
    assert!(external.services.contains_key(WEB));
    cluster.apply(set_pod(pod("a", "10.0.0.7")));
    assert!(content(&cluster, name).is_none());
    assert!(workload(&cluster, "uid-a").services.contains_key(WEB));
    cluster.apply(Update::Pod(Change::Remove("uid-a".into())));
    assert!(content(&cluster, name).is_some());
}

/// The same endpoints by their addresses of IPv6, as the second slice of a service of both families.
fn second_slice(service: &str, endpoints: Vec<Endpoint>) -> EndpointSlice {
    EndpointSlice {
        key: SliceKey::new("shop", &format!("{service}-2")),
        ..slice(service, endpoints)
    }
}

#[test]
fn a_pod_in_slices_of_both_families_is_one_workload_that_serves_once() {
    let mut both = pod("a", "10.0.0.1");
    both.ips.push(ip("fd00::1"));
    let mut web = service("web", "10.96.0.1");
    web.addresses.push(ip("fd00:96::1"));
    let mut cluster = Cluster::with([
        set_pod(both),
        set_service(web),
        set_slice(slice("web", vec![pod_endpoint("a", "10.0.0.1")])),
        set_slice(second_slice("web", vec![pod_endpoint("a", "fd00::1")])),
    ]);
    let expected = [vec![10, 0, 0, 1], ip_octets("fd00::1")];
    assert_eq!(workload(&cluster, "uid-a").addresses, expected);
    for (alias, name) in [
        ("/10.0.0.1", "uid-a"),
        ("/fd00::1", "uid-a"),
        ("/10.96.0.1", WEB),
        ("/fd00:96::1", WEB),
    ] {
        let found = cluster.directory.find(alias);
        assert_eq!(found.len(), 1, "{alias}");
        assert_eq!(found[0].name, name.into(), "{alias}");
    }
    assert_eq!(cluster.directory.members(&WEB.into()).count(), 1);
    assert_eq!(workload(&cluster, "uid-a").services[WEB].ports.len(), 1);
    cluster.apply(Update::Slice(Change::Remove(SliceKey::new(
        "shop", "web-1",
    ))));
    assert!(workload(&cluster, "uid-a").services.contains_key(WEB));
    cluster.apply(Update::Slice(Change::Remove(SliceKey::new(
        "shop", "web-2",
    ))));
    assert!(workload(&cluster, "uid-a").services.is_empty());
}

#[test]
fn endpoints_without_a_pod_are_workloads_in_each_family() {
    let cluster = Cluster::with([
        set_service(service("web", "10.96.0.1")),
        set_slice(slice("web", vec![endpoint("10.0.0.7")])),
        set_slice(second_slice("web", vec![endpoint("fd00::7")])),
    ]);
    let v6 = workload(&cluster, "c1/EndpointSlice/shop/web-2/fd00::7");
    assert_eq!(v6.addresses, [ip_octets("fd00::7")]);
    assert_eq!(cluster.directory.find("/fd00::7").len(), 1);
    assert_eq!(cluster.directory.members(&WEB.into()).count(), 2);
}

#[test]
fn of_endpoints_without_a_pod_that_share_an_address_a_ready_one_counts_in_any_order() {
    let mut not_ready = endpoint("10.0.0.7");
    not_ready.ready = false;
    for endpoints in [
        [not_ready.clone(), endpoint("10.0.0.7")],
        [endpoint("10.0.0.7"), not_ready],
    ] {
        let cluster = Cluster::with([
            set_service(service("web", "10.96.0.1")),
            set_slice(slice("web", endpoints.to_vec())),
        ]);
        let shared = workload(&cluster, "c1/EndpointSlice/shop/web-1/10.0.0.7");
        assert_eq!(shared.status(), WorkloadStatus::Healthy);
    }
}

fn ip_octets(text: &str) -> Vec<u8> {
    super::workload::octets(&ip(text)).to_vec()
}

#[test]
fn a_service_says_whom_its_clients_prefer() {
    use protocol::workload::load_balancing::{HealthPolicy, Mode, Scope};
    let balancing = |preference, publish_not_ready| {
        let mut web = service("web", "10.96.0.1");
        web.preference = preference;
        web.publish_not_ready = publish_not_ready;
        match content(&Cluster::with([set_service(web)]), WEB) {
            Some(Type::Service(service)) => service.load_balancing,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(balancing(Preference::None, false), None);
    let local = balancing(Preference::OnlySameNode, false).unwrap();
    assert_eq!(local.mode(), Mode::Strict);
    assert_eq!(local.routing_preference, [i32::from(Scope::Node)]);
    let zone = balancing(Preference::SameZone, false).unwrap();
    assert_eq!(zone.mode(), Mode::Failover);
    let all = balancing(Preference::None, true).unwrap();
    assert_eq!(all.health_policy(), HealthPolicy::AllowAll);
}

#[test]
fn versions_follow_the_content_and_nothing_else() {
    let version = |pod: Pod| {
        let cluster = Cluster::with([set_pod(pod)]);
        cluster.directory.get(&"uid-a".into()).unwrap().version
    };
    let same = pod("a", "10.0.0.1");
    let mut other = same.clone();
    other.ready = false;
    assert_eq!(version(same.clone()), version(same.clone()));
    assert_ne!(version(same), version(other));
}

#[test]
fn one_changed_pod_is_one_changed_resource() {
    let pods = (0..2000).map(|i| pod(&format!("p{i}"), &format!("10.0.{}.{}", i / 250, i % 250)));
    let mut cluster = Cluster::with(pods.map(set_pod));
    let before = cluster.directory.clone();
    let mut changed = pod("p7", "10.0.0.7");
    changed.ready = false;
    let touched = cluster.apply(set_pod(changed));
    assert_eq!(touched.pods.len(), 1);
    let changes: Vec<_> = cluster.directory.changes_since(&before).collect();
    assert_eq!(changes.len(), 1);
    assert_eq!(*changes[0].0, "uid-p7".into());
}

/// Few names and addresses, so that changes meet.
fn any_pod() -> impl Strategy<Value = Pod> {
    let flags = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>());
    (0..4u8, 0..6u8, 0..3u8, 0..2u8, flags).prop_map(
        |(name, generation, address, place, (ready, terminal, host_network, in_shop))| {
            let mut pod = pod(&format!("p{name}"), &format!("10.0.0.{address}"));
            if generation > 3 {
                pod.uid = format!("uid-p{name}-{generation}").into();
            }
            if !in_shop {
                pod.key = PodKey::new("plain", &pod.key.name);
            }
            pod.uid = format!("{}-{in_shop}", pod.uid).into();
            // Of the one family, of both, or of the other.
            match generation % 3 {
                0 => {}
                1 => pod.ips.push(ip(&format!("fd00::{address}"))),
                _ => pod.ips = vec![ip(&format!("fd00::{address}"))],
            }
            pod.node = Some(n(["n1", "n2"][usize::from(place)]));
            (pod.ready, pod.terminal, pod.host_network) = (ready, terminal, host_network);
            pod
        },
    )
}

fn any_endpoint() -> impl Strategy<Value = Endpoint> {
    let flags = (any::<bool>(), any::<bool>(), any::<bool>());
    (0..4u8, 0..3u8, flags).prop_map(|(pod, address, (named, ready, v6))| {
        let address = format!("{}{address}", if v6 { "fd00::" } else { "10.0.0." });
        let mut endpoint = if named {
            pod_endpoint(&format!("p{pod}"), &address)
        } else {
            endpoint(&address)
        };
        if let Some(target) = &mut endpoint.pod {
            target.uid = None;
        }
        endpoint.ready = ready;
        endpoint
    })
}

fn any_update() -> impl Strategy<Value = Update> {
    let name = prop_oneof![Just("web"), Just("db")];
    let mode = prop_oneof![Just(None), Just(Some("in"))];
    prop_oneof![
        4 => any_pod().prop_map(set_pod),
        1 => any_pod().prop_map(|pod| Update::Pod(Change::Remove(pod.uid))),
        1 => prop::collection::vec(any_pod(), 0..3).prop_map(|mut pods| {
            pods.sort_by_key(|pod| pod.key.clone());
            pods.dedup_by_key(|pod| pod.key.clone());
            Update::Pod(Change::Replace(pods))
        }),
        1 => (mode, prop_oneof![Just("shop"), Just("plain")])
            .prop_map(|(mode, name)| Update::Namespace(Change::Set(namespace(name, mode)))),
        1 => Just(Update::Namespace(Change::Remove("shop".into()))),
        1 => any::<bool>().prop_map(|moved| {
            let mut node = node("n1");
            if moved {
                node.locality.zone = "elsewhere".to_owned();
            }
            Update::Node(Change::Set(node))
        }),
        1 => Just(Update::Node(Change::Remove("n1".into()))),
        2 => (name.clone(), any::<bool>()).prop_map(|(name, other)| {
            let mut service = service(name, "10.96.0.1");
            if other {
                service.ports[0].port = 81;
            }
            set_service(service)
        }),
        1 => name.clone().prop_map(|name| Update::Service(Change::Remove(
            crate::names::ServiceKey::new("shop", name)
        ))),
        3 => (name.clone(), prop::collection::vec(any_endpoint(), 0..4), any::<bool>())
            .prop_map(|(name, endpoints, second)| set_slice(if second {
                second_slice(name, endpoints)
            } else {
                slice(name, endpoints)
            })),
        1 => (name, 1..3).prop_map(|(name, number)| Update::Slice(Change::Remove(
            SliceKey::new("shop", &format!("{name}-{number}"))
        ))),
    ]
}

fn dump(directory: &Directory) -> Vec<(String, String)> {
    directory
        .resources()
        .map(|resource| (resource.name.to_string(), resource.version.to_string()))
        .collect()
}

/// The objects of a snapshot, as the first lists of the watches would bring them.
fn anew(snapshot: &ClusterSnapshot) -> Cluster {
    Cluster::new(snapshot.lists())
}

proptest! {
    #[test]
    fn keeping_up_equals_making_anew(
        updates in prop::collection::vec(any_update(), 1..40)
    ) {
        let mut cluster = Cluster::with([]);
        for update in updates {
            let states = |cluster: &Cluster| {
                ["n1", "n2"].map(|name| node_state(&cluster.snapshot, &rules(), &n(name)))
            };
            let before = states(&cluster);
            let touched = cluster.apply(update);
            let fresh = anew(&cluster.snapshot);
            prop_assert_eq!(dump(&cluster.directory), dump(&fresh.directory));
            let after = states(&cluster);
            prop_assert_eq!(&after, &states(&fresh));
            for (i, name) in ["n1", "n2"].into_iter().enumerate() {
                // Without a Node there is nothing to write.
                let exists = cluster.snapshot.node(&n(name)).is_some();
                let changed = exists && before[i] != after[i];
                prop_assert!(!changed || touched.nodes.contains(name), "{} missed", name);
            }
            for resource in cluster.directory.resources() {
                for alias in &resource.aliases {
                    let found = cluster.directory.find(alias.as_str());
                    prop_assert!(found.contains(&resource));
                }
            }
        }
    }

    #[test]
    fn only_one_workload_answers_for_a_pods_address(
        updates in prop::collection::vec(any_update(), 1..40)
    ) {
        let cluster = Cluster::with(updates);
        let addresses = (0..3).flat_map(|last| [format!("10.0.0.{last}"), format!("fd00::{last}")]);
        for address in addresses {
            let found = cluster.directory.find(&format!("/{address}"));
            let pods = found
                .iter()
                .filter(|resource| resource.name.as_str().starts_with("uid-"))
                .count();
            prop_assert!(pods <= 1);
            prop_assert!(pods == 0 || found.len() == 1);
        }
    }
}

#[test]
fn facts_name_resources() {
    let key = EndpointKey {
        slice: SliceKey::new("default", "kubernetes"),
        address: "10.0.0.1".parse().unwrap(),
    };
    assert_eq!(
        endpoint_name(&facts(), &key).as_str(),
        "c1/EndpointSlice/default/kubernetes/10.0.0.1"
    );
}
