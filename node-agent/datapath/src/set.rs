//! Sets of mesh pods' addresses, and what they are for.

use crate::family::Family;

/// A set of addresses, of type `hash:ip`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct AddressSet {
    /// Its name.
    pub name: String,
    /// What it is for.
    pub role: Role,
    /// The addresses that it takes.
    pub family: Family,
}

/// What the members of a set are looked up for. The sets of both roles have the same members: what one
/// lacks for a while, the other keeps from leaving in the clear.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// To send what they open to the proxy.
    Redirect,
    /// To drop what should have gone to the proxy and goes elsewhere.
    Guard,
}

impl Role {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Redirect, Self::Guard];
}
