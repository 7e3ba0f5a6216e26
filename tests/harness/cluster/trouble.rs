//! What is told of the cluster when a test fails: of the test's own namespaces and, once, of Culvert, as far back as the test goes.

use std::cell::Cell;
use std::time::Duration;

use serde_json::Value;

use super::culvert::CULVERT;
use super::kubectl;

/// How many lines are told of each container of Culvert, and of each of a test.
const LINES: &str = "--tail=60";
const FEW_LINES: &str = "--tail=5";
/// How many events are told of each namespace.
const EVENTS: usize = 25;

thread_local! {
    /// Whether Culvert has been told of. Each test has a thread of its own.
    static TOLD: Cell<bool> = const { Cell::new(false) };
}

/// Tells of a namespace that was made so long ago.
pub(super) fn tell(namespace: &str, age: Duration) {
    tell_of(namespace, age, FEW_LINES);
    if !TOLD.replace(true) {
        tell_of(CULVERT, age, LINES);
    }
}

fn tell_of(namespace: &str, age: Duration, lines: &str) {
    show(&format!("pods of {namespace}"), namespace, &["get", "pods", "--output=wide"]);
    let events = said(namespace, &["get", "events", "--sort-by=.lastTimestamp"]);
    let events: Vec<&str> = events.lines().collect();
    eprintln!("--- last events of {namespace}\n{}", events[events.len().saturating_sub(EVENTS)..].join("\n"));
    let since = format!("--since={}s", age.as_secs() + 1);
    for (pod, was_restarted) in pods(namespace) {
        show(&format!("log of {pod}"), namespace, &["logs", &pod, "--all-containers", &since, lines]);
        if was_restarted {
            show(&format!("log of {pod} before it was restarted"), namespace, &["logs", &pod, "--previous", lines]);
        }
    }
}

/// The names of a namespace's pods, each with whether a container of it was restarted.
fn pods(namespace: &str) -> Vec<(String, bool)> {
    let listed = kubectl().args(["--namespace", namespace, "get", "pods", "--output=json"]).output();
    let listed: Value = listed.ok().and_then(|listed| serde_json::from_slice(&listed.stdout).ok()).unwrap_or_default();
    let pods = listed["items"].as_array().cloned().unwrap_or_default();
    let read = |pod: &Value| {
        let containers = pod["status"]["containerStatuses"].as_array().cloned().unwrap_or_default();
        let was_restarted = containers.iter().any(|container| container["restartCount"].as_u64() > Some(0));
        Some((pod["metadata"]["name"].as_str()?.to_owned(), was_restarted))
    };
    pods.iter().filter_map(read).collect()
}

fn show(what: &str, namespace: &str, words: &[&str]) {
    eprintln!("--- {what}\n{}", said(namespace, words).trim_end());
}

/// What kubectl says, or why it says nothing: the test fails for another reason.
fn said(namespace: &str, words: &[&str]) -> String {
    let output = kubectl().args(["--namespace", namespace]).args(words).output();
    output.map_or_else(
        |error| error.to_string(),
        |output| {
            let text = if output.status.success() { output.stdout } else { output.stderr };
            String::from_utf8_lossy(&text).into_owned()
        },
    )
}
