//! Discovery as a proxy speaks it, but without looking into resources: a thousand clients on one machine must not cost
//! more than the controller that is measured.

use std::collections::HashMap;

use prost::Message;
use prost::bytes::{BufMut, Bytes};
use protocol::ADDRESS_TYPE;
use protocol::discovery::DeltaDiscoveryRequest;
use tonic::Status;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};

/// Where the stream is served.
pub(crate) const PATH: &str =
    "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";

/// A `DeltaDiscoveryResponse` without what its resources hold.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Told {
    #[prost(message, repeated, tag = "2")]
    pub(crate) resources: Vec<Named>,
    #[prost(string, tag = "5")]
    pub(crate) nonce: String,
    #[prost(string, repeated, tag = "6")]
    pub(crate) removed: Vec<String>,
}

/// A `Resource` without what it holds.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Named {
    #[prost(string, tag = "1")]
    pub(crate) version: String,
    #[prost(string, tag = "3")]
    pub(crate) name: String,
}

/// A proxy's first request: for everything, less what it says it has.
pub(crate) fn first(has: HashMap<String, String>) -> Bytes {
    encoded(&DeltaDiscoveryRequest {
        type_url: ADDRESS_TYPE.to_owned(),
        initial_resource_versions: has.into_iter().collect(),
        ..DeltaDiscoveryRequest::default()
    })
}

/// The answer to a response.
pub(crate) fn acknowledgement(nonce: String) -> Bytes {
    encoded(&DeltaDiscoveryRequest {
        type_url: ADDRESS_TYPE.to_owned(),
        response_nonce: nonce,
        ..DeltaDiscoveryRequest::default()
    })
}

fn encoded(request: &DeltaDiscoveryRequest) -> Bytes {
    request.encode_to_vec().into()
}

/// Requests are encoded once for all clients.
#[derive(Default)]
pub(crate) struct Slim;

impl Codec for Slim {
    type Encode = Bytes;
    type Decode = Told;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Slim {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        to.put(item);
        Ok(())
    }
}

impl Decoder for Slim {
    type Item = Told;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Told>, Status> {
        let told = Told::decode(from);
        told.map(Some)
            .map_err(|error| Status::internal(error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use protocol::discovery::{DeltaDiscoveryResponse, Resource};

    use super::*;

    #[test]
    fn names_versions_and_removals_are_read_and_the_rest_is_passed_over() {
        let whole = DeltaDiscoveryResponse {
            type_url: ADDRESS_TYPE.to_owned(),
            nonce: "7".to_owned(),
            resources: vec![Resource {
                name: "uid-a".to_owned(),
                version: "v1".to_owned(),
                aliases: vec!["/10.0.0.1".to_owned()],
                resource: Some(prost_types::Any {
                    type_url: ADDRESS_TYPE.to_owned(),
                    value: vec![1, 2, 3],
                }),
            }],
            removed_resources: vec!["uid-b".to_owned()],
            ..DeltaDiscoveryResponse::default()
        };
        let told = Told::decode(whole.encode_to_vec().as_slice());
        let named = Named {
            version: "v1".to_owned(),
            name: "uid-a".to_owned(),
        };
        let wanted = Told {
            resources: vec![named],
            nonce: "7".to_owned(),
            removed: vec!["uid-b".to_owned()],
        };
        assert_eq!(told, Ok(wanted));
    }
}
