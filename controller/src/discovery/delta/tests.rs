//! The protocol against a client that keeps what it is told.

use std::collections::HashMap;

use proptest::prelude::*;
use protocol::discovery::Status;

use super::responses::MAX_RESPONSE_BYTES;
use super::*;
use crate::snapshot::{Change, Update};
use crate::testing::{Cluster, pod, pod_endpoint, service, set_pod, set_service, set_slice, slice};

const WEB: &str = "shop/web.shop.svc.cluster.local";

/// The other end of a stream.
#[derive(Default)]
struct Peer {
    /// Name to version.
    has: BTreeMap<String, String>,
}

impl Peer {
    fn take(&mut self, client: &mut Client, push: Push) {
        for response in client.responses(push) {
            for resource in response.resources {
                self.has.insert(resource.name, resource.version);
            }
            for name in response.removed_resources {
                self.has.remove(&name);
            }
        }
    }

    fn take_reaction(&mut self, client: &mut Client, reaction: Reaction) {
        match reaction {
            Reaction::Push(push) => self.take(client, push),
            other => panic!("{other:?}"),
        }
    }
}

fn request(subscribe: &[&str], unsubscribe: &[&str]) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: ADDRESS_TYPE.to_owned(),
        resource_names_subscribe: subscribe.iter().map(ToString::to_string).collect(),
        resource_names_unsubscribe: unsubscribe.iter().map(ToString::to_string).collect(),
        ..DeltaDiscoveryRequest::default()
    }
}

fn versions(directory: &Directory) -> BTreeMap<String, String> {
    directory
        .resources()
        .map(|resource| (resource.name.to_string(), resource.version.to_string()))
        .collect()
}

/// Two pods behind a service, and one that is not.
fn cluster() -> Cluster {
    let endpoints = vec![pod_endpoint("a", "10.0.0.1"), pod_endpoint("b", "10.0.0.2")];
    Cluster::with([
        set_pod(pod("a", "10.0.0.1")),
        set_pod(pod("b", "10.0.0.2")),
        set_pod(pod("c", "10.0.0.3")),
        set_service(service("web", "10.96.0.1")),
        set_slice(slice("web", endpoints)),
    ])
}

fn names(push: Option<Push>) -> (Vec<String>, Vec<String>) {
    let push = push.unwrap_or(Push {
        resource_type: ResourceType::Address,
        resources: Vec::new(),
        removed: Vec::new(),
    });
    let resources = push.resources.iter().map(|one| one.name.to_string());
    (resources.collect(), push.removed)
}

fn pushed(reaction: Reaction) -> Push {
    match reaction {
        Reaction::Push(push) => push,
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_empty_first_request_asks_for_everything() {
    let cluster = cluster();
    let (mut client, mut peer) = (Client::new(cluster.directory.clone()), Peer::default());
    let reaction = client.on_request(request(&[], &[]));
    peer.take_reaction(&mut client, reaction);
    assert_eq!(peer.has, versions(&cluster.directory));
}

#[test]
fn the_first_answer_comes_even_if_it_is_empty() {
    let mut client = Client::new(Directory::default());
    assert!(matches!(
        client.on_request(request(&[], &[])),
        Reaction::Push(_)
    ));
    let authorization = DeltaDiscoveryRequest {
        type_url: AUTHORIZATION_TYPE.to_owned(),
        ..DeltaDiscoveryRequest::default()
    };
    let push = pushed(client.on_request(authorization));
    let responses: Vec<_> = client.responses(push).collect();
    assert_eq!(responses.len(), 1);
    assert_eq!(responses[0].type_url, AUTHORIZATION_TYPE);
    assert!(!responses[0].nonce.is_empty());
}

#[test]
fn an_acknowledgement_calls_for_nothing_and_a_rejection_is_told() {
    let mut client = Client::new(cluster().directory);
    client.on_request(request(&[], &[]));
    let mut ack = request(&[], &[]);
    ack.response_nonce = "1".to_owned();
    assert_eq!(client.on_request(ack.clone()), Reaction::Nothing);
    ack.error_detail = Some(Status {
        message: "no such field".to_owned(),
        ..Status::default()
    });
    assert_eq!(
        client.on_request(ack),
        Reaction::Rejected {
            resource_type: ResourceType::Address,
            message: "no such field".to_owned()
        }
    );
}

#[test]
fn an_unknown_type_is_named() {
    let mut client = Client::new(Directory::default());
    let request = DeltaDiscoveryRequest {
        type_url: "type.googleapis.com/envoy.Cluster".to_owned(),
        ..DeltaDiscoveryRequest::default()
    };
    assert!(matches!(
        client.on_request(request),
        Reaction::UnknownType(_)
    ));
}

#[test]
fn a_client_that_comes_back_gets_only_the_difference() {
    let cluster = cluster();
    let mut has: HashMap<String, String> = versions(&cluster.directory).into_iter().collect();
    has.insert("uid-a".to_owned(), "0000".to_owned());
    has.insert("uid-gone".to_owned(), "1111".to_owned());
    has.remove("uid-b");
    let mut client = Client::new(cluster.directory);
    let mut first = request(&[], &[]);
    first.initial_resource_versions = has;
    let push = pushed(client.on_request(first));
    let expected = (
        vec!["uid-a".to_owned(), "uid-b".to_owned()],
        vec!["uid-gone".to_owned()],
    );
    assert_eq!(names(Some(push)), expected);
}

#[test]
fn a_client_that_asks_for_everything_follows_changes() {
    let mut cluster = cluster();
    let mut client = Client::new(cluster.directory.clone());
    client.on_request(request(&[], &[]));
    assert_eq!(client.on_directory(cluster.directory.clone()), None);
    cluster.apply(Update::Pod(Change::Remove("uid-c".into())));
    cluster.apply(set_pod(pod("d", "10.0.0.4")));
    let push = client.on_directory(cluster.directory.clone());
    let expected = (vec!["uid-d".to_owned()], vec!["uid-c".to_owned()]);
    assert_eq!(names(push), expected);
}

#[test]
fn before_a_client_asks_it_is_told_nothing() {
    let mut client = Client::new(Directory::default());
    assert_eq!(client.on_directory(cluster().directory), None);
}

#[test]
fn a_client_may_begin_with_nothing_and_ask_by_address() {
    let cluster = cluster();
    let mut client = Client::new(cluster.directory.clone());
    let push = pushed(client.on_request(request(&["*"], &["*"])));
    assert_eq!(names(Some(push)), (vec![], vec![]));
    let push = pushed(client.on_request(request(&["/10.0.0.3"], &[])));
    assert_eq!(names(Some(push)), (vec!["uid-c".to_owned()], vec![]));
}

#[test]
fn with_a_service_come_its_workloads_however_it_is_named() {
    for name in [WEB, "/10.96.0.1"] {
        let mut client = Client::new(cluster().directory);
        client.on_request(request(&["*"], &["*"]));
        let push = pushed(client.on_request(request(&[name], &[])));
        let expected = ["shop/web.shop.svc.cluster.local", "uid-a", "uid-b"];
        assert_eq!(names(Some(push)).0, expected, "{name}");
    }
}

#[test]
fn a_name_that_stands_for_nothing_is_answered_and_followed() {
    let mut cluster = cluster();
    let mut client = Client::new(cluster.directory.clone());
    let push = pushed(client.on_request(request(&["/10.0.0.9"], &[])));
    assert_eq!(names(Some(push)), (vec![], vec!["/10.0.0.9".to_owned()]));
    cluster.apply(set_pod(pod("z", "10.0.0.9")));
    let push = client.on_directory(cluster.directory.clone());
    assert_eq!(names(push), (vec!["uid-z".to_owned()], vec![]));
}

#[test]
fn a_client_of_a_service_hears_of_its_workloads_only() {
    let mut cluster = cluster();
    let mut client = Client::new(cluster.directory.clone());
    client.on_request(request(&[WEB], &[]));
    let mut other = pod("c", "10.0.0.3");
    other.ready = false;
    cluster.apply(set_pod(other));
    assert_eq!(client.on_directory(cluster.directory.clone()), None);
    let endpoints = vec![pod_endpoint("a", "10.0.0.1"), pod_endpoint("c", "10.0.0.3")];
    cluster.apply(set_slice(slice("web", endpoints)));
    let (resources, _) = names(client.on_directory(cluster.directory.clone()));
    assert!(resources.contains(&"uid-c".to_owned()), "{resources:?}");
    cluster.apply(Update::Pod(Change::Remove("uid-a".into())));
    let push = client.on_directory(cluster.directory.clone());
    assert_eq!(names(push), (vec![], vec!["uid-a".to_owned()]));
}

#[test]
fn what_is_given_up_is_not_told_any_more() {
    let mut cluster = cluster();
    let mut client = Client::new(cluster.directory.clone());
    client.on_request(request(&["/10.0.0.3"], &[]));
    assert_eq!(
        client.on_request(request(&[], &["/10.0.0.3"])),
        Reaction::Nothing
    );
    cluster.apply(Update::Pod(Change::Remove("uid-c".into())));
    assert_eq!(client.on_directory(cluster.directory.clone()), None);
}

#[test]
fn a_request_between_a_change_and_its_push_loses_nothing() {
    let mut cluster = cluster();
    let mut client = Client::new(cluster.directory.clone());
    client.on_request(request(&["uid-a"], &[]));
    let mut changed = pod("a", "10.0.0.1");
    changed.ready = false;
    cluster.apply(set_pod(changed));
    client.on_request(request(&["uid-c"], &[]));
    let push = client.on_directory(cluster.directory.clone());
    assert_eq!(names(push).0, ["uid-a"]);
}

#[test]
fn a_long_answer_is_split_and_complete() {
    let pods = (0..9000).map(|i| pod(&format!("p{i}"), &format!("10.1.{}.{}", i / 250, i % 250)));
    let cluster = Cluster::with(pods.map(set_pod));
    let mut client = Client::new(cluster.directory.clone());
    let push = pushed(client.on_request(request(&[], &[])));
    let responses: Vec<_> = client.responses(push).collect();
    assert!(responses.len() > 1);
    let mut nonces = BTreeSet::new();
    let mut resources = BTreeSet::new();
    for response in responses {
        let bytes = prost::Message::encoded_len(&response);
        assert!(bytes <= MAX_RESPONSE_BYTES, "{bytes}");
        assert!(nonces.insert(response.nonce));
        resources.extend(response.resources.into_iter().map(|one| one.name));
    }
    assert_eq!(resources.len(), 9000);
}

/// One pod of four, ready or not, or gone.
fn any_change() -> impl Strategy<Value = Update> {
    (0..4u8, 0..3u8).prop_map(|(name, state)| {
        let mut pod = pod(&format!("p{name}"), &format!("10.0.0.{name}"));
        pod.ready = state == 1;
        match state {
            0 => Update::Pod(Change::Remove(pod.uid)),
            _ => set_pod(pod),
        }
    })
}

proptest! {
    /// Batches of changes; after each the client is told, or it breaks off and comes back.
    #[test]
    fn whatever_happens_a_client_of_everything_has_everything(
        batches in prop::collection::vec(
            (prop::collection::vec(any_change(), 0..4), any::<bool>()), 1..12
        )
    ) {
        let mut cluster = cluster();
        let mut client = Client::new(cluster.directory.clone());
        let mut peer = Peer::default();
        let reaction = client.on_request(request(&[], &[]));
        peer.take_reaction(&mut client, reaction);
        for (changes, breaks_off) in batches {
            for change in changes {
                cluster.apply(change);
            }
            if breaks_off {
                client = Client::new(cluster.directory.clone());
                let mut first = request(&[], &[]);
                first.initial_resource_versions = peer.has.clone().into_iter().collect();
                let reaction = client.on_request(first);
                peer.take_reaction(&mut client, reaction);
            } else if let Some(push) = client.on_directory(cluster.directory.clone()) {
                peer.take(&mut client, push);
            }
            prop_assert_eq!(&peer.has, &versions(&cluster.directory));
        }
    }

    /// A client that names addresses has exactly what they stand for.
    #[test]
    fn a_client_of_names_has_what_they_stand_for(
        wanted in prop::collection::btree_set(0..4u8, 1..3),
        changes in prop::collection::vec(any_change(), 1..20)
    ) {
        let mut cluster = Cluster::with([]);
        let mut client = Client::new(cluster.directory.clone());
        let mut peer = Peer::default();
        client.on_request(request(&["*"], &["*"]));
        for name in &wanted {
            let reaction = client.on_request(request(&[&format!("/10.0.0.{name}")], &[]));
            peer.take_reaction(&mut client, reaction);
        }
        for change in changes {
            cluster.apply(change);
            if let Some(push) = client.on_directory(cluster.directory.clone()) {
                peer.take(&mut client, push);
            }
            let expected: BTreeMap<String, String> = wanted
                .iter()
                .flat_map(|name| cluster.directory.find(&format!("/10.0.0.{name}")))
                .map(|one| (one.name.to_string(), one.version.to_string()))
                .collect();
            prop_assert_eq!(&peer.has, &expected);
        }
    }
}
