//! What fuzz targets call: whatever reads bytes of strangers.

use std::time::Instant;

use hbone::identity::TrustDomain;
use prost::Message;
use protocol::discovery::DeltaDiscoveryResponse;
use protocol::node::{AgentMessage, agent_message};

use crate::agent::configuration::Configuration;
use crate::discovery::absorb::{Held, error_detail};

#[allow(clippy::expect_used, reason = "it is one")]
fn trust_domain() -> TrustDomain {
    TrustDomain::new("cluster.local").expect("a trust domain")
}

/// Takes a controller's responses in: each has its length before it, as in protobuf's delimited streams.
pub fn discovery(mut bytes: &[u8]) {
    let mut held = Held::new(trust_domain());
    while let Ok(response) = DeltaDiscoveryResponse::decode_length_delimited(&mut bytes) {
        let rejected = held.absorb(response, Instant::now());
        drop(error_detail(&rejected));
    }
    // Whatever is known is under its own name.
    for workload in held.directory().workloads() {
        assert!(held.directory().workload(&workload.uid).is_some());
    }
}

/// Reads what an agent wants.
pub fn agent_message(bytes: &[u8]) {
    let message = AgentMessage::decode(bytes).ok().and_then(|all| all.message);
    if let Some(agent_message::Message::Configure(configure)) = message {
        let wanted = configure.workloads.len();
        let read = Configuration::parse(&trust_domain(), configure);
        assert!(read.workloads.iter().count() + read.refused.len() <= wanted);
    }
}
