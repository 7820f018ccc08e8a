//! What the tests of the whole mesh share: a running cluster, seen with the tools a user has.
//!
//! ```text
//!  tests/run-cluster-rings ── brings a cluster up, installs Ambit, sets AMBIT_* ──▶ tests/tests/*.rs
//!                                                                                      │
//!  kubectl (objects) · pods (podtool in them) · capture (tcpdump on the node link) ◀───┘
//! ```
//!
//! Nothing here links the programs under test: what they did is read back with other tools.

pub mod api;
pub mod api_server;
pub mod capture;
pub mod certificate_api;
pub mod cluster;
pub mod command;
pub mod drift;
pub mod enrolment;
pub mod guard;
pub mod json_file;
pub mod load;
pub mod manifest;
pub mod matrix;
pub mod pki;
pub mod podtool;
pub mod process;
pub mod scene;
pub mod soak;
pub mod stage;
pub mod state;
pub mod traffic;
pub mod wait;
