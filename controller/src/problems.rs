//! What is wrong right now, by part: logged once when it begins, and shown by `/readyz` until it
//! ends.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kube::runtime::watcher;

/// A watch that fails tries again more often than this; one that succeeds may have nothing to say.
const WATCH_RETRIES_WITHIN: Duration = Duration::from_secs(90);

/// Shared by all parts.
#[derive(Clone, Debug, Default)]
pub(crate) struct Problems(Arc<Mutex<BTreeMap<&'static str, Problem>>>);

#[derive(Debug)]
struct Problem {
    message: String,
    /// When it counts as over if it is not reported again.
    over: Option<Instant>,
}

impl Problems {
    /// A part reports its problem. The same again is not logged again.
    pub(crate) fn report(&self, part: &'static str, message: String) {
        self.put(part, message, None);
    }

    /// A watch reports its problem, as often as it has it.
    pub(crate) fn report_watch(&self, part: &'static str, error: &watcher::Error) {
        let over = Instant::now() + WATCH_RETRIES_WITHIN;
        self.put(part, explain_watch(error), Some(over));
    }

    fn put(&self, part: &'static str, message: String, over: Option<Instant>) {
        let mut problems = self.lock();
        if problems.get(part).map(|problem| &problem.message) != Some(&message) {
            tracing::warn!(part, "{message}");
        }
        problems.insert(part, Problem { message, over });
    }

    /// A part works.
    pub(crate) fn clear(&self, part: &'static str) {
        if self.lock().remove(part).is_some() {
            tracing::info!(part, "works again");
        }
    }

    /// One line for each.
    pub(crate) fn lines(&self) -> Vec<String> {
        let problems = self.lock();
        let now = Instant::now();
        problems
            .iter()
            .filter(|(_, problem)| problem.over.is_none_or(|over| over > now))
            .map(|(part, problem)| format!("{part}: {}", problem.message))
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<&'static str, Problem>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An error of the API server in words. A refusal names who may not do what to which resource.
pub(crate) fn explain(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) if status.is_forbidden() => format!(
            "{}; a ClusterRole or Role of the controller's service account must allow it",
            status.message
        ),
        kube::Error::Api(status) => format!("{} ({})", status.message, status.code),
        other => chain(other),
    }
}

fn explain_watch(error: &watcher::Error) -> String {
    match error {
        watcher::Error::InitialListFailed(error) | watcher::Error::WatchStartFailed(error) => {
            explain(error)
        }
        watcher::Error::WatchError(status) => format!("{} ({})", status.message, status.code),
        other => chain(other),
    }
}

/// An error with its causes.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_is_shown_until_it_ends() {
        let problems = Problems::default();
        problems.report("watch pods", "forbidden".to_owned());
        problems.report("lease", "timeout".to_owned());
        assert_eq!(
            problems.lines(),
            ["lease: timeout", "watch pods: forbidden"]
        );
        problems.clear("lease");
        assert_eq!(problems.lines(), ["watch pods: forbidden"]);
    }

    #[test]
    fn a_refusal_names_the_verb_and_the_resource() {
        let status = kube::core::Status::failure(
            "pods is forbidden: User \"x\" cannot list resource \"pods\" in API group \"\"",
            "Forbidden",
        )
        .with_code(403);
        let text = explain(&kube::Error::Api(Box::new(status)));
        assert!(text.contains("cannot list resource \"pods\""), "{text}");
    }
}
