//! One connection of the mesh, from accept to copy.
//!
//! ```text
//!  15001 accept ─▶ original destination ─▶ local workload by source ─▶ upstream (directory)
//!                                    ┌──────────────┼───────────────────┐
//!                                    ▼              ▼                   ▼
//!                               pool ─▶ tunnel   policy ─▶ dial pod   dial (passthrough)
//!                                    └──────────────┴─────── copy ──────┘
//!  15008 accept ─▶ TLS (certificate by destination) ─▶ CONNECT ─▶ policy ─▶ dial pod ─▶ copy
//!  15006 accept ─▶ policy ─▶ dial pod ─▶ copy
//! ```
//!
//! What a connection reads (directory, local workloads, certificates) are immutable snapshots.

pub mod access;
pub mod certificates;
pub mod copy;
pub mod directory;
pub mod identity;
mod inbound;
mod inbound_plaintext;
pub mod local;
pub mod metrics;
mod outbound;
pub mod policy;
mod pool;
pub mod serve;
pub mod shared;
mod socket;
pub mod tls;
mod tunnel;
pub mod upstream;

pub use serve::{ListenerKind, Server};
pub use shared::{Settings, Shared};
