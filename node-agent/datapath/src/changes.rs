//! The kernel's own word that something changed: devices, addresses, routes, rules.

use std::io;

use futures::StreamExt;
use rtnetlink::MulticastGroup;
use tokio::sync::mpsc;

use crate::netns::Netns;

/// Wakes the receiver whenever one namespace changes. Many changes may be one wake-up.
#[derive(Debug)]
pub struct Changes {
    task: tokio::task::JoinHandle<()>,
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
        Ok(Self { task })
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
    }
}
