//! The host's end of a container's device.

use std::fs::File;
use std::io;

use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use nix::sched::{CloneFlags, setns};

use crate::netlink::{Netlink, NetlinkError};

/// The host's side of a pod's device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HostEnd {
    /// Its index.
    pub(crate) index: u32,
    /// Device that the pod's packets come in by for whoever routes them: itself, or the bridge it is a
    /// port of.
    pub(crate) way_in: String,
}

/// A device without an end on this host.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DeviceError {
    #[error("enter the network namespace {0}")]
    Enter(String, #[source] io::Error),
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    #[error(
        "{0} is no end of a veth pair whose other end is on this host: the mesh cannot carry such a pod; \
         keep its namespace out of the mesh, or give it a network whose CNI plugin makes veth pairs"
    )]
    NotVeth(String),
}

/// Finds it: the two ends name each other by index.
pub(crate) fn host_end(netns: &str, interface: &str) -> Result<HostEnd, DeviceError> {
    let inside = inside(netns, || Netlink::open()?.link(interface))??;
    let no_pair = || DeviceError::NotVeth(interface.to_owned());
    let peer = other_end(&inside).ok_or_else(no_pair)?;
    let host = Netlink::open()?;
    let outside = host.link_at(peer)?;
    if other_end(&outside) != Some(inside.header.index) {
        return Err(no_pair());
    }
    let way_in = match controller(&outside) {
        Some(bridge) => host.link_at(bridge)?,
        None => outside.clone(),
    };
    Ok(HostEnd {
        index: outside.header.index,
        way_in: name(&way_in).ok_or_else(no_pair)?,
    })
}

/// Runs `work` in a network namespace, on a thread that ends there.
fn inside<T: Send>(netns: &str, work: impl FnOnce() -> T + Send) -> Result<T, DeviceError> {
    let failed = |error| DeviceError::Enter(netns.to_owned(), error);
    let file = File::open(netns).map_err(failed)?;
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| -> io::Result<T> {
            setns(&file, CloneFlags::CLONE_NEWNET)?;
            Ok(work())
        });
        let died = |_| io::Error::other("the thread in the namespace died");
        thread.join().map_err(died).flatten().map_err(failed)
    })
}

/// Index of a veth's other end.
fn other_end(link: &LinkMessage) -> Option<u32> {
    let is_veth = |attribute: &LinkAttribute| {
        matches!(attribute, LinkAttribute::LinkInfo(infos)
            if infos.contains(&LinkInfo::Kind(InfoKind::Veth)))
    };
    if !link.attributes.iter().any(is_veth) {
        return None;
    }
    link.attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::Link(index) => Some(*index),
            _ => None,
        })
}

fn controller(link: &LinkMessage) -> Option<u32> {
    link.attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::Controller(index) => Some(*index),
            _ => None,
        })
}

fn name(link: &LinkMessage) -> Option<String> {
    link.attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::IfName(name) => Some(name.clone()),
            _ => None,
        })
}
