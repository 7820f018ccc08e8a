//! The client's side of delta discovery: what was received, and what is answered. Pure.
//!
//! A resource that cannot be used is refused (NACK) and named; the rest of its response counts, and
//! what was known of that resource before stays.

use std::collections::{BTreeMap, HashMap};

use hbone::directory::Directory;
use protocol::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Resource, Status};
use protocol::{ADDRESS_TYPE, AUTHORIZATION_TYPE};

use crate::parse::{self, Parsed};

/// `google.rpc.Code.INVALID_ARGUMENT`.
const INVALID_ARGUMENT: i32 = 3;

/// The subscriptions of one proxy, over all of its connections to controllers.
#[derive(Debug, Default)]
pub(crate) struct Subscriptions {
    /// By type: name and version of every resource that is in use.
    versions: BTreeMap<&'static str, HashMap<String, String>>,
}

/// A response for a type that was never asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a response of type {0:?}, which was not subscribed to")]
pub(crate) struct UnknownType(String);

const TYPES: [&str; 2] = [ADDRESS_TYPE, AUTHORIZATION_TYPE];

impl Subscriptions {
    /// The first requests of a connection: everything of both types, but not what is here already.
    pub(crate) fn open(&self, node: &Node) -> Vec<DeltaDiscoveryRequest> {
        TYPES
            .into_iter()
            .map(|type_url| DeltaDiscoveryRequest {
                node: Some(node.clone()),
                type_url: type_url.to_owned(),
                initial_resource_versions: self.versions.get(type_url).cloned().unwrap_or_default(),
                ..DeltaDiscoveryRequest::default()
            })
            .collect()
    }

    /// Whether every type was received at least once, from whichever controller.
    pub(crate) fn complete(&self) -> bool {
        TYPES
            .iter()
            .all(|type_url| self.versions.contains_key(type_url))
    }

    /// Puts a response into `directory`; the answer to it.
    pub(crate) fn receive(
        &mut self,
        response: DeltaDiscoveryResponse,
        directory: &mut Directory,
    ) -> Result<DeltaDiscoveryRequest, UnknownType> {
        let type_url = TYPES
            .into_iter()
            .find(|type_url| *type_url == response.type_url)
            .ok_or_else(|| UnknownType(response.type_url.clone()))?;
        let versions = self.versions.entry(type_url).or_default();
        let mut refused = Vec::new();
        for name in response.removed_resources {
            versions.remove(&name);
            remove(directory, type_url, &name);
        }
        for resource in response.resources {
            match put(directory, type_url, &resource) {
                Ok(()) => drop(versions.insert(resource.name, resource.version)),
                Err(error) => refused.push(format!("{}: {error}", resource.name)),
            }
        }
        let error_detail = (!refused.is_empty()).then(|| Status {
            code: INVALID_ARGUMENT,
            message: refused.join("; "),
            details: Vec::new(),
        });
        Ok(DeltaDiscoveryRequest {
            type_url: type_url.to_owned(),
            response_nonce: response.nonce,
            error_detail,
            ..DeltaDiscoveryRequest::default()
        })
    }
}

fn put(
    directory: &mut Directory,
    type_url: &str,
    resource: &Resource,
) -> Result<(), parse::ParseError> {
    let bytes = &resource
        .resource
        .as_ref()
        .ok_or(parse::ParseError::Empty)?
        .value;
    match type_url {
        AUTHORIZATION_TYPE => {
            let policy = parse::policy(bytes)?;
            directory.put_policy(resource.name.as_str().into(), policy);
        }
        _ => match parse::address(&resource.name, bytes)? {
            Parsed::Workload(workload) => directory.put_workload(*workload),
            Parsed::Service(service) => directory.put_service(service),
        },
    }
    Ok(())
}

fn remove(directory: &mut Directory, type_url: &str, name: &str) {
    match type_url {
        AUTHORIZATION_TYPE => directory.remove_policy(name),
        _ => {
            // One type carries both, and a name does not tell which.
            directory.remove_workload(name);
            directory.remove_service(name);
        }
    }
}

#[cfg(test)]
mod tests {
    use prost::Message;
    use prost_types::Any;
    use protocol::workload::{Address, Workload, address};

    use super::*;

    fn workload(name: &str, version: &str, ip: &[u8]) -> Resource {
        let address = Address {
            r#type: Some(address::Type::Workload(Workload {
                uid: name.to_owned(),
                name: name.to_owned(),
                namespace: "shop".to_owned(),
                service_account: "server".to_owned(),
                addresses: vec![ip.to_vec().into()],
                ..Workload::default()
            })),
        };
        Resource {
            name: name.to_owned(),
            version: version.to_owned(),
            resource: Some(Any {
                type_url: ADDRESS_TYPE.to_owned(),
                value: address.encode_to_vec(),
            }),
            aliases: Vec::new(),
        }
    }

    fn response(resources: Vec<Resource>, removed: &[&str]) -> DeltaDiscoveryResponse {
        DeltaDiscoveryResponse {
            resources,
            type_url: ADDRESS_TYPE.to_owned(),
            nonce: "n".to_owned(),
            removed_resources: removed.iter().map(|name| (*name).to_owned()).collect(),
            ..DeltaDiscoveryResponse::default()
        }
    }

    #[test]
    fn a_reconnect_names_what_is_here() {
        let (mut subscriptions, mut directory) = (Subscriptions::default(), Directory::default());
        let two = vec![
            workload("a", "1", &[10, 0, 0, 1]),
            workload("b", "1", &[10, 0, 0, 2]),
        ];
        subscriptions
            .receive(response(two, &[]), &mut directory)
            .unwrap();
        subscriptions
            .receive(response(vec![], &["b"]), &mut directory)
            .unwrap();
        let [addresses, policies] = &subscriptions.open(&Node::default())[..] else {
            panic!("two types");
        };
        assert_eq!(
            addresses.initial_resource_versions,
            HashMap::from([("a".to_owned(), "1".to_owned())])
        );
        assert!(policies.initial_resource_versions.is_empty());
        assert!(directory.workload("a").is_some() && directory.workload("b").is_none());
    }

    #[test]
    fn a_bad_resource_is_refused_and_the_rest_counts() {
        let (mut subscriptions, mut directory) = (Subscriptions::default(), Directory::default());
        let good = workload("a", "1", &[10, 0, 0, 1]);
        subscriptions
            .receive(response(vec![good], &[]), &mut directory)
            .unwrap();
        let mixed = vec![
            workload("a", "2", &[10, 0, 0]),
            workload("b", "1", &[10, 0, 0, 2]),
        ];
        let answer = subscriptions
            .receive(response(mixed, &[]), &mut directory)
            .unwrap();
        let detail = answer.error_detail.unwrap();
        assert!(detail.message.starts_with("a: "), "{}", detail.message);
        assert_eq!(answer.response_nonce, "n");
        assert!(directory.workload("b").is_some());
        assert!(
            directory.workload_at("10.0.0.1".parse().unwrap()).is_some(),
            "the old one stays"
        );
        let open = subscriptions.open(&Node::default());
        assert_eq!(open[0].initial_resource_versions["a"], "1");
    }

    #[test]
    fn it_is_complete_when_both_types_came_even_if_empty() {
        let (mut subscriptions, mut directory) = (Subscriptions::default(), Directory::default());
        subscriptions
            .receive(response(vec![], &[]), &mut directory)
            .unwrap();
        assert!(!subscriptions.complete());
        let mut policies = response(vec![], &[]);
        policies.type_url = AUTHORIZATION_TYPE.to_owned();
        subscriptions.receive(policies, &mut directory).unwrap();
        assert!(subscriptions.complete());
    }

    #[test]
    fn a_type_that_was_not_asked_for_is_an_error() {
        let mut other = response(vec![], &[]);
        other.type_url = "type.googleapis.com/x".to_owned();
        let result = Subscriptions::default().receive(other, &mut Directory::default());
        assert_eq!(result, Err(UnknownType("type.googleapis.com/x".to_owned())));
    }
}
