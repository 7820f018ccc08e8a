//! `/healthz`, `/readyz` and `/metrics`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::model::Published;
use crate::problems::Problems;

/// What readiness depends on.
#[derive(Clone)]
pub(crate) struct Health {
    pub(crate) problems: Problems,
    pub(crate) published: Published,
    pub(crate) serving: Serving,
    pub(crate) registry: Arc<Registry>,
}

/// Whether proxies are answered.
#[derive(Clone, Debug, Default)]
pub(crate) struct Serving(Arc<AtomicBool>);

impl Serving {
    pub(crate) fn set(&self, serving: bool) {
        self.0.store(serving, Ordering::Relaxed);
    }

    fn is(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Serves until `stop`.
pub(crate) async fn serve(
    listener: TcpListener,
    health: Health,
    stop: CancellationToken,
) -> std::io::Result<()> {
    let router = Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .with_state(health);
    axum::serve(listener, router)
        .with_graceful_shutdown(stop.cancelled_owned())
        .await
}

async fn readyz(State(health): State<Health>) -> (StatusCode, String) {
    let listed = health.published.borrow().is_some();
    readiness(listed, health.serving.is(), &health.problems.lines())
}

/// A problem that comes up later is shown but does not make the replica unready: it goes on
/// serving from its last state, which is better than nobody serving.
fn readiness(listed: bool, serving: bool, problems: &[String]) -> (StatusCode, String) {
    let mut lines = Vec::new();
    if !listed {
        lines.push("waiting for the first list of every kind of object");
    }
    if !serving {
        lines.push("not serving discovery and certificates yet");
    }
    let code = if lines.is_empty() {
        lines.push("ok");
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    lines.extend(problems.iter().map(String::as_str));
    (code, lines.join("\n") + "\n")
}

async fn metrics(State(health): State<Health>) -> impl IntoResponse {
    let mut text = String::new();
    match prometheus_client::encoding::text::encode(&mut text, &health.registry) {
        Ok(()) => (
            StatusCode::OK,
            [(
                header::CONTENT_TYPE,
                "application/openmetrics-text; version=1.0.0; charset=utf-8",
            )],
            text,
        ),
        Err(error) => (
            StatusCode::INTERNAL_SERVER_ERROR,
            [(header::CONTENT_TYPE, "text/plain")],
            format!("metrics cannot be written: {error}\n"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readiness_waits_for_lists_and_for_the_listener() {
        assert_eq!(readiness(true, true, &[]).0, StatusCode::OK);
        assert_eq!(
            readiness(false, true, &[]).0,
            StatusCode::SERVICE_UNAVAILABLE
        );
        assert_eq!(
            readiness(true, false, &[]).0,
            StatusCode::SERVICE_UNAVAILABLE
        );
    }

    #[test]
    fn a_problem_is_shown_whether_ready_or_not() {
        let problem = ["watch pods: forbidden".to_owned()];
        for serving in [true, false] {
            let (_, text) = readiness(true, serving, &problem);
            assert!(text.contains("watch pods: forbidden"), "{text}");
        }
    }
}
