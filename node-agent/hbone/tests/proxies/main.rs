//! Proxies against each other and against peers that misbehave: real sockets, real redirection, in
//! network namespaces of the tests' own.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "these are tests"
)]

mod address_reuse;
mod bed;
mod connections;
mod refusals;
