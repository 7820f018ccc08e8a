//! Whether the node has become ready since it booted: until then it keeps its startup taint. Pure; the
//! time is handed in.

use crds::conditions;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;

/// How long a node that is ready but for some workloads waits for them. What their certificates need
/// (DNS, say) may itself wait for a node to be free of its taint.
const PATIENCE: SignedDuration = SignedDuration::from_secs(60);

/// The boot in which the node became ready: `boot`, the present one, once it has; else as `before`.
/// Nothing is believed that was so before this agent began, at `began`.
pub(crate) fn ready_boot(
    boot: &str,
    before: Option<&str>,
    conditions: &[Condition],
    (began, now): (Timestamp, Timestamp),
) -> Option<String> {
    let ready = before == Some(boot)
        || holds_since(conditions, conditions::READY).is_some()
        || all_but_workloads(conditions)
            .is_some_and(|since| now.duration_since(since.max(began)) >= PATIENCE);
    if ready {
        Some(boot.to_owned())
    } else {
        before.map(str::to_owned)
    }
}

/// Since when everything but some workloads has been ready.
fn all_but_workloads(conditions: &[Condition]) -> Option<Timestamp> {
    conditions::PARTS
        .iter()
        .filter(|kind| **kind != conditions::WORKLOADS_READY)
        .map(|kind| holds_since(conditions, kind))
        .try_fold(Timestamp::MIN, |latest, since| Some(latest.max(since?)))
}

fn holds_since(conditions: &[Condition], kind: &str) -> Option<Timestamp> {
    conditions
        .iter()
        .find(|condition| condition.type_ == kind && condition.status == "True")
        .map(|condition| condition.last_transition_time.0)
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    /// All true since second 100, but for these.
    fn conditions(not: &[&str]) -> Vec<Condition> {
        let kinds = [conditions::READY].into_iter().chain(conditions::PARTS);
        kinds
            .map(|kind| Condition {
                type_: kind.to_owned(),
                status: if not.contains(&kind) { "False" } else { "True" }.to_owned(),
                reason: String::new(),
                message: String::new(),
                observed_generation: None,
                last_transition_time: Time(at(100)),
            })
            .collect()
    }

    fn boot(before: Option<&str>, not: &[&str], began: i64, now: i64) -> Option<String> {
        ready_boot("new", before, &conditions(not), (at(began), at(now)))
    }

    #[test]
    fn a_node_counts_as_started_when_it_is_ready() {
        assert_eq!(boot(Some("old"), &[], 90, 100).as_deref(), Some("new"));
        assert_eq!(boot(None, &[], 90, 100).as_deref(), Some("new"));
        let not = [conditions::READY, conditions::PROXY_ATTACHED];
        assert_eq!(boot(Some("old"), &not, 90, 900).as_deref(), Some("old"));
        assert_eq!(boot(None, &not, 90, 900), None);
    }

    #[test]
    fn what_fails_later_in_the_same_boot_is_no_start() {
        let not = [conditions::READY, conditions::PROXY_ATTACHED];
        assert_eq!(boot(Some("new"), &not, 90, 100).as_deref(), Some("new"));
    }

    #[test]
    fn workloads_that_do_not_get_ready_hold_a_node_back_for_a_minute_only() {
        let not = [conditions::READY, conditions::WORKLOADS_READY];
        assert_eq!(boot(Some("old"), &not, 90, 159).as_deref(), Some("old"));
        assert_eq!(boot(Some("old"), &not, 90, 160).as_deref(), Some("new"));
        // The status that an agent finds is that of an earlier boot.
        assert_eq!(boot(Some("old"), &not, 800, 859).as_deref(), Some("old"));
        assert_eq!(boot(Some("old"), &not, 800, 860).as_deref(), Some("new"));
    }
}
