//! What the proxy knows, for those who are in its namespace.

mod dump;

use std::sync::Arc;

use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};
use hbone::Shared;
use serde::Deserialize;
use tracing_subscriber::EnvFilter;

use crate::log::Levels;

#[derive(Clone)]
struct Admin {
    shared: Arc<Shared>,
    node: Arc<str>,
    levels: Levels,
}

#[derive(Deserialize)]
struct Level {
    level: String,
}

/// `/config_dump` and `/logging`.
pub(crate) fn router(shared: Arc<Shared>, node: &str, levels: Levels) -> Router {
    Router::new()
        .route("/config_dump", get(config_dump))
        .route("/logging", post(logging))
        .with_state(Admin {
            shared,
            node: node.into(),
            levels,
        })
}

async fn config_dump(State(admin): State<Admin>) -> Json<serde_json::Value> {
    Json(dump::build(&admin.shared, &admin.node))
}

/// Sets what is logged, in the words of RUST_LOG.
async fn logging(State(admin): State<Admin>, Query(query): Query<Level>) -> (StatusCode, String) {
    let filter = match EnvFilter::try_new(&query.level) {
        Ok(filter) => filter,
        Err(error) => return (StatusCode::BAD_REQUEST, format!("{error}\n")),
    };
    let said = format!("logging {filter}\n");
    match admin.levels.reload(filter) {
        Ok(()) => (StatusCode::OK, said),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}
