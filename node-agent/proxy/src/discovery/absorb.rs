//! A response of the controller into the directory. Pure.
//!
//! What cannot be read is rejected and the rest taken; what was known under the rejected name stays.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use hbone::directory::Directory;
use hbone::identity::TrustDomain;
use prost::Message;
use protocol::authorization::Authorization;
use protocol::discovery::{DeltaDiscoveryResponse, Resource, Status};
use protocol::workload::{Address, address};
use protocol::{ADDRESS_TYPE, AUTHORIZATION_TYPE};

use super::intern::Interner;
use super::{parse, policy};

/// `INVALID_ARGUMENT` of gRPC.
const INVALID_ARGUMENT: i32 = 3;
/// Rejections that a NACK names at most.
const NAMED: usize = 5;

/// A type of resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Address,
    Authorization,
}

/// A resource that was not taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rejection {
    name: String,
    error: String,
}

/// Everything that was received.
#[derive(Clone, Debug)]
pub(crate) struct Held {
    trust_domain: TrustDomain,
    directory: Directory,
    interner: Interner,
    addresses: Versions,
    policies: Versions,
}

/// Version by name, once there was a first response.
type Versions = Option<HashMap<Arc<str>, Box<str>>>;

impl Kind {
    /// Addresses are asked for first: a controller that splits its first answer has sent all of it
    /// when the answer to the second request comes, so that a complete state is complete.
    pub(crate) const ALL: [Self; 2] = [Self::Address, Self::Authorization];

    pub(crate) fn url(self) -> &'static str {
        match self {
            Self::Address => ADDRESS_TYPE,
            Self::Authorization => AUTHORIZATION_TYPE,
        }
    }

    fn of(url: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.url() == url)
    }
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.name, self.error)
    }
}

impl Held {
    pub(crate) fn new(trust_domain: TrustDomain) -> Self {
        Self {
            trust_domain,
            directory: Directory::default(),
            interner: Interner::default(),
            addresses: None,
            policies: None,
        }
    }

    pub(crate) fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    pub(crate) fn directory(&self) -> &Directory {
        &self.directory
    }

    /// Whether both types were received at least once.
    pub(crate) fn is_complete(&self) -> bool {
        self.addresses.is_some() && self.policies.is_some()
    }

    /// What a new stream says that we have already.
    pub(crate) fn versions(&self, kind: Kind) -> HashMap<String, String> {
        let versions = match kind {
            Kind::Address => &self.addresses,
            Kind::Authorization => &self.policies,
        };
        let versions = versions.iter().flatten();
        versions
            .map(|(name, version)| (name.to_string(), version.to_string()))
            .collect()
    }

    /// Takes a response in that has come at this time; gives what was rejected of it.
    pub(crate) fn absorb(
        &mut self,
        response: DeltaDiscoveryResponse,
        now: Instant,
    ) -> Vec<Rejection> {
        self.directory.forget_gone(now);
        let Some(kind) = Kind::of(&response.type_url) else {
            let error = "nobody asked for this type".to_owned();
            let name = response.type_url;
            return vec![Rejection { name, error }];
        };
        for name in &response.removed_resources {
            self.remove(kind, name, now);
            self.versions_mut(kind).remove(&**name);
        }
        self.versions_mut(kind);
        let mut rejected = Vec::new();
        for resource in response.resources {
            let Resource { name, version, .. } = &resource;
            match self.put(kind, &resource) {
                Ok(()) => {
                    let known = self.directory.workload(name);
                    let name =
                        known.map_or_else(|| name.as_str().into(), |known| known.uid.clone());
                    let version = version.as_str().into();
                    self.versions_mut(kind).insert(name, version);
                }
                Err(error) => rejected.push(Rejection {
                    name: name.clone(),
                    error,
                }),
            }
        }
        self.interner.clean();
        rejected
    }

    fn versions_mut(&mut self, kind: Kind) -> &mut HashMap<Arc<str>, Box<str>> {
        let versions = match kind {
            Kind::Address => &mut self.addresses,
            Kind::Authorization => &mut self.policies,
        };
        versions.get_or_insert_default()
    }

    fn remove(&mut self, kind: Kind, name: &str, now: Instant) {
        match kind {
            // The name does not say which of the two it is; no name is of both.
            Kind::Address => {
                self.directory.remove_workload(name, now);
                self.directory.remove_service(name);
            }
            Kind::Authorization => self.directory.remove_policy(name),
        }
    }

    fn put(&mut self, kind: Kind, resource: &Resource) -> Result<(), String> {
        let any = resource.resource.as_ref().ok_or("it has no content")?;
        match kind {
            Kind::Address => {
                let address = Address::decode(&*any.value).map_err(|error| error.to_string())?;
                self.put_address(&resource.name, address)
            }
            Kind::Authorization => {
                let policy = Authorization::decode(&*any.value);
                self.put_policy(&resource.name, &policy.map_err(|error| error.to_string())?)
            }
        }
    }

    fn put_address(&mut self, name: &str, address: Address) -> Result<(), String> {
        match address.r#type.ok_or("it is neither workload nor service")? {
            address::Type::Workload(workload) => {
                let workload = parse::workload(&self.trust_domain, &mut self.interner, workload)?;
                same_name(name, &workload.uid)?;
                self.directory.put_workload(workload);
            }
            address::Type::Service(service) => {
                let service = parse::service(service)?;
                same_name(name, &service.key)?;
                self.directory.put_service(service);
            }
        }
        Ok(())
    }

    fn put_policy(&mut self, name: &str, message: &Authorization) -> Result<(), String> {
        let key: Arc<str> = name.into();
        match policy::policy(message) {
            Ok(policy) => {
                self.directory.put_policy(key, policy);
                Ok(())
            }
            Err(error) => {
                // Nobody knows what it would allow: until it can be read, nothing.
                if self.directory.policy(name).is_none() {
                    let nothing = policy::deny_everything(message);
                    self.directory.put_policy(key, nothing);
                }
                Err(error)
            }
        }
    }
}

fn same_name(name: &str, own: &str) -> Result<(), String> {
    if name == own {
        return Ok(());
    }
    Err(format!("it calls itself {own}"))
}

/// What a NACK says; nothing for an ACK.
pub(crate) fn error_detail(rejected: &[Rejection]) -> Option<Status> {
    if rejected.is_empty() {
        return None;
    }
    let named: Vec<String> = rejected
        .iter()
        .take(NAMED)
        .map(ToString::to_string)
        .collect();
    let more = rejected.len().saturating_sub(NAMED);
    let more = if more > 0 {
        format!("; and {more} more")
    } else {
        String::new()
    };
    Some(Status {
        code: INVALID_ARGUMENT,
        message: named.join("; ") + &more,
        details: Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use prost_types::Any;
    use protocol::workload::{TunnelProtocol, Workload};

    use super::*;

    fn held() -> Held {
        Held::new(TrustDomain::new("td").unwrap())
    }

    impl Held {
        fn absorb_now(&mut self, response: DeltaDiscoveryResponse) -> Vec<Rejection> {
            self.absorb(response, Instant::now())
        }
    }

    fn workload(uid: &str, account: &str) -> Resource {
        let workload = Workload {
            uid: uid.to_owned(),
            namespace: "shop".to_owned(),
            service_account: account.to_owned(),
            tunnel_protocol: TunnelProtocol::Hbone.into(),
            addresses: vec![vec![10, 0, 0, 1].into()],
            ..Workload::default()
        };
        let address = Address {
            r#type: Some(address::Type::Workload(workload)),
        };
        resource(uid, ADDRESS_TYPE, address.encode_to_vec())
    }

    fn resource(name: &str, url: &str, value: Vec<u8>) -> Resource {
        Resource {
            name: name.to_owned(),
            version: format!("{name}-1"),
            resource: Some(Any {
                type_url: url.to_owned(),
                value,
            }),
            ..Resource::default()
        }
    }

    fn response(url: &str, resources: Vec<Resource>, removed: &[&str]) -> DeltaDiscoveryResponse {
        DeltaDiscoveryResponse {
            type_url: url.to_owned(),
            resources,
            removed_resources: removed.iter().map(ToString::to_string).collect(),
            ..DeltaDiscoveryResponse::default()
        }
    }

    #[test]
    fn a_bad_resource_is_rejected_and_the_rest_is_kept() {
        let mut held = held();
        let resources = vec![workload("a", "web"), workload("b", "no account!")];
        let rejected = held.absorb_now(response(ADDRESS_TYPE, resources, &[]));
        assert_eq!(rejected.len(), 1);
        let detail = error_detail(&rejected).unwrap();
        assert!(detail.message.starts_with("b: "), "{}", detail.message);
        assert!(held.directory().workload("a").is_some());
        let versions = HashMap::from([("a".to_owned(), "a-1".to_owned())]);
        assert_eq!(held.versions(Kind::Address), versions);
    }

    #[test]
    fn what_was_known_stays_when_its_new_version_is_rejected() {
        let mut held = held();
        held.absorb_now(response(ADDRESS_TYPE, vec![workload("a", "web")], &[]));
        held.absorb_now(response(ADDRESS_TYPE, vec![workload("a", "!")], &[]));
        assert_eq!(
            *held.directory().workload("a").unwrap().service_account,
            *"web"
        );
    }

    #[test]
    fn it_is_complete_when_both_types_came_even_if_empty() {
        let mut held = held();
        held.absorb_now(response(ADDRESS_TYPE, Vec::new(), &[]));
        assert!(!held.is_complete());
        held.absorb_now(response(AUTHORIZATION_TYPE, Vec::new(), &[]));
        assert!(held.is_complete());
    }

    #[test]
    fn what_is_removed_is_forgotten_with_its_version() {
        let mut held = held();
        held.absorb_now(response(ADDRESS_TYPE, vec![workload("a", "web")], &[]));
        held.absorb_now(response(ADDRESS_TYPE, Vec::new(), &["a", "never-known"]));
        assert!(held.directory().workload("a").is_none());
        assert!(held.versions(Kind::Address).is_empty());
    }

    #[test]
    fn a_resource_under_another_name_is_rejected() {
        let mut held = held();
        let mut other = workload("a", "web");
        other.name = "b".to_owned();
        let rejected = held.absorb_now(response(ADDRESS_TYPE, vec![other], &[]));
        assert_eq!(rejected[0].to_string(), "b: it calls itself a");
        assert!(held.directory().workload("a").is_none());
    }

    #[test]
    fn a_policy_that_cannot_be_read_denies() {
        let mut held = held();
        let policy = Authorization {
            name: "p".to_owned(),
            namespace: "shop".to_owned(),
            action: 77,
            ..Authorization::default()
        };
        let bad = resource("shop/p", AUTHORIZATION_TYPE, policy.encode_to_vec());
        assert_eq!(
            held.absorb_now(response(AUTHORIZATION_TYPE, vec![bad], &[]))
                .len(),
            1
        );
        let connection = hbone::policy::Connection {
            client: None,
            source: "10.0.0.1".parse().unwrap(),
            destination: "10.0.0.2:80".parse().unwrap(),
        };
        let decide = hbone::policy::check(held.directory(), None, &"shop".into(), &connection);
        assert!(decide.is_err());
    }

    #[test]
    fn an_unknown_type_is_rejected() {
        assert_eq!(
            held().absorb_now(response("other", Vec::new(), &[])).len(),
            1
        );
    }
}
