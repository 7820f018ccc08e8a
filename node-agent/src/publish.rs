//! Writes the status when something but a time in it changed, and tells the news as Events.

use std::time::Duration;

use crds::{AGENT_MANAGER, AmbientNode, AmbientNodeStatus};
use jiff::Timestamp;
use kube::api::{Patch, PatchParams};
use kube::core::{ObjectMeta, TypeMeta};
use kube::runtime::events::{Recorder, Reporter};
use kube::{Api, Client};
use serde::Serialize;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::events::{self, News};
use crate::failure::{Complaint, root};
use crate::report::{Outcome, report, same};
use crate::start::ready_boot;
use crate::watch::Known;

/// Time from a write that failed to the next; doubled with each failure up to [`LAST_RETRY`].
const FIRST_RETRY: Duration = Duration::from_secs(1);

/// The longest time between two tries.
const LAST_RETRY: Duration = Duration::from_secs(30);

/// How often the status of a node that has not been ready since its boot is looked at: with time it
/// counts as ready though nothing else changes.
const WHILE_STARTING: Duration = Duration::from_secs(10);

/// The longest that the API server may take for an answer: a connection that dies without a word would hold the
/// status back for a quarter of an hour.
const ANSWERED_WITHIN: Duration = Duration::from_secs(15);

/// The part of an AmbientNode that the agent owns.
#[derive(Debug, Serialize)]
struct OwnPart<'a> {
    #[serde(flatten)]
    types: TypeMeta,
    metadata: ObjectMeta,
    status: &'a AmbientNodeStatus,
}

/// What was written last, and into which object.
struct Written {
    uid: Option<String>,
    status: AmbientNodeStatus,
}

/// Publishes for ever.
pub(crate) async fn publish(
    client: Client,
    node: String,
    mut known: watch::Receiver<Known>,
    mut outcomes: watch::Receiver<Option<Outcome>>,
) {
    let reporter = Reporter {
        controller: AGENT_MANAGER.to_owned(),
        instance: Some(node),
    };
    let recorder = Recorder::new(client.clone(), reporter);
    let objects: Api<AmbientNode> = Api::all(client);
    let mut written: Option<Written> = None;
    let mut rejection: Option<Complaint> = None;
    let mut retry: Option<Duration> = None;
    let mut starting = false;
    let began = Timestamp::now();
    loop {
        tokio::select! {
            changed = outcomes.changed() => if changed.is_err() { return },
            changed = known.changed() => if changed.is_err() { return },
            () = sleep(retry.or(starting.then_some(WHILE_STARTING))) => {}
        }
        let outcome = outcomes.borrow_and_update().clone();
        let object = known.borrow_and_update().present().cloned();
        let (Some(outcome), Some(object)) = (outcome, object) else {
            continue;
        };
        let observed = object.status.clone().unwrap_or_default();
        let before = match &written {
            Some(written) if written.uid == object.metadata.uid => written.status.clone(),
            _ => observed.clone(),
        };
        let now = Timestamp::now();
        let mut status = report(&outcome, &before.conditions, now);
        let boot = outcome.facts.as_ref().map(|facts| facts.boot.as_str());
        status.ready_boot_id = boot.map_or_else(
            || before.ready_boot_id.clone(),
            |boot| {
                let before = before.ready_boot_id.as_deref();
                ready_boot(boot, before, &status.conditions, (began, now))
            },
        );
        let is_written = same(&status, &before) && same(&status, &observed);
        if !is_written && let Err(error) = write(&objects, &object, &status).await {
            tracing::warn!(
                "write the AmbientNode's status: {} (needs patch on ambientnodes/status.ambit.mesh)",
                root(&error)
            );
            retry = Some(retry.map_or(FIRST_RETRY, |last| (last * 2).min(LAST_RETRY)));
            continue;
        }
        retry = None;
        starting = boot.is_some() && status.ready_boot_id.as_deref() != boot;
        let mut news = events::between(&before.conditions, &status.conditions);
        if outcome.rejection.is_some() && outcome.rejection != rejection {
            news.extend(rejected(&outcome));
        }
        rejection = outcome.rejection;
        written = Some(Written {
            uid: object.metadata.uid.clone(),
            status,
        });
        for news in news {
            let told = events::publish(&recorder, &object, news);
            if timeout(ANSWERED_WITHIN, told).await.is_err() {
                tracing::warn!("tell an event: the API server does not answer");
            }
        }
    }
}

async fn sleep(time: Option<Duration>) {
    match time {
        Some(time) => tokio::time::sleep(time).await,
        None => std::future::pending().await,
    }
}

async fn write(
    objects: &Api<AmbientNode>,
    object: &AmbientNode,
    status: &AmbientNodeStatus,
) -> Result<(), kube::Error> {
    let name = object.metadata.name.as_deref().unwrap_or_default();
    let own = OwnPart {
        types: TypeMeta::resource::<AmbientNode>(),
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            ..ObjectMeta::default()
        },
        status,
    };
    let parameters = PatchParams::apply(AGENT_MANAGER).force();
    let patch = Patch::Apply(&own);
    let answer = objects.patch_status(name, &parameters, &patch);
    timeout(ANSWERED_WITHIN, answer)
        .await
        .unwrap_or_else(|late| Err(kube::Error::Service(late.into())))
        .map(drop)
}

/// A peer that was turned away while a proxy is attached has no condition of its own.
fn rejected(outcome: &Outcome) -> Option<News> {
    let attached = !matches!(outcome.proxy, crate::report::ProxyState::Absent);
    let why = outcome.rejection.clone().filter(|_| attached)?;
    Some(News {
        is_warning: true,
        reason: why.reason.to_owned(),
        note: why.message,
    })
}
