//! The one task that owns the state: takes in changes, derives what they touch, publishes.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};

use crate::directory::{Directory, Facts};
use crate::dirty_nodes::DirtyNodes;
use crate::snapshot::{Change, ClusterSnapshot, Touched, Update};

/// How many changes are taken in before one publication.
const BATCH: usize = 1024;

/// Least time between two publications.
const PACE: Duration = Duration::from_millis(20);
/// More of it for each task that a publication wakes: what clients are told at once costs less than what they are told one
/// by one.
const PACE_OF_CLIENT: Duration = Duration::from_micros(200);
/// Most time between two publications: a pod that joins waits for it.
const SLOWEST_PACE: Duration = Duration::from_millis(300);

/// Everything that is known, at one moment. A clone shares it all.
#[derive(Clone, Debug, Default)]
pub(crate) struct Model {
    pub(crate) snapshot: ClusterSnapshot,
    pub(crate) directory: Directory,
}

/// The newest model, or `None` until every kind of object has been listed once.
pub(crate) type Published = watch::Receiver<Option<Arc<Model>>>;

/// Runs until all watches have ended.
pub(crate) async fn run(
    facts: Facts,
    mut updates: mpsc::Receiver<Update>,
    published: watch::Sender<Option<Arc<Model>>>,
    dirty: Arc<DirtyNodes>,
) {
    let mut model = Model::default();
    let mut listed = Listed::default();
    let mut touched = Touched::default();
    let mut batch = Vec::with_capacity(BATCH);
    while updates.recv_many(&mut batch, BATCH).await > 0 {
        for update in batch.drain(..) {
            listed.note(&update);
            model.snapshot.apply(update, &mut touched);
        }
        if !listed.all() || (touched.is_empty() && published.borrow().is_some()) {
            continue;
        }
        let touched = std::mem::take(&mut touched);
        model.directory.update(&facts, &model.snapshot, &touched);
        if published.borrow().is_none() {
            tracing::info!(
                nodes = model.snapshot.nodes().count(),
                resources = model.directory.len(),
                "every kind of object has been listed"
            );
        }
        published.send_replace(Some(Arc::new(model.clone())));
        dirty.insert(touched.nodes);
        tokio::time::sleep(pace(published.receiver_count())).await;
    }
}

/// Time between two publications to so many.
fn pace(clients: usize) -> Duration {
    let clients = u32::try_from(clients).unwrap_or(u32::MAX);
    let of_clients = PACE_OF_CLIENT.saturating_mul(clients);
    of_clients.clamp(PACE, SLOWEST_PACE)
}

/// Which kinds have been listed once. Before that an absent object means nothing.
#[derive(Debug, Default)]
struct Listed {
    nodes: bool,
    namespaces: bool,
    pods: bool,
    services: bool,
    slices: bool,
    written: bool,
}

impl Listed {
    fn note(&mut self, update: &Update) {
        match update {
            Update::Node(Change::Replace(_)) => self.nodes = true,
            Update::Namespace(Change::Replace(_)) => self.namespaces = true,
            Update::Pod(Change::Replace(_)) => self.pods = true,
            Update::Service(Change::Replace(_)) => self.services = true,
            Update::Slice(Change::Replace(_)) => self.slices = true,
            Update::Written(Change::Replace(_)) => self.written = true,
            _ => {}
        }
    }

    fn all(&self) -> bool {
        let Self {
            nodes,
            namespaces,
            pods,
            services,
            slices,
            written,
        } = self;
        *nodes && *namespaces && *pods && *services && *slices && *written
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{base, facts, n, pod, set_pod};

    #[tokio::test]
    async fn nothing_is_published_before_every_kind_has_been_listed() {
        let (updates, received) = mpsc::channel(64);
        let (publish, mut published) = watch::channel(None);
        let dirty = Arc::new(DirtyNodes::default());
        tokio::spawn(run(facts(), received, publish, dirty.clone()));
        for update in base().into_iter().chain([set_pod(pod("a", "10.0.0.1"))]) {
            updates.send(update).await.unwrap();
        }
        let lists = crate::testing::Cluster::with([set_pod(pod("b", "10.0.0.2"))])
            .snapshot
            .lists();
        for list in lists {
            assert!(published.borrow().is_none());
            updates.send(list).await.unwrap();
        }
        updates
            .send(Update::Written(Change::Replace(Vec::new())))
            .await
            .unwrap();
        let model = published.wait_for(Option::is_some).await.unwrap().clone();
        let names: Vec<_> = model
            .unwrap()
            .snapshot
            .pods_on(&n("n1"))
            .map(|pod| pod.uid.clone())
            .collect();
        assert_eq!(names, ["uid-b".into()]);
        let (first, second) = (dirty.take().await, dirty.take().await);
        assert_eq!([&first.node, &second.node], [&n("n1"), &n("n2")]);
    }

    #[test]
    fn the_more_clients_the_rarer_a_publication() {
        let ms = |clients| pace(clients).as_millis();
        assert_eq!(
            [0, 100, 1000, 1500, usize::MAX].map(ms),
            [20, 20, 200, 300, 300]
        );
    }
}
