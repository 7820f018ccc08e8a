//! Which replica writes: whoever holds the Lease.
//!
//! Another's lease counts as lapsed when it has not changed for its duration by our own clock, so
//! that clocks need not agree. A holder that cannot renew stops in good time before that.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use rand::Rng;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::metrics::Metrics;
use crate::problems::{Problems, explain};

const PART: &str = "lease";

/// Name of the Lease.
const LEASE: &str = "ambit-controller";
/// How long a lease holds after its last renewal.
const DURATION: Duration = Duration::from_secs(15);
/// A holder that has not renewed for so long stops writing.
const RENEW_DEADLINE: Duration = Duration::from_secs(10);
/// Between two looks at the lease.
const PERIOD: Duration = Duration::from_secs(2);
/// No request may outlast the time in which it would matter.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(3);

/// Takes part in the election.
pub(crate) struct Elector {
    api: Api<Lease>,
    /// This replica.
    identity: String,
    leading: watch::Sender<bool>,
    problems: Problems,
    metrics: Metrics,
    observed: Option<Observed>,
    renewed: Option<Instant>,
}

/// Another's lease, and when it was first seen like this.
#[derive(Clone, Debug, PartialEq)]
struct Observed {
    spec: LeaseSpec,
    since: Instant,
}

/// What to do with the lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Move {
    /// It is ours.
    Renew,
    /// It is nobody's, or its holder is silent.
    TakeOver,
    /// It is another's.
    Wait,
}

impl Elector {
    pub(crate) fn new(
        client: Client,
        (namespace, identity): (&str, &str),
        leading: watch::Sender<bool>,
        problems: Problems,
        metrics: Metrics,
    ) -> Self {
        Self {
            api: Api::namespaced(client, namespace),
            identity: identity.to_owned(),
            leading,
            problems,
            metrics,
            observed: None,
            renewed: None,
        }
    }

    /// Runs until `stop`, then gives the lease back so that another need not wait for its end.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        loop {
            self.round().await;
            let pause = jittered(PERIOD, rand::rng().random());
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = stop.cancelled() => break,
            }
        }
        if self.step_down("the program ends") {
            self.release().await;
        }
    }

    async fn round(&mut self) {
        let asked = Instant::now();
        let result = tokio::time::timeout(REQUEST_TIMEOUT, self.try_round()).await;
        match result {
            Ok(Ok(true)) => {
                // From before the request: the lease cannot have begun later than its answer.
                self.renewed = Some(asked);
                self.problems.clear(PART);
                self.lead();
            }
            Ok(Ok(false)) => {
                self.problems.clear(PART);
                self.step_down("another replica holds the lease");
            }
            Ok(Err(error)) => self.problems.report(PART, explain(&error)),
            Err(_) => self
                .problems
                .report(PART, "the API server did not answer in time".to_owned()),
        }
        let overdue = self
            .renewed
            .is_none_or(|renewed| renewed.elapsed() > RENEW_DEADLINE);
        if overdue {
            self.step_down("the lease could not be renewed in time");
        }
    }

    /// Whether the lease is ours now.
    async fn try_round(&mut self) -> Result<bool, kube::Error> {
        let Some(lease) = self.api.get_opt(LEASE).await? else {
            let lease = self.next_lease(None);
            return won(self.api.create(&PostParams::default(), &lease).await);
        };
        match self.next_move(&lease) {
            Move::Wait => Ok(false),
            Move::Renew | Move::TakeOver => {
                let lease = self.next_lease(Some(lease));
                let params = PostParams::default();
                won(self.api.replace(LEASE, &params, &lease).await)
            }
        }
    }

    fn next_move(&mut self, lease: &Lease) -> Move {
        let spec = lease.spec.clone().unwrap_or_default();
        let now = Instant::now();
        let observed = match self.observed.take() {
            Some(observed) if observed.spec == spec => observed,
            _ => Observed { spec, since: now },
        };
        let decision = decide(&observed, &self.identity, now);
        self.observed = Some(observed);
        decision
    }

    /// Carries the resource version of the one it follows, so that only one of two can win.
    fn next_lease(&self, current: Option<Lease>) -> Lease {
        let now = MicroTime(Timestamp::now());
        let metadata = current.as_ref().map_or_else(
            || ObjectMeta {
                name: Some(LEASE.to_owned()),
                ..ObjectMeta::default()
            },
            |lease| lease.metadata.clone(),
        );
        let spec = current.and_then(|lease| lease.spec).unwrap_or_default();
        let ours = spec.holder_identity.as_deref() == Some(self.identity.as_str());
        Lease {
            metadata,
            spec: Some(LeaseSpec {
                holder_identity: Some(self.identity.clone()),
                lease_duration_seconds: i32::try_from(DURATION.as_secs()).ok(),
                acquire_time: if ours {
                    spec.acquire_time
                } else {
                    Some(now.clone())
                },
                renew_time: Some(now),
                lease_transitions: if ours {
                    spec.lease_transitions
                } else {
                    Some(spec.lease_transitions.unwrap_or(0).saturating_add(1))
                },
                ..spec
            }),
        }
    }

    fn lead(&self) {
        if self.set_leading(true) {
            tracing::info!(identity = self.identity, "this replica leads");
        }
        self.metrics.leader.set(1);
    }

    /// Whether it led until now.
    fn step_down(&self, why: &str) -> bool {
        let led = self.set_leading(false);
        if led {
            tracing::info!(identity = self.identity, why, "this replica leads no more");
        }
        self.metrics.leader.set(0);
        led
    }

    /// Whether that is a change.
    fn set_leading(&self, leading: bool) -> bool {
        self.leading
            .send_if_modified(|now| std::mem::replace(now, leading) != leading)
    }

    async fn release(&self) {
        let result = tokio::time::timeout(REQUEST_TIMEOUT, async {
            let Some(mut lease) = self.api.get_opt(LEASE).await? else {
                return Ok(());
            };
            let spec = lease.spec.get_or_insert_default();
            if spec.holder_identity.as_deref() != Some(self.identity.as_str()) {
                return Ok(());
            }
            spec.holder_identity = None;
            self.api
                .replace(LEASE, &PostParams::default(), &lease)
                .await
                .map(|_| ())
        });
        match result.await {
            Ok(Ok(())) => tracing::info!("gave the lease back"),
            Ok(Err(error)) => tracing::warn!("the lease was not given back: {}", explain(&error)),
            Err(_) => tracing::warn!("the lease was not given back: no answer in time"),
        }
    }
}

/// Losing a race is no error.
fn won(result: Result<Lease, kube::Error>) -> Result<bool, kube::Error> {
    match result {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(status)) if status.is_conflict() || status.is_already_exists() => {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

fn decide(observed: &Observed, identity: &str, now: Instant) -> Move {
    let spec = &observed.spec;
    let Some(holder) = spec.holder_identity.as_deref().filter(|id| !id.is_empty()) else {
        return Move::TakeOver;
    };
    if holder == identity {
        return Move::Renew;
    }
    let seconds = spec
        .lease_duration_seconds
        .and_then(|seconds| u64::try_from(seconds).ok());
    let duration = seconds.map_or(DURATION, Duration::from_secs);
    if now.duration_since(observed.since) > duration {
        Move::TakeOver
    } else {
        Move::Wait
    }
}

/// Up to a fifth longer, so that replicas do not keep in step; `random` is between 0 and 1.
fn jittered(period: Duration, random: f64) -> Duration {
    period.mul_f64(1.0 + 0.2 * random)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn observed(holder: &str, since: Instant) -> Observed {
        Observed {
            spec: LeaseSpec {
                holder_identity: Some(holder.to_owned()),
                lease_duration_seconds: Some(15),
                ..LeaseSpec::default()
            },
            since,
        }
    }

    #[test]
    fn a_lease_of_our_own_is_renewed() {
        let now = Instant::now();
        assert_eq!(decide(&observed("a", now), "a", now), Move::Renew);
    }

    #[test]
    fn a_lease_given_back_is_taken_at_once() {
        let now = Instant::now();
        assert_eq!(decide(&observed("", now), "a", now), Move::TakeOver);
    }

    #[test]
    fn anothers_lease_is_taken_only_after_it_was_silent_for_its_duration() {
        let since = Instant::now();
        let lease = observed("b", since);
        let after = |seconds| since + Duration::from_secs(seconds);
        assert_eq!(decide(&lease, "a", after(15)), Move::Wait);
        assert_eq!(decide(&lease, "a", after(16)), Move::TakeOver);
    }

    #[test]
    fn a_holder_gives_up_before_another_may_take_over() {
        let longest_round = jittered(PERIOD, 1.0) + REQUEST_TIMEOUT;
        assert!(RENEW_DEADLINE < DURATION);
        assert!(longest_round * 2 < DURATION);
    }
}
