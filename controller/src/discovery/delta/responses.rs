//! The responses that carry a push. One is made when it is asked for, so that of a long push only little is in
//! memory at a time.

use std::iter::{Chain, Map, Peekable};
use std::sync::Arc;
use std::vec;

use prost_types::Any;
use protocol::discovery::{DeltaDiscoveryResponse, Resource as Wire};

use super::Push;
use crate::directory::Resource;

/// A response is split where it would become longer: clients bound their messages, and what waits for each of
/// them is in memory.
pub(super) const MAX_RESPONSE_BYTES: usize = 256 << 10;

/// Bytes of a resource on the wire beside its content and names.
const RESOURCE_OVERHEAD: usize = 128;

/// At least one response, each of bounded size.
#[derive(Debug)]
pub(crate) struct Responses<'a> {
    type_url: &'static str,
    items: Peekable<Items>,
    nonce: &'a mut u64,
    begun: bool,
}

type Items = Chain<
    Map<vec::IntoIter<Arc<Resource>>, fn(Arc<Resource>) -> Item>,
    Map<vec::IntoIter<String>, fn(String) -> Item>,
>;

/// One entry of a response.
#[derive(Debug)]
enum Item {
    Resource(Arc<Resource>),
    Removed(String),
}

impl<'a> Responses<'a> {
    pub(super) fn new(push: Push, nonce: &'a mut u64) -> Self {
        let resources = push.resources.into_iter();
        let resources = resources.map(Item::Resource as fn(Arc<Resource>) -> Item);
        let removed = push.removed.into_iter();
        let removed = removed.map(Item::Removed as fn(String) -> Item);
        Self {
            type_url: push.resource_type.url(),
            items: resources.chain(removed).peekable(),
            nonce,
            begun: false,
        }
    }
}

impl Iterator for Responses<'_> {
    type Item = DeltaDiscoveryResponse;

    fn next(&mut self) -> Option<DeltaDiscoveryResponse> {
        if std::mem::replace(&mut self.begun, true) {
            self.items.peek()?;
        }
        *self.nonce += 1;
        let mut response = DeltaDiscoveryResponse {
            type_url: self.type_url.to_owned(),
            nonce: self.nonce.to_string(),
            ..DeltaDiscoveryResponse::default()
        };
        let mut size = 0;
        let fits = |item: &Item, size| size == 0 || size + item.bytes() <= MAX_RESPONSE_BYTES;
        while let Some(item) = self.items.next_if(|item| fits(item, size)) {
            size += item.bytes();
            item.add_to(&mut response);
        }
        Some(response)
    }
}

impl Item {
    fn bytes(&self) -> usize {
        match self {
            Self::Resource(resource) => {
                let names = resource
                    .aliases
                    .iter()
                    .map(|alias| alias.as_str().len() + 4);
                resource.body.len()
                    + resource.name.as_str().len()
                    + names.sum::<usize>()
                    + RESOURCE_OVERHEAD
            }
            Self::Removed(name) => name.len() + 4,
        }
    }

    fn add_to(self, response: &mut DeltaDiscoveryResponse) {
        match self {
            Self::Resource(resource) => response.resources.push(Wire {
                version: resource.version.to_string(),
                resource: Some(Any {
                    type_url: response.type_url.clone(),
                    value: resource.body.clone(),
                }),
                name: resource.name.to_string(),
                aliases: resource.aliases.iter().map(ToString::to_string).collect(),
            }),
            Self::Removed(name) => response.removed_resources.push(name),
        }
    }
}
