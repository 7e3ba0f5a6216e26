//! The admin interface: what this agent knows and does, as JSON, for operators and `culvert`'s own commands.
//!
//! Enters: GET requests on the loopback address, answered from the snapshot, the open connections and callbacks of the parts that
//! own the rest ([`AdminSources`]); one POST, which changes the log filter. Leaves: JSON. It must never show a private key or a
//! token, and never change what happens to traffic.

mod view;

use std::fmt::Write as _;
use std::sync::Arc;

use axum::Router;
use axum::extract::RawQuery;
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::connection::Observer;
use super::http::{content, offload};
use super::log;
use crate::model::Snapshot;

/// Connections listed when the request doesn't say `?limit=N`.
const DEFAULT_CONNECTIONS: usize = 1_000;

/// Connections listed at most.
const MAX_CONNECTIONS: usize = 100_000;

/// A list that some part of the agent can give at any time, from any thread, without waiting long.
pub type Source = Box<dyn Fn() -> Vec<Value> + Send + Sync>;

/// Where the admin interface finds what it shows.
pub struct AdminSources {
    /// The node's name.
    pub node: String,
    /// The agent's view of the mesh.
    pub snapshot: watch::Receiver<Arc<Snapshot>>,
    /// State of the certificates held: identity, serial, validity. See [`source`].
    pub certificates: Source,
    /// State of the node's pods. See [`source`].
    pub pods: Source,
    /// Open connections.
    pub observer: Observer,
}

impl std::fmt::Debug for AdminSources {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AdminSources").field("node", &self.node).finish_non_exhaustive()
    }
}

/// Makes a [`Source`] of a function that gives serialisable items.
pub fn source<T: Serialize>(items: impl Fn() -> Vec<T> + Send + Sync + 'static) -> Source {
    let value = |item: T| serde_json::to_value(item).unwrap_or_else(|error| json!({ "error": error.to_string() }));
    Box::new(move || items().into_iter().map(value).collect())
}

/// What each path shows, in the order of the help page.
const PAGES: [(&str, &str); 9] = [
    ("/config_dump", "workloads, services, policies and certificates in one"),
    ("/workloads", "the workloads of the mesh that this agent knows"),
    ("/services", "the services that this agent knows"),
    ("/policies", "the authorization policies that this agent knows"),
    ("/certificates", "the certificates that this agent holds"),
    ("/connections", "open connections (?limit=N)"),
    ("/pods", "the node's pods and whether they are enrolled"),
    ("/log", "the log filter; POST /log?level=debug changes it"),
    ("/version", "what runs here"),
];

/// The routes of the admin server.
pub fn router(sources: AdminSources) -> Router {
    let sources = Arc::new(sources);
    let page = |render: fn(&AdminSources) -> Value| {
        let sources = Arc::clone(&sources);
        get(move || {
            let sources = Arc::clone(&sources);
            async move { offload(move || json_page(&render(&sources))).await }
        })
    };
    let connections = {
        let sources = Arc::clone(&sources);
        async move |RawQuery(query): RawQuery| connections_page(sources, query).await
    };
    Router::new()
        .route("/", get(async || help()))
        .route("/config_dump", page(config_dump))
        .route("/workloads", page(|sources| view::workloads(&sources.snapshot())))
        .route("/services", page(|sources| view::services(&sources.snapshot())))
        .route("/policies", page(|sources| view::policies(&sources.snapshot())))
        .route("/certificates", page(|sources| Value::Array((sources.certificates)())))
        .route("/connections", get(connections))
        .route("/pods", page(|sources| Value::Array((sources.pods)())))
        .route("/log", get(async || log_filter()).post(async |RawQuery(query): RawQuery| set_log_filter(query.as_deref())))
        .route("/version", page(version))
}

impl AdminSources {
    fn snapshot(&self) -> Arc<Snapshot> {
        Arc::clone(&self.snapshot.borrow())
    }
}

fn help() -> String {
    let mut text = String::from("culvert agent: admin interface\n\n");
    for (path, what) in PAGES {
        writeln!(text, "  {path:<14} {what}").unwrap_or_default();
    }
    text
}

fn json_page(value: &Value) -> Response {
    content("application/json", format!("{value:#}\n"))
}

fn version(sources: &AdminSources) -> Value {
    json!({ "name": "culvert", "version": env!("CARGO_PKG_VERSION"), "node": sources.node })
}

fn config_dump(sources: &AdminSources) -> Value {
    let snapshot = sources.snapshot();
    json!({
        "version": version(sources),
        "mesh": view::mesh(&snapshot),
        "workloads": view::workloads(&snapshot),
        "services": view::services(&snapshot),
        "policies": view::policies(&snapshot),
        "certificates": (sources.certificates)(),
        "pods": (sources.pods)(),
    })
}

async fn connections_page(sources: Arc<AdminSources>, query: Option<String>) -> Response {
    let limit = match parameter(query.as_deref(), "limit").map(str::parse) {
        None => DEFAULT_CONNECTIONS,
        Some(Ok(limit)) if limit <= MAX_CONNECTIONS => limit,
        Some(_) => return refuse(&format!("limit must be a number from 0 to {MAX_CONNECTIONS}")),
    };
    offload(move || {
        let open = sources.observer.open_connections(limit);
        let shown: Vec<Value> = open.iter().map(view::connection).collect();
        json_page(&json!({ "total": sources.observer.open_count(), "connections": shown }))
    })
    .await
}

fn log_filter() -> Response {
    json_page(&json!({ "filter": log::current_filter() }))
}

fn set_log_filter(query: Option<&str>) -> Response {
    let Some(level) = parameter(query, "level") else {
        return refuse("say which level: POST /log?level=debug");
    };
    match log::set_filter(level) {
        Ok(()) => {
            tracing::info!(filter = level, "log filter changed");
            log_filter()
        }
        Err(error) => refuse(&error.to_string()),
    }
}

fn refuse(why: &str) -> Response {
    (StatusCode::BAD_REQUEST, format!("{why}\n")).into_response()
}

/// A query parameter as it is written; the values here need no percent-encoding.
fn parameter<'a>(query: Option<&'a str>, name: &str) -> Option<&'a str> {
    query?.split('&').find_map(|part| part.strip_prefix(name)?.strip_prefix('='))
}

#[cfg(test)]
mod tests;
