//! The set of mesh pods' addresses, through libipset.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Mutex, PoisonError};

use ipset::Session;
use ipset::types::{HashIp, ListResult};

use crate::datapath::Item;
use crate::names::{SET, SET_SIZE};
use crate::netns::Netns;

/// The set could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum IpSetError {
    /// The namespace could not be entered.
    #[error("enter the network namespace to reach set {SET}")]
    Enter(#[source] std::io::Error),
    /// The set has no room left.
    #[error("set {SET} is full: it cannot take {0}")]
    Full(Ipv4Addr),
    /// libipset said no.
    #[error("{action} set {SET}: {message}")]
    Library {
        /// What was tried.
        action: &'static str,
        /// What libipset said.
        message: String,
    },
}

fn failed(action: &'static str) -> impl Fn(ipset::types::Error) -> IpSetError {
    move |error| IpSetError::Library {
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

/// The set and its members.
pub(super) fn observe(netns: &Netns) -> Result<Vec<Item>, IpSetError> {
    within(netns, || {
        let list = match session(SET).list() {
            Ok(ListResult::Normal(list)) => list,
            Ok(ListResult::Terse(_)) => return Ok(Vec::new()),
            Err(error) if error.to_string().contains("does not exist") => return Ok(Vec::new()),
            Err(error) => return Err(failed("list")(error)),
        };
        let mut items = vec![Item::Set(SET.to_owned())];
        for (member, _) in list.items.unwrap_or_default() {
            if let IpAddr::V4(ip) = member.to_ip_addr() {
                items.push(Item::Member(ip));
            }
        }
        Ok(items)
    })?
}

pub(super) fn create(netns: &Netns, name: &str) -> Result<(), IpSetError> {
    within(netns, || {
        session(name)
            .create(|builder| builder.with_ipv6(false)?.with_max_elem(SET_SIZE)?.build())
            .map(drop)
            .map_err(failed("create"))
    })?
}

pub(super) fn destroy(netns: &Netns, name: &str) -> Result<(), IpSetError> {
    within(netns, || {
        session(name).destroy().map(drop).map_err(failed("destroy"))
    })?
}

/// Adds (`true`) and removes (`false`) addresses, in one session; the index of the one that failed.
pub(super) fn change_members(
    netns: &Netns,
    changes: &[(Ipv4Addr, bool)],
) -> Result<(), (usize, IpSetError)> {
    let changed = within(netns, || {
        let mut session = session(SET);
        for (index, (ip, add)) in changes.iter().enumerate() {
            let changed = if *add {
                session.add(IpAddr::V4(*ip), &[])
            } else {
                session.del(IpAddr::V4(*ip))
            };
            changed.map_err(|error| (index, member_error(*ip, *add, &error)))?;
        }
        Ok(())
    });
    changed.map_err(|error| (0, error))?
}

fn member_error(ip: Ipv4Addr, add: bool, error: &ipset::types::Error) -> IpSetError {
    let message = error.to_string();
    if message.contains("full") {
        return IpSetError::Full(ip);
    }
    IpSetError::Library {
        action: if add { "add to" } else { "remove from" },
        message,
    }
}
