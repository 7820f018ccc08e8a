//! Step 1: one watch for each kind of object; each object becomes a plain copy and is forgotten.
//!
//! The snapshot is the only cache: whole objects are many times larger than what matters of them.

use std::time::Duration;

use backon::ExponentialBuilder;
use crds::AmbientNode;
use futures::{Stream, StreamExt};
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::core::PartialObjectMeta;
use kube::runtime::WatchStreamExt;
use kube::runtime::utils::{Backoff, ResetTimerBackoff};
use kube::runtime::watcher::{Config, Error, Event, ExponentialBackoff, watcher};
use kube::{Api, Client};
use tokio::sync::mpsc;

use crate::problems::Problems;
use crate::snapshot::objects::{self, WrittenNode};
use crate::snapshot::{Change, Update, services};

/// Watches one kind until the receiver is gone.
pub(crate) type Watch = std::pin::Pin<Box<dyn Future<Output = ()> + Send>>;

/// One future for each kind; all must be polled.
pub(crate) fn watches(
    client: &Client,
    enrolment_label: &str,
    problems: &Problems,
    updates: &mpsc::Sender<Update>,
) -> Vec<Watch> {
    let to = |part| Sink {
        part,
        problems: problems.clone(),
        updates: updates.clone(),
    };
    let all = Config::default;
    let label = enrolment_label.to_owned();
    let label_of_pods = label.clone();
    vec![
        Box::pin(to("watch nodes").copy(
            watcher(Api::<Node>::all(client.clone()), all()),
            |node| objects::Node::parse(&node),
            |node| node.name.clone(),
            Update::Node,
        )),
        Box::pin(to("watch namespaces").copy(
            watcher(
                Api::<PartialObjectMeta<Namespace>>::all(client.clone()),
                all(),
            ),
            move |namespace| objects::Namespace::parse(&namespace.metadata, &label),
            |namespace| namespace.name.clone(),
            Update::Namespace,
        )),
        Box::pin(to("watch pods").copy(
            watcher(Api::<Pod>::all(client.clone()), all()),
            move |pod| objects::Pod::parse(&pod, &label_of_pods),
            |pod| pod.uid.clone(),
            Update::Pod,
        )),
        Box::pin(to("watch services").copy(
            watcher(Api::<Service>::all(client.clone()), all()),
            |service| services::Service::parse(&service),
            |service| service.key.clone(),
            Update::Service,
        )),
        Box::pin(to("watch endpointslices").copy(
            watcher(Api::<EndpointSlice>::all(client.clone()), all()),
            |slice| services::EndpointSlice::parse(&slice),
            |slice| slice.key.clone(),
            Update::Slice,
        )),
        Box::pin(to("watch ambientnodes").copy(
            watcher(Api::<AmbientNode>::all(client.clone()), all()),
            |node| WrittenNode::parse(&node),
            |written| written.name.clone(),
            Update::Written,
        )),
    ]
}

/// Waits between attempts: what happened while the API server was away is known a few seconds after its return.
pub(crate) fn backoff() -> impl Backoff {
    let growing = ExponentialBuilder::new()
        .with_min_delay(Duration::from_millis(500))
        .with_max_delay(Duration::from_secs(5))
        .with_jitter()
        .without_max_times();
    // A list that begins and fails again is no success.
    ResetTimerBackoff::new(ExponentialBackoff::from(growing), Duration::from_mins(1))
}

/// Where the copies and the problems of one watch go.
struct Sink {
    part: &'static str,
    problems: Problems,
    updates: mpsc::Sender<Update>,
}

impl Sink {
    async fn copy<K, T, N>(
        self,
        events: impl Stream<Item = Result<Event<K>, Error>> + Send,
        parse: impl Fn(K) -> Option<T>,
        key: impl Fn(&T) -> N,
        wrap: impl Fn(Change<N, T>) -> Update,
    ) {
        let mut events = std::pin::pin!(events.backoff(backoff()));
        let mut listed = Vec::new();
        while let Some(event) = events.next().await {
            let change = match event {
                Ok(event) => {
                    // A list that begins has not succeeded yet.
                    if !matches!(event, Event::Init) {
                        self.problems.clear(self.part);
                    }
                    next_change(event, &mut listed, &parse, &key)
                }
                Err(error) => {
                    self.problems.report_watch(self.part, &error);
                    None
                }
            };
            if let Some(change) = change
                && self.updates.send(wrap(change)).await.is_err()
            {
                return;
            }
        }
    }
}

/// Objects of a new list are gathered until it is complete: before that nothing can be called gone.
fn next_change<K, T, N>(
    event: Event<K>,
    listed: &mut Vec<T>,
    parse: &impl Fn(K) -> Option<T>,
    key: &impl Fn(&T) -> N,
) -> Option<Change<N, T>> {
    match event {
        Event::Init => {
            listed.clear();
            None
        }
        Event::InitApply(object) => {
            listed.extend(parse(object));
            None
        }
        Event::InitDone => Some(Change::Replace(std::mem::take(listed))),
        Event::Apply(object) => parse(object).map(Change::Set),
        Event::Delete(object) => parse(object).map(|object| Change::Remove(key(&object))),
    }
}
