//! The node's own AmbientNode, as the API server tells it. While the API server is away, what it told
//! last counts.

use std::sync::Arc;
use std::time::Duration;

use backon::ExponentialBuilder;
use crds::AmbientNode;
use futures::{StreamExt, TryStreamExt};
use kube::runtime::utils::{Backoff, ResetTimerBackoff};
use kube::runtime::watcher::ExponentialBackoff;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, ResourceExt};
use tokio::sync::watch;

use crate::failure::root;

/// What is known about the AmbientNode.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) enum Known {
    /// Nothing: the API server has not answered yet.
    #[default]
    Unread,
    /// The API server says that there is none.
    Absent,
    /// This.
    Present(Arc<AmbientNode>),
}

impl Known {
    /// The object, if there is one.
    pub(crate) fn present(&self) -> Option<&Arc<AmbientNode>> {
        match self {
            Self::Present(object) => Some(object),
            Self::Unread | Self::Absent => None,
        }
    }
}

/// Waits between attempts, short enough that a node does not lag behind after the API server's return.
fn backoff() -> impl Backoff {
    let growing = ExponentialBuilder::new()
        .with_min_delay(Duration::from_millis(500))
        .with_max_delay(Duration::from_secs(10))
        .with_jitter()
        .without_max_times();
    // A list that begins and fails again is no success.
    ResetTimerBackoff::new(ExponentialBackoff::from(growing), Duration::from_mins(1))
}

/// Watches for ever.
pub(crate) async fn watch(client: Client, node: String, known: watch::Sender<Known>) {
    let only_this = watcher::Config::default().fields(&format!("metadata.name={node}"));
    let mut changes = watcher(Api::<AmbientNode>::all(client), only_this)
        .backoff(backoff())
        .boxed();
    // What a list has brought so far; it counts when the list is complete.
    let mut listed = Known::Absent;
    let mut seen = false;
    loop {
        let change = changes.try_next().await;
        if let (Err(error), false) = (&change, seen) {
            let says = unseen(error);
            known.send_if_modified(|known| std::mem::replace(known, says.clone()) != says);
        }
        match change {
            Ok(Some(watcher::Event::Init)) => listed = Known::Absent,
            Ok(Some(watcher::Event::InitApply(object))) => listed = present(object),
            Ok(Some(watcher::Event::InitDone)) => {
                if listed == Known::Absent {
                    tracing::warn!(
                        node,
                        "there is no AmbientNode of this node; the controller makes one"
                    );
                }
                seen |= listed.present().is_some();
                known.send_replace(std::mem::take(&mut listed));
            }
            Ok(Some(watcher::Event::Apply(object))) => {
                seen = true;
                known.send_replace(present(object));
            }
            Ok(Some(watcher::Event::Delete(object))) => {
                tracing::warn!(node = object.name_any(), "the AmbientNode is deleted");
                known.send_replace(Known::Absent);
            }
            Ok(None) => return,
            Err(error) => tracing::warn!(
                "watch AmbientNode {node}: {} (needs list and watch on ambientnodes.ambit.mesh; config/rbac gives them)",
                root(&error)
            ),
        }
    }
}

/// What an error says of an object that this agent has never seen. Of a kind that the API server does not
/// know there are none; any other error says nothing, whatever an answer before it said.
fn unseen(error: &watcher::Error) -> Known {
    use watcher::Error::{InitialListFailed, WatchStartFailed};
    match error {
        InitialListFailed(kube::Error::Api(status))
        | WatchStartFailed(kube::Error::Api(status))
            if status.is_not_found() =>
        {
            Known::Absent
        }
        _ => Known::Unread,
    }
}

fn present(object: AmbientNode) -> Known {
    Known::Present(Arc::new(object))
}

#[cfg(test)]
mod tests {
    use kube::core::Status;

    use super::*;

    #[test]
    fn only_an_api_server_that_answers_can_say_that_there_is_none() {
        let failed = |reason, code| {
            let status = Status::failure("no", reason).with_code(code);
            watcher::Error::InitialListFailed(kube::Error::Api(Box::new(status)))
        };
        assert_eq!(unseen(&failed("NotFound", 404)), Known::Absent);
        assert_eq!(unseen(&failed("ServiceUnavailable", 503)), Known::Unread);
        assert_eq!(unseen(&failed("Forbidden", 403)), Known::Unread);
        assert_eq!(unseen(&watcher::Error::NoResourceVersion), Known::Unread);
    }
}
