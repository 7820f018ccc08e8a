//! Ambit's messages on the wire, generated from `proto/`.
//!
//! ```text
//!  controller ──discovery (delta xDS): workload, authorization──▶ proxy
//!  controller ◀──certificate (CSR), chain──────────────────────── proxy
//!  agent      ◀──node: Hello, Report ─── Configure──────────────▶ proxy
//! ```
//!
//! `discovery`, `workload`, `authorization` and `certificate` keep the field's package names and
//! field numbers, so that other proxies and control planes understand them.

mod codec;

pub use codec::{SparingCodec, SparingDecoder};

/// Agent and proxy of one node (`proto/node.proto`).
#[allow(missing_docs)]
pub mod node {
    tonic::include_proto!("ambit.node.v1");
}

/// Delta discovery (`envoy.service.discovery.v3`).
#[allow(missing_docs)]
pub mod discovery {
    tonic::include_proto!("envoy.service.discovery.v3");
}

/// Workloads and Services (`istio.workload`).
#[allow(missing_docs, clippy::large_enum_variant)]
pub mod workload {
    tonic::include_proto!("istio.workload");
}

/// Authorization policies (`istio.security`).
#[allow(missing_docs)]
pub mod authorization {
    tonic::include_proto!("istio.security");
}

/// Certificate signing (`istio.v1.auth`).
#[allow(missing_docs)]
pub mod certificate {
    tonic::include_proto!("istio.v1.auth");
}

/// Type URL of [`workload::Address`] in a discovery request.
pub const ADDRESS_TYPE: &str = "type.googleapis.com/istio.workload.Address";

/// Type URL of [`authorization::Authorization`] in a discovery request.
pub const AUTHORIZATION_TYPE: &str = "type.googleapis.com/istio.security.Authorization";
