//! Proxies against each other and against peers that misbehave: real sockets, real redirection, in
//! network namespaces of the tests' own.

mod bed;
mod connections;
mod refusals;
