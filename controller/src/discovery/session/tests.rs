//! Many clients at once, and clients that do not behave.

use std::time::Instant;

use protocol::ADDRESS_TYPE;
use protocol::discovery::Resource;
use tokio::sync::watch;
use tokio_stream::wrappers::ReceiverStream;

use super::*;
use crate::model::Model;
use crate::testing::{Cluster, pod, set_pod};

/// Instead of seconds.
const SHORT: Duration = Duration::from_millis(500);

/// More than what waits for a client that takes nothing.
const PODS: usize = 4000;

type Publish = watch::Sender<Option<Arc<Model>>>;

/// A controller that many are told much by, one at a time.
struct Bed {
    cluster: Cluster,
    publish: Publish,
    turns: Turns,
}

/// The other end of a session.
struct Peer {
    requests: mpsc::Sender<Result<DeltaDiscoveryRequest, Status>>,
    responses: mpsc::Receiver<Result<DeltaDiscoveryResponse, Status>>,
}

impl Bed {
    fn new() -> Self {
        let pods = (0..PODS).map(|i| pod_of(i, true));
        let cluster = Cluster::with(pods);
        let publish = watch::Sender::new(Some(Arc::new(model(&cluster))));
        Self {
            cluster,
            publish,
            turns: Turns {
                free: Arc::new(Semaphore::new(1)),
                asks_within: SHORT,
                takes_within: SHORT,
            },
        }
    }

    /// Somebody connects.
    fn connects(&self) -> Peer {
        let (requests, received) = mpsc::channel(8);
        let (sender, responses) = mpsc::channel(2);
        let caller = Caller {
            pod_name: "proxy".to_owned(),
            pod_uid: "uid".into(),
            node: "n1".into(),
        };
        let session = Session::new(
            caller,
            self.publish.subscribe(),
            sender,
            self.turns.clone(),
            Metrics::default(),
        );
        tokio::spawn(session.run(ReceiverStream::new(received), CancellationToken::new()));
        Peer {
            requests,
            responses,
        }
    }

    /// Somebody connects and asks for everything.
    async fn joins(&self) -> Peer {
        let peer = self.connects();
        peer.ask().await;
        peer
    }
}

impl Peer {
    async fn ask(&self) {
        let request = DeltaDiscoveryRequest {
            type_url: ADDRESS_TYPE.to_owned(),
            ..DeltaDiscoveryRequest::default()
        };
        self.requests.send(Ok(request)).await.unwrap();
    }

    /// Takes so many resources, in the order in which they come.
    async fn take(&mut self, count: usize) -> Vec<Resource> {
        let mut taken = Vec::new();
        while taken.len() < count {
            let response = self.responses.recv().await.unwrap().unwrap();
            taken.extend(response.resources);
        }
        taken
    }
}

fn pod_of(i: usize, ready: bool) -> crate::snapshot::Update {
    let ip = format!("10.1.{}.{}", i / 250, i % 250);
    let mut pod = pod(&format!("p{i}"), &ip);
    pod.ready = ready;
    set_pod(pod)
}

fn model(cluster: &Cluster) -> Model {
    Model {
        directory: cluster.directory.clone(),
        ..Model::default()
    }
}

#[tokio::test]
async fn everybody_that_joins_at_once_is_told_everything_in_turn() {
    let bed = Bed::new();
    let mut peers = Vec::new();
    for _ in 0..20 {
        peers.push(bed.joins().await);
    }
    for peer in &mut peers {
        assert_eq!(peer.take(PODS).await.len(), PODS);
    }
}

#[tokio::test]
async fn who_asks_nothing_gives_way_and_is_served_later() {
    let bed = Bed::new();
    let mut silent = bed.connects();
    tokio::task::yield_now().await;
    let mut other = bed.joins().await;
    let started = Instant::now();
    other.take(PODS).await;
    assert!(started.elapsed() >= SHORT);
    silent.ask().await;
    silent.take(PODS).await;
}

#[tokio::test]
async fn who_takes_nothing_in_its_turn_has_to_come_again() {
    let bed = Bed::new();
    let mut stuck = bed.joins().await;
    tokio::task::yield_now().await;
    let mut other = bed.joins().await;
    let started = Instant::now();
    other.take(PODS).await;
    assert!(started.elapsed() >= SHORT);
    let mut left = 0;
    while let Some(response) = stuck.responses.recv().await {
        left += response.unwrap().resources.len();
    }
    assert!(0 < left && left < PODS, "{left}");
}

#[tokio::test]
async fn who_reads_slowly_without_a_turn_holds_up_nobody() {
    let mut bed = Bed::new();
    let mut slow = bed.joins().await;
    slow.take(PODS).await;
    let mut other = bed.joins().await;
    other.take(PODS).await;
    // A few changes at a time, and nobody takes them here.
    for i in 0..8 {
        bed.cluster.apply(pod_of(i, false));
        bed.publish
            .send_replace(Some(Arc::new(model(&bed.cluster))));
        assert_eq!(other.take(1).await[0].name, format!("uid-p{i}"));
    }
    tokio::time::sleep(2 * SHORT).await;
    let mut names: Vec<String> = slow.take(8).await.into_iter().map(|one| one.name).collect();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), 8, "the slow one is told all of it in the end");
}

#[tokio::test]
async fn much_that_changes_at_once_is_told_in_turn() {
    let mut bed = Bed::new();
    let mut peers = Vec::new();
    for _ in 0..4 {
        let mut peer = bed.joins().await;
        peer.take(PODS).await;
        peers.push(peer);
    }
    for i in 0..PODS {
        bed.cluster.apply(pod_of(i, false));
    }
    bed.publish
        .send_replace(Some(Arc::new(model(&bed.cluster))));
    // Whoever has its turn first.
    let taken = futures::future::join_all(peers.iter_mut().map(|peer| peer.take(PODS))).await;
    for resources in taken {
        assert_eq!(resources.len(), PODS);
    }
}
