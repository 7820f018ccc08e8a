//! Word that something changed: the kernel's own of devices, addresses, routes and rules; of sets, which
//! it gives none of, from a look at them every second.

use std::io;
use std::net::IpAddr;
use std::time::Duration;

use futures::StreamExt;
use rtnetlink::MulticastGroup;
use tokio::sync::mpsc;

use crate::family::Family;
use crate::kernel::netfilter::Netfilter;
use crate::names::Names;
use crate::netns::Netns;

/// Time between two looks at the sets. A pod that somebody takes out of one opens no connection
/// for as long.
const LOOK_AT_SETS: Duration = Duration::from_secs(1);

/// Wakes the receiver whenever one namespace changes. Many changes may be one wake-up.
#[derive(Debug)]
pub struct Changes {
    task: tokio::task::JoinHandle<()>,
    sets: Option<tokio::task::JoinHandle<()>>,
}

impl Changes {
    /// Listens in a namespace; `wake` gets a message when something changed and none is waiting.
    ///
    /// # Errors
    /// If the namespace cannot be entered or netlink refuses.
    pub fn listen(netns: &Netns, wake: mpsc::Sender<()>) -> io::Result<Self> {
        let runtime = tokio::runtime::Handle::current();
        let groups = [
            MulticastGroup::Link,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv4Rule,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv6Route,
            MulticastGroup::Ipv6Rule,
        ];
        let (connection, _handle, mut messages) = netns.run(|| {
            let _entered = runtime.enter();
            rtnetlink::new_multicast_connection(&groups)
        })??;
        let task = tokio::spawn(async move {
            let connection = tokio::spawn(connection);
            while messages.next().await.is_some() {
                // A full channel has a wake-up waiting already.
                if let Err(mpsc::error::TrySendError::Closed(())) = wake.try_send(()) {
                    break;
                }
            }
            connection.abort();
        });
        let sets = None;
        Ok(Self { task, sets })
    }

    /// Listens in the host's namespace, also for changes of the sets of these names.
    ///
    /// # Errors
    /// If the namespace cannot be entered or netlink refuses.
    pub fn listen_with_sets(
        netns: &Netns,
        names: &Names,
        wake: mpsc::Sender<()>,
    ) -> io::Result<Self> {
        let netfilter = Netfilter::open(netns)?;
        let names = Family::ALL.map(|family| names.sets(family).map(|set| set.name));
        let mut changes = Self::listen(netns, wake.clone())?;
        changes.sets = Some(tokio::spawn(look_at(netfilter, names.concat(), wake)));
        Ok(changes)
    }

    /// Whether it still listens. It ends when netlink does, for example because more changes came at
    /// once than its socket could hold.
    #[must_use]
    pub fn is_listening(&self) -> bool {
        !self.task.is_finished()
    }
}

impl Drop for Changes {
    fn drop(&mut self) {
        self.task.abort();
        if let Some(sets) = &self.sets {
            sets.abort();
        }
    }
}

async fn look_at(netfilter: Netfilter, names: Vec<String>, wake: mpsc::Sender<()>) {
    let mut seen: Vec<Option<Vec<IpAddr>>> = vec![None; names.len()];
    let mut ticks = tokio::time::interval(LOOK_AT_SETS);
    loop {
        ticks.tick().await;
        for (name, seen) in names.iter().zip(&mut seen) {
            // What cannot be read is for the next pass to tell.
            let Ok(mut members) = netfilter.members(name) else {
                continue;
            };
            if let Some(members) = &mut members {
                members.sort_unstable();
            }
            if *seen != members {
                *seen = members;
                if let Err(mpsc::error::TrySendError::Closed(())) = wake.try_send(()) {
                    return;
                }
            }
        }
    }
}
