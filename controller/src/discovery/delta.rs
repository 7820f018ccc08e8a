//! Pure: the protocol of one client's stream, without the stream.
//!
//! A client either follows everything or names what it wants: a resource, an alias
//! (`network/address`) or a service, with which come the workloads that serve it. What a client
//! that follows everything has is the directory it was last told of, which all clients share.

mod responses;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use protocol::discovery::DeltaDiscoveryRequest;
use protocol::{ADDRESS_TYPE, AUTHORIZATION_TYPE};

use self::responses::Responses;
use crate::directory::{Directory, Resource, Version};
use crate::names::ResourceName;

/// Subscribes to everything.
const WILDCARD: &str = "*";

/// What one client has asked for and was told.
#[derive(Debug)]
pub(crate) struct Client {
    /// What the client was last told of; requests are answered from it too, so that no change in
    /// between is lost.
    directory: Directory,
    addresses: Subscription,
    authorizations: Subscription,
    nonce: u64,
}

#[derive(Debug, Default)]
struct Subscription {
    /// Whether it has been asked for at all.
    begun: bool,
    wildcard: bool,
    names: BTreeSet<String>,
    /// What a client that names what it wants has.
    has: BTreeMap<ResourceName, Version>,
}

/// What a request calls for.
#[derive(Debug, PartialEq)]
pub(crate) enum Reaction {
    /// An answer, possibly with nothing in it.
    Push(Push),
    /// Nothing: it acknowledged, or gave up, resources.
    Nothing,
    /// It could not use a response.
    Rejected {
        resource_type: ResourceType,
        message: String,
    },
    /// It asked for what is not served here.
    UnknownType(String),
}

/// One of the served types.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ResourceType {
    Address,
    Authorization,
}

/// What a client has to be told.
#[derive(Debug, PartialEq)]
pub(crate) struct Push {
    pub(crate) resource_type: ResourceType,
    pub(crate) resources: Vec<Arc<Resource>>,
    pub(crate) removed: Vec<String>,
}

// === impl Client ===

impl Client {
    pub(crate) fn new(directory: Directory) -> Self {
        Self {
            directory,
            addresses: Subscription::default(),
            authorizations: Subscription::default(),
            nonce: 0,
        }
    }

    pub(crate) fn on_request(&mut self, request: DeltaDiscoveryRequest) -> Reaction {
        let Some(resource_type) = ResourceType::of(&request.type_url) else {
            return Reaction::UnknownType(request.type_url);
        };
        // No policies are served yet. An answer without any still makes a client ready.
        let none = Directory::default();
        let (subscription, directory) = match resource_type {
            ResourceType::Address => (&mut self.addresses, &self.directory),
            ResourceType::Authorization => (&mut self.authorizations, &none),
        };
        let rejection = request.error_detail.clone();
        let answer = subscription.on_request(request, directory);
        match (answer, rejection) {
            (Some((resources, removed)), _) => Reaction::Push(Push {
                resource_type,
                resources,
                removed,
            }),
            (None, Some(status)) => Reaction::Rejected {
                resource_type,
                message: status.message,
            },
            (None, None) => Reaction::Nothing,
        }
    }

    /// What the client has to be told about a new directory.
    pub(crate) fn on_directory(&mut self, directory: Directory) -> Option<Push> {
        let before = std::mem::replace(&mut self.directory, directory);
        let (resources, removed) = self.addresses.on_change(&before, &self.directory);
        let nothing = resources.is_empty() && removed.is_empty();
        (!nothing).then_some(Push {
            resource_type: ResourceType::Address,
            resources,
            removed,
        })
    }

    /// The responses that carry a push.
    pub(crate) fn responses(&mut self, push: Push) -> Responses<'_> {
        Responses::new(push, &mut self.nonce)
    }

    /// Whether addresses have been asked for.
    pub(crate) fn follows_addresses(&self) -> bool {
        self.addresses.begun
    }

    /// How many changes lie between what the client was told of and a newer directory, as far as it wants
    /// to be told.
    pub(crate) fn is_behind_by(&self, directory: &Directory) -> usize {
        if self.addresses.begun {
            directory.count_since(&self.directory)
        } else {
            0
        }
    }
}

impl Push {
    /// How many resources it tells of.
    pub(crate) fn len(&self) -> usize {
        self.resources.len() + self.removed.len()
    }
}

// === impl Subscription ===

type Answer = (Vec<Arc<Resource>>, Vec<String>);

impl Subscription {
    fn on_request(
        &mut self,
        request: DeltaDiscoveryRequest,
        directory: &Directory,
    ) -> Option<Answer> {
        let first = !std::mem::replace(&mut self.begun, true);
        let was_wildcard = self.wildcard;
        let mut subscribed: BTreeSet<String> =
            request.resource_names_subscribe.into_iter().collect();
        if first && subscribed.is_empty() || subscribed.remove(WILDCARD) {
            self.wildcard = true;
        }
        for name in &request.resource_names_unsubscribe {
            if name == WILDCARD {
                self.wildcard = false;
            }
            self.names.remove(name);
        }
        let mut initial = HashMap::new();
        if first {
            initial = request.initial_resource_versions;
        }
        if !self.wildcard {
            // Naming what it has is asking to be kept up to date with it.
            subscribed.extend(initial.keys().cloned());
        }
        self.names.extend(subscribed.iter().cloned());
        match (was_wildcard, self.wildcard) {
            (false, true) => Some(self.begin_wildcard(initial, directory)),
            (true, true) => (!subscribed.is_empty()).then(|| find_all(&subscribed, directory)),
            (_, false) => {
                let told = self.tell_named(&subscribed, &initial, directory);
                let asked = first || !subscribed.is_empty();
                self.forget_unwanted(directory);
                asked.then_some(told)
            }
        }
    }

    /// Everything that the client does not have yet, and what it has and is no more.
    fn begin_wildcard(
        &mut self,
        initial: HashMap<String, String>,
        directory: &Directory,
    ) -> Answer {
        let mut held = initial;
        for (name, version) in std::mem::take(&mut self.has) {
            held.insert(name.to_string(), version.to_string());
        }
        let resources = directory
            .resources()
            .filter(|resource| {
                held.remove(resource.name.as_str()) != Some(resource.version.to_string())
            })
            .cloned()
            .collect();
        let mut removed: Vec<String> = held.into_keys().collect();
        removed.sort_unstable();
        (resources, removed)
    }

    /// What was just named, unless the client has it in this version; a name that stands for
    /// nothing is answered as removed, so that the client need not wait for it.
    fn tell_named(
        &mut self,
        subscribed: &BTreeSet<String>,
        initial: &HashMap<String, String>,
        directory: &Directory,
    ) -> Answer {
        let (found, removed) = find_all(subscribed, directory);
        let mut resources = Vec::new();
        for resource in found {
            self.has.insert(resource.name.clone(), resource.version);
            if initial.get(resource.name.as_str()) != Some(&resource.version.to_string()) {
                resources.push(resource);
            }
        }
        (resources, removed)
    }

    /// After names were given up.
    fn forget_unwanted(&mut self, directory: &Directory) {
        let names = &self.names;
        self.has.retain(|name, _| {
            directory
                .get(name)
                .is_some_and(|resource| wants(names, directory, resource))
        });
    }

    fn on_change(&mut self, before: &Directory, directory: &Directory) -> Answer {
        if !self.begun {
            return Answer::default();
        }
        let changes = directory.changes_since(before);
        if self.wildcard {
            return divide(changes.map(|(name, new)| (name.clone(), new.cloned())));
        }
        let mut answer: BTreeMap<ResourceName, Option<Arc<Resource>>> = BTreeMap::new();
        for (name, new) in changes {
            let Some(new) = new else {
                if self.has.remove(name).is_some() {
                    answer.insert(name.clone(), None);
                }
                continue;
            };
            let had = self.has.contains_key(name);
            if !had && !wants(&self.names, directory, new) {
                continue;
            }
            answer.insert(name.clone(), Some(new.clone()));
            if !had {
                // A service that is new to the client comes with its workloads.
                for member in directory.members(name) {
                    answer.insert(member.name.clone(), Some(member.clone()));
                }
            }
        }
        answer.retain(|name, new| match new {
            Some(new) => self.has.insert(name.clone(), new.version) != Some(new.version),
            None => true,
        });
        divide(answer.into_iter())
    }
}

/// Whether a resource is named: by itself, an alias, or a service that it serves.
fn wants(names: &BTreeSet<String>, directory: &Directory, resource: &Resource) -> bool {
    let named = |resource: &Resource| {
        names.contains(resource.name.as_str())
            || resource
                .aliases
                .iter()
                .any(|alias| names.contains(alias.as_str()))
    };
    named(resource)
        || resource.services.iter().any(|service| {
            names.contains(service.as_str())
                || directory.get(service).is_some_and(|service| named(service))
        })
}

/// The resources that the names stand for, and the names that stand for nothing.
fn find_all(names: &BTreeSet<String>, directory: &Directory) -> Answer {
    let mut found: BTreeMap<&ResourceName, &Arc<Resource>> = BTreeMap::new();
    let mut unknown = Vec::new();
    for name in names {
        let resources = directory.find(name);
        if resources.is_empty() {
            unknown.push(name.clone());
        }
        for resource in resources {
            found.insert(&resource.name, resource);
            found.extend(
                directory
                    .members(&resource.name)
                    .map(|member| (&member.name, member)),
            );
        }
    }
    (found.into_values().cloned().collect(), unknown)
}

fn divide(changes: impl Iterator<Item = (ResourceName, Option<Arc<Resource>>)>) -> Answer {
    let (mut resources, mut removed) = (Vec::new(), Vec::new());
    for (name, new) in changes {
        match new {
            Some(new) => resources.push(new),
            None => removed.push(name.to_string()),
        }
    }
    (resources, removed)
}

// === impl ResourceType ===

impl ResourceType {
    fn of(type_url: &str) -> Option<Self> {
        match type_url {
            ADDRESS_TYPE => Some(Self::Address),
            AUTHORIZATION_TYPE => Some(Self::Authorization),
            _ => None,
        }
    }

    fn url(self) -> &'static str {
        match self {
            Self::Address => ADDRESS_TYPE,
            Self::Authorization => AUTHORIZATION_TYPE,
        }
    }

    /// For logs and metrics.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Address => "address",
            Self::Authorization => "authorization",
        }
    }
}

#[cfg(test)]
mod tests;
