//! The sets of mesh pods' addresses, one a role and family: read through netlink, written through libipset.

use std::sync::{Mutex, PoisonError};

use ipset::Session;
use ipset::types::HashIp;

use crate::datapath::{Item, Member};
use crate::family::Family;
use crate::kernel::netfilter::Netfilter;
use crate::names::{Names, SET_SIZE};
use crate::netns::Netns;
use crate::set::AddressSet;

/// The set could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum IpSetError {
    /// The namespace could not be entered.
    #[error("enter the network namespace to reach the sets of addresses")]
    Enter(#[source] std::io::Error),
    /// The set could not be read.
    #[error("list set {0}")]
    List(String, #[source] std::io::Error),
    /// The set has no room left.
    #[error("set {} is full: it cannot take {}", .0.set.name, .0.ip)]
    Full(Member),
    /// libipset said no.
    #[error("{action} set {set}: {message}")]
    Library {
        /// Name of the set.
        set: String,
        /// What was tried.
        action: &'static str,
        /// What libipset said.
        message: String,
    },
}

fn failed(action: &'static str, set: &str) -> impl Fn(ipset::types::Error) -> IpSetError {
    move |error| IpSetError::Library {
        set: set.to_owned(),
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

fn session(name: &str) -> Session<HashIp> {
    Session::new(name.to_owned())
}

/// The sets and their members.
pub(super) fn observe(netfilter: &Netfilter, names: &Names) -> Result<Vec<Item>, IpSetError> {
    let mut items = Vec::new();
    for set in Family::ALL.map(|family| names.sets(family)).concat() {
        let Some(ips) = netfilter
            .members(&set.name)
            .map_err(|error| IpSetError::List(set.name.clone(), error))?
        else {
            continue;
        };
        items.extend(ips.into_iter().map(|ip| {
            let set = set.clone();
            Item::Member(Member { set, ip })
        }));
        items.push(Item::Set(set));
    }
    Ok(items)
}

pub(super) fn create(netns: &Netns, set: &AddressSet) -> Result<(), IpSetError> {
    within(netns, || {
        session(&set.name)
            .create(|builder| {
                builder
                    .with_ipv6(set.family == Family::V6)?
                    .with_max_elem(SET_SIZE)?
                    .build()
            })
            .map(drop)
            .map_err(failed("create", &set.name))
    })?
}

pub(super) fn destroy(netns: &Netns, set: &AddressSet) -> Result<(), IpSetError> {
    within(netns, || {
        session(&set.name)
            .destroy()
            .map(drop)
            .map_err(failed("destroy", &set.name))
    })?
}

/// Adds (`true`) and removes (`false`) members in this order, in one session for neighbours of one set; the
/// index of the one that failed.
pub(super) fn change_members(
    netns: &Netns,
    changes: &[(&Member, bool)],
) -> Result<(), (usize, IpSetError)> {
    let changed = within(netns, || {
        let mut index = 0;
        for of_set in changes.chunk_by(|(a, _), (b, _)| a.set == b.set) {
            let mut session = session(&of_set[0].0.set.name);
            for (member, add) in of_set {
                let changed = if *add {
                    session.add(member.ip, &[])
                } else {
                    session.del(member.ip)
                };
                changed.map_err(|error| (index, member_error(member, *add, &error)))?;
                index += 1;
            }
        }
        Ok(())
    });
    changed.map_err(|error| (0, error))?
}

fn member_error(member: &Member, add: bool, error: &ipset::types::Error) -> IpSetError {
    let message = error.to_string();
    if message.contains("full") {
        return IpSetError::Full(member.clone());
    }
    IpSetError::Library {
        set: member.set.name.clone(),
        action: if add { "add to" } else { "remove from" },
        message,
    }
}
