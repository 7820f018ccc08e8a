//! The loop: something happened, or half a minute went by; then one pass.

use std::sync::Arc;
use std::time::Duration;

use datapath::changes::Changes;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};

use crate::failure::{Failure, chain};
use crate::metrics::Metrics;
use crate::pass::Node;
use crate::report::Outcome;
use crate::roster::{Roster, SessionEvent};
use crate::watch::Known;

/// Time between two full passes: what gives no notice (iptables, settings) is mended within it, and so within the 30 s
/// that are promised, however long a pass takes.
const FULL: Duration = Duration::from_secs(20);

/// Changes of the kernel come in swarms; a pass waits for the swarm to pass by.
const SWARM: Duration = Duration::from_millis(30);

/// How long the API server must have said that there is no AmbientNode before what an earlier agent left
/// counts as not wanted. A controller makes a missing one at once.
pub(crate) const ABANDONED_AFTER: Duration = Duration::from_secs(60);

/// How long a removal lets connections go on that pods have opened before they left: most are short.
const PARTING: Duration = Duration::from_secs(1);

/// Time from a pass that failed to the next; doubled with each failure up to [`FULL`].
const FIRST_RETRY: Duration = Duration::from_millis(500);

/// What wakes the loop.
pub(crate) struct Inputs {
    pub(crate) known: watch::Receiver<Known>,
    pub(crate) sessions: mpsc::Receiver<SessionEvent>,
    pub(crate) wakes: mpsc::Receiver<()>,
    /// [`ABANDONED_AFTER`], but for tests.
    pub(crate) abandoned_after: Duration,
    /// Whether a removal is under way, which an agent that is told to end brings to its end.
    pub(crate) removing: watch::Sender<bool>,
}

/// Runs until one of the inputs ends.
pub(crate) async fn run(
    mut node: Node,
    mut inputs: Inputs,
    mut roster: Roster,
    outcomes: watch::Sender<Option<Outcome>>,
    metrics: Arc<Metrics>,
) {
    node.watch_plugin();
    let mut changes: Option<Changes> = None;
    let mut schedule = Schedule::new();
    let mut existed = false;
    let mut absence = Absence::default();
    loop {
        // Netlink drops a listener that cannot follow; the tick makes up for what it missed.
        if changes
            .as_ref()
            .is_none_or(|changes| !changes.is_listening())
        {
            changes = node
                .listen()
                .inspect_err(|error| tracing::warn!("listen for changes of the kernel: {error}"))
                .ok();
        }
        metrics.turns();
        if !wait(&mut inputs, &mut roster, schedule.next).await {
            return;
        }
        let full = schedule.is_full();
        let known = inputs.known.borrow_and_update().clone();
        let timer = metrics.pass();
        if known != Known::Absent || existed {
            absence = Absence::default();
        }
        match known {
            Known::Unread => schedule.done(full),
            Known::Present(object) => {
                existed = true;
                match node.pass(&object, &mut roster, full).await {
                    None => {
                        metrics.waited();
                        schedule.wait(node.grace_left());
                    }
                    Some(outcome) => {
                        schedule.after(full, outcome.failure.is_none());
                        timer.done(&outcome);
                        report(outcome, &outcomes);
                    }
                }
            }
            // Deleted before this agent's eyes.
            Known::Absent if existed => {
                match remove(&mut node, &mut roster, &inputs.removing).await {
                    Ok(()) => {
                        existed = false;
                        outcomes.send_replace(None);
                        schedule.done(full);
                        tracing::info!("the AmbientNode is gone, and the data path with it");
                    }
                    Err(failure) => {
                        tracing::warn!(
                            reason = failure.reason,
                            "remove the data path: {}",
                            failure.message
                        );
                        schedule.after(full, false);
                    }
                }
            }
            Known::Absent if absence.is_due(Instant::now(), inputs.abandoned_after) => {
                match node.sweep().await {
                    Ok(steps) => {
                        absence.over = true;
                        schedule.done(full);
                        tracing::info!(
                            steps,
                            "this node has no AmbientNode: nothing of Ambit is left"
                        );
                    }
                    Err(error) => {
                        tracing::warn!("remove what an earlier agent left: {}", chain(&error));
                        schedule.after(full, false);
                    }
                }
            }
            Known::Absent => {
                schedule.done(full);
                schedule.by(absence.due(inputs.abandoned_after));
            }
        }
        metrics.known(existed);
    }
}

/// Removes the data path in two steps: at first the pods, so that what is open comes to its end.
async fn remove(
    node: &mut Node,
    roster: &mut Roster,
    removing: &watch::Sender<bool>,
) -> Result<(), Failure> {
    removing.send_replace(true);
    match node.let_go(roster).await {
        Ok(true) => tokio::time::sleep(PARTING).await,
        Ok(false) => {}
        // All of it is removed anyway.
        Err(failure) => tracing::warn!(
            reason = failure.reason,
            "let the pods go: {}",
            failure.message
        ),
    }
    let removed = node.remove(roster).await;
    removing.send_replace(false);
    removed
}

/// Waits for something to happen; false when nothing can happen any more.
async fn wait(inputs: &mut Inputs, roster: &mut Roster, next: Instant) -> bool {
    let Inputs {
        known,
        sessions,
        wakes,
        abandoned_after: _,
        removing: _,
    } = inputs;
    tokio::select! {
        changed = known.changed() => if changed.is_err() { return false },
        event = sessions.recv() => match event {
            Some(event) => roster.take(event),
            None => return false,
        },
        _ = wakes.recv() => tokio::time::sleep(SWARM).await,
        () = sleep_until(next) => {}
    }
    while let Ok(event) = sessions.try_recv() {
        roster.take(event);
    }
    while wakes.try_recv().is_ok() {}
    true
}

fn report(outcome: Outcome, outcomes: &watch::Sender<Option<Outcome>>) {
    let last = outcomes
        .borrow()
        .as_ref()
        .and_then(|last| last.failure.clone());
    match &outcome.failure {
        Some(failure) if last.as_ref() != Some(failure) => {
            tracing::warn!(reason = failure.reason, "{}", failure.message);
        }
        None if last.is_some() => tracing::info!("the kernel holds what it should again"),
        _ => {}
    }
    outcomes.send_if_modified(|last| {
        let differs = last.as_ref() != Some(&outcome);
        *last = Some(outcome);
        differs
    });
}

/// Since when the API server has said, without a break, that there is no AmbientNode, which this agent
/// has never seen.
#[derive(Default)]
struct Absence {
    since: Option<Instant>,
    /// What an earlier agent left is gone.
    over: bool,
}

impl Absence {
    /// Whether it is time to remove what an earlier agent left.
    fn is_due(&mut self, now: Instant, after: Duration) -> bool {
        let since = *self.since.get_or_insert(now);
        !self.over && now >= since + after
    }

    /// When it is.
    fn due(&self, after: Duration) -> Option<Instant> {
        self.since.filter(|_| !self.over).map(|since| since + after)
    }
}

/// When the next pass is due.
struct Schedule {
    next: Instant,
    next_full: Instant,
    failures: u32,
}

impl Schedule {
    fn new() -> Self {
        let now = Instant::now();
        Self {
            next: now,
            next_full: now,
            failures: 0,
        }
    }

    fn is_full(&self) -> bool {
        Instant::now() >= self.next_full
    }

    fn done(&mut self, full: bool) {
        self.after(full, true);
    }

    fn after(&mut self, full: bool, well: bool) {
        if full {
            self.next_full = Instant::now() + FULL;
        }
        self.failures = if well {
            0
        } else {
            self.failures.saturating_add(1)
        };
        self.next = if well {
            self.next_full
        } else {
            (Instant::now() + delay(self.failures)).min(self.next_full)
        };
    }

    /// Not later than this.
    fn by(&mut self, due: Option<Instant>) {
        self.next = due.map_or(self.next, |due| self.next.min(due));
    }

    fn wait(&mut self, grace: Duration) {
        self.next = Instant::now() + grace.clamp(SWARM, FIRST_RETRY);
    }
}

fn delay(failures: u32) -> Duration {
    FIRST_RETRY
        .saturating_mul(1 << failures.saturating_sub(1).min(8))
        .min(FULL)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_earlier_agent_left_is_removed_once_and_not_at_once() {
        let mut absence = Absence::default();
        let (start, after) = (Instant::now(), Duration::from_secs(60));
        assert!(!absence.is_due(start, after));
        assert!(!absence.is_due(start + after / 2, after));
        assert_eq!(absence.due(after), Some(start + after));
        assert!(absence.is_due(start + after, after));
        absence.over = true;
        assert!(!absence.is_due(start + after * 2, after));
        assert_eq!(absence.due(after), None);
    }

    #[test]
    fn retries_slow_down_to_the_time_of_a_full_pass() {
        assert_eq!(delay(1), FIRST_RETRY);
        assert_eq!(delay(3), FIRST_RETRY * 4);
        assert_eq!(delay(u32::MAX), FULL);
    }
}
