//! `/healthz`, `/readyz` and `/metrics`.

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::net::TcpListener;

use crate::metrics::Metrics;

/// Answers until the listener ends.
pub(crate) async fn serve(listener: TcpListener, metrics: Arc<Metrics>) -> std::io::Result<()> {
    let routes = Router::new()
        .route("/healthz", get(alive))
        .route("/readyz", get(ready))
        .route("/metrics", get(text))
        .with_state(metrics);
    axum::serve(listener, routes).await
}

async fn alive(State(metrics): State<Arc<Metrics>>) -> Response {
    answer(metrics.is_alive(), "the loop does not turn")
}

async fn ready(State(metrics): State<Arc<Metrics>>) -> Response {
    answer(
        metrics.is_ready(),
        "this node's AmbientNode has not been read yet; the log says why",
    )
}

async fn text(State(metrics): State<Arc<Metrics>>) -> Response {
    match metrics.text() {
        Ok(text) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], text).into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

fn answer(well: bool, problem: &'static str) -> Response {
    if well {
        "ok".into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, problem).into_response()
    }
}
