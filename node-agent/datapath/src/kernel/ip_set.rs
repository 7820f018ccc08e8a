//! The sets of mesh pods' addresses, one a family: read through netlink, written through libipset.

use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};

use ipset::Session;
use ipset::types::HashIp;

use crate::datapath::Item;
use crate::family::Family;
use crate::kernel::netfilter::Netfilter;
use crate::names::{self, SET_SIZE};
use crate::netns::Netns;

/// The set could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum IpSetError {
    /// The namespace could not be entered.
    #[error("enter the network namespace to reach the sets of addresses")]
    Enter(#[source] std::io::Error),
    /// The set could not be read.
    #[error("list set {}", names::set(*.0))]
    List(Family, #[source] std::io::Error),
    /// The set has no room left.
    #[error("set {} is full: it cannot take {ip}", names::set(Family::of(*.ip)))]
    Full {
        /// The address.
        ip: IpAddr,
    },
    /// libipset said no.
    #[error("{action} set {}: {message}", names::set(*.family))]
    Library {
        /// The family of the set.
        family: Family,
        /// What was tried.
        action: &'static str,
        /// What libipset said.
        message: String,
    },
}

fn failed(action: &'static str, family: Family) -> impl Fn(ipset::types::Error) -> IpSetError {
    move |error| IpSetError::Library {
        family,
        action,
        message: error.to_string(),
    }
}

/// libipset keeps its list of set types in the process, unguarded: one caller at a time.
static LIBRARY: Mutex<()> = Mutex::new(());

fn within<T: Send, E: Send>(
    netns: &Netns,
    work: impl FnOnce() -> Result<T, E> + Send,
) -> Result<Result<T, E>, IpSetError> {
    let _alone = LIBRARY.lock().unwrap_or_else(PoisonError::into_inner);
    netns.run(work).map_err(IpSetError::Enter)
}

fn session(family: Family) -> Session<HashIp> {
    Session::new(names::set(family).to_owned())
}

/// The sets and their members.
pub(super) fn observe(netfilter: &Netfilter) -> Result<Vec<Item>, IpSetError> {
    let mut items = Vec::new();
    for family in Family::ALL {
        let members = netfilter
            .members(names::set(family))
            .map_err(|error| IpSetError::List(family, error))?;
        let Some(members) = members else { continue };
        items.push(Item::Set(family));
        items.extend(members.into_iter().map(Item::Member));
    }
    Ok(items)
}

pub(super) fn create(netns: &Netns, family: Family) -> Result<(), IpSetError> {
    within(netns, || {
        session(family)
            .create(|builder| {
                builder
                    .with_ipv6(family == Family::V6)?
                    .with_max_elem(SET_SIZE)?
                    .build()
            })
            .map(drop)
            .map_err(failed("create", family))
    })?
}

pub(super) fn destroy(netns: &Netns, family: Family) -> Result<(), IpSetError> {
    within(netns, || {
        session(family)
            .destroy()
            .map(drop)
            .map_err(failed("destroy", family))
    })?
}

/// Adds (`true`) and removes (`false`) addresses, in one session a family; the index of the one that
/// failed.
pub(super) fn change_members(
    netns: &Netns,
    changes: &[(IpAddr, bool)],
) -> Result<(), (usize, IpSetError)> {
    let changed = within(netns, || {
        for family in Family::ALL {
            let mut of_family = changes
                .iter()
                .enumerate()
                .filter(|(_, (ip, _))| Family::of(*ip) == family)
                .peekable();
            if of_family.peek().is_none() {
                continue;
            }
            let mut session = session(family);
            for (index, (ip, add)) in of_family {
                let changed = if *add {
                    session.add(*ip, &[])
                } else {
                    session.del(*ip)
                };
                changed.map_err(|error| (index, member_error(*ip, *add, &error)))?;
            }
        }
        Ok(())
    });
    changed.map_err(|error| (0, error))?
}

fn member_error(ip: IpAddr, add: bool, error: &ipset::types::Error) -> IpSetError {
    let message = error.to_string();
    if message.contains("full") {
        return IpSetError::Full { ip };
    }
    IpSetError::Library {
        family: Family::of(ip),
        action: if add { "add to" } else { "remove from" },
        message,
    }
}
