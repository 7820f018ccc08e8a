//! From one status to the next: what is worth an Event. Pure, but for the last function.

use crds::{AmbientNode, conditions, reasons};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::Resource;
use kube::runtime::events::{Event, EventType, Recorder};

use crate::failure::root;

/// Longest note that the API server takes, in bytes.
const LONGEST_NOTE: usize = 1024;

/// Reasons of every start and every enrolment: no news.
const ON_THE_WAY: [&str; 2] = [reasons::WAITING_FOR_PROXY, reasons::WORKLOADS_PENDING];

/// Reasons of what holds and might not help.
const MAY_BREAK: [&str; 1] = [reasons::EBPF_DATA_PATH];

/// Something to tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct News {
    pub(crate) is_warning: bool,
    pub(crate) reason: String,
    pub(crate) note: String,
}

/// What changed for the worse, and what came back.
pub(crate) fn between(previous: &[Condition], next: &[Condition]) -> Vec<News> {
    next.iter()
        .filter_map(|condition| {
            let before = previous
                .iter()
                .find(|before| before.type_ == condition.type_);
            // `Ready` repeats the others, but for what is wrong with the spec itself.
            let repeats = condition.type_ == conditions::READY
                && !is_of_spec(condition)
                && !before.is_some_and(is_of_spec);
            if repeats {
                return None;
            }
            match condition.status.as_str() {
                "False" => warning(before, condition),
                _ if MAY_BREAK.contains(&condition.reason.as_str()) => warning(before, condition),
                _ => recovery(before?, condition),
            }
        })
        .collect()
}

fn is_of_spec(condition: &Condition) -> bool {
    condition.reason == reasons::INVALID_SPEC
}

fn warning(before: Option<&Condition>, now: &Condition) -> Option<News> {
    let same =
        before.is_some_and(|before| before.reason == now.reason && before.message == now.message);
    // That something waits for the proxy is said once, by ProxyAttached, and not while all starts.
    let follows = now.reason == reasons::NO_PROXY
        && (now.type_ != conditions::PROXY_ATTACHED || before.is_none());
    let news = !same && !follows && !ON_THE_WAY.contains(&now.reason.as_str());
    news.then(|| News::of(now, true))
}

fn recovery(before: &Condition, now: &Condition) -> Option<News> {
    let was_news = before.status == "False"
        && !ON_THE_WAY.contains(&before.reason.as_str())
        && (before.reason != reasons::NO_PROXY || now.type_ == conditions::PROXY_ATTACHED);
    was_news.then(|| News::of(now, false))
}

impl News {
    fn of(condition: &Condition, is_warning: bool) -> Self {
        Self {
            is_warning,
            reason: condition.reason.clone(),
            note: format!("{}: {}", condition.type_, condition.message),
        }
    }
}

/// Publishes one; the recorder counts repetitions up instead of writing new Events.
pub(crate) async fn publish(recorder: &Recorder, object: &AmbientNode, news: News) {
    let event = Event {
        type_: if news.is_warning {
            EventType::Warning
        } else {
            EventType::Normal
        },
        reason: news.reason.clone(),
        note: Some(shortened(news.note)),
        action: "Reconcile".to_owned(),
        secondary: None,
    };
    if let Err(error) = recorder.publish(&event, &object.object_ref(&())).await {
        tracing::warn!(
            reason = news.reason,
            "publish an Event: {} (needs create and patch on events.events.k8s.io in namespace default)",
            root(&error)
        );
    }
}

fn shortened(mut note: String) -> String {
    if note.len() > LONGEST_NOTE {
        let end = (0..=LONGEST_NOTE)
            .rev()
            .find(|end| note.is_char_boundary(*end));
        note.truncate(end.unwrap_or_default());
    }
    note
}

#[cfg(test)]
mod tests {
    use datapath::facts::{Obstacle, Severity};

    use super::*;
    use crate::failure::{Complaint, Failure};
    use crate::report::tests::{all_well, status_of};
    use crate::report::{Outcome, ProxyState};
    use crate::roster::Progress;

    fn between_outcomes(one: Option<&Outcome>, other: &Outcome) -> Vec<(bool, String)> {
        let before = one.map(|one| status_of(one).conditions).unwrap_or_default();
        between(&before, &status_of(other).conditions)
            .into_iter()
            .map(|news| (news.is_warning, news.reason))
            .collect()
    }

    #[test]
    fn a_failure_is_news_once_and_so_is_its_end() {
        let well = all_well();
        let mut broken = all_well();
        broken.failure = Failure::obstacles(&[Obstacle::Ipvs], Severity::Breaks);
        assert_eq!(
            between_outcomes(Some(&well), &broken),
            [(true, reasons::IPVS_UNSUPPORTED.to_owned())]
        );
        assert_eq!(between_outcomes(Some(&broken), &broken), []);
        assert_eq!(
            between_outcomes(Some(&broken), &well),
            [(false, reasons::REDIRECTING.to_owned())]
        );
    }

    #[test]
    fn what_might_be_in_the_way_is_news_once() {
        let well = all_well();
        let mut warned = all_well();
        warned.warning = Complaint::of(&[Obstacle::EbpfProgram {
            device: "vethp".to_owned(),
            program: "watch".to_owned(),
        }]);
        assert_eq!(
            between_outcomes(Some(&well), &warned),
            [(true, reasons::EBPF_DATA_PATH.to_owned())]
        );
        assert_eq!(between_outcomes(Some(&warned), &warned), []);
        assert_eq!(between_outcomes(Some(&warned), &well), []);
    }

    #[test]
    fn a_proxy_that_goes_is_news_and_a_node_that_starts_is_none() {
        let mut without = all_well();
        without.proxy = ProxyState::Absent;
        assert_eq!(between_outcomes(None, &without), []);
        assert_eq!(
            between_outcomes(Some(&all_well()), &without),
            [(true, reasons::NO_PROXY.to_owned())]
        );
        assert_eq!(
            between_outcomes(Some(&without), &all_well()),
            [(false, reasons::ATTACHED.to_owned())]
        );
    }

    #[test]
    fn a_workload_on_its_way_is_no_news() {
        let mut waiting = all_well();
        waiting.workloads[0].progress = Progress::Waiting;
        assert_eq!(between_outcomes(Some(&all_well()), &waiting), []);
        assert_eq!(between_outcomes(Some(&waiting), &all_well()), []);
    }

    #[test]
    fn an_invalid_spec_is_news() {
        let mut invalid = all_well();
        invalid.invalid_spec = Some("spec.ports: …".to_owned());
        assert_eq!(
            between_outcomes(Some(&all_well()), &invalid),
            [(true, reasons::INVALID_SPEC.to_owned())]
        );
        assert_eq!(
            between_outcomes(Some(&invalid), &all_well()),
            [(false, reasons::READY.to_owned())]
        );
    }

    #[test]
    fn a_long_note_is_cut_between_characters() {
        let note = shortened("é".repeat(1000));
        assert_eq!(note.len(), LONGEST_NOTE);
    }
}
