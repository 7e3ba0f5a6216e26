//! Whether a workload has become what it shall be, and if not, why.
//!
//! Enters: a Deployment's or DaemonSet's state, as the API tells of each change. Leaves: the moment when all of its pods are of the
//! newest template and available; or, when that takes too long, what its pods say.

use std::time::Duration;

use futures_util::StreamExt as _;
use serde_json::Value;
use tokio::time::Instant;

use super::cluster::{Cluster, ClusterError, Events, ObjectRef, Which};

/// The least time from the end of one watch to the next.
pub(in crate::installation) const PAUSE: Duration = Duration::from_millis(500);

/// How far a rollout is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Pods that shall be there; none while the API has not counted yet.
    pub wanted: Option<u64>,
    /// Those of the newest template that are available.
    pub available: u64,
    /// Whether nothing is left to wait for.
    pub done: bool,
}

/// Waits until `workload`, a Deployment or DaemonSet, is rolled out, and tells of progress.
///
/// # Errors
/// [`ClusterError::Late`] with what the pods say, when `limit` has passed; and whatever keeps the API from telling.
///
/// # Cancel safety
/// Nothing is changed.
pub async fn wait(
    cluster: &Cluster,
    workload: &ObjectRef,
    limit: Duration,
    mut tell: impl FnMut(Progress),
) -> Result<(), ClusterError> {
    let deadline = Instant::now() + limit;
    let mut last = None;
    while Instant::now() < deadline {
        // The API ends each watch after some minutes; one that ends at once must not have us ask all the time.
        let mut events = watch(cluster, workload).await?;
        while let Ok(Some(event)) = tokio::time::timeout_at(deadline, events.next()).await {
            let (object, exists) = event?;
            let Some(progress) = progress(&object).filter(|_| exists) else { continue };
            if last.replace(progress) != Some(progress) {
                tell(progress);
            }
            if progress.done {
                return Ok(());
            }
        }
        tokio::time::sleep_until(deadline.min(Instant::now() + PAUSE)).await;
    }
    let what = format!("{workload} is not rolled out");
    let why = complaints(cluster, workload).await.unwrap_or_else(|error| error.to_string());
    Err(ClusterError::Late { what, seconds: limit.as_secs(), why })
}

/// Waits until no pod is left that `labels` take.
///
/// # Errors
/// [`ClusterError::Late`] with the pods that are left.
pub async fn wait_for_no_pods(cluster: &Cluster, namespace: &str, labels: &str, limit: Duration) -> Result<(), ClusterError> {
    let deadline = Instant::now() + limit;
    loop {
        // First the watch, then the list: what ends between them is told by the watch.
        let pods = Which::labelled(namespace, labels);
        let mut events = cluster.watch("v1", "Pod", pods).await?;
        let left = cluster.list("v1", "Pod", pods).await?;
        if left.is_empty() {
            return Ok(());
        }
        let names: Vec<String> = left.iter().map(|pod| ObjectRef::of(pod).name).collect();
        let late = || ClusterError::Late {
            what: format!("{} pods are still there", names.len()),
            seconds: limit.as_secs(),
            why: names.join(", "),
        };
        loop {
            match tokio::time::timeout_at(deadline, events.next()).await.map_err(|_elapsed| late())? {
                Some(Ok((_, true))) => {}
                Some(Ok((_, false))) => break,
                None => {
                    tokio::time::sleep(PAUSE).await;
                    break;
                }
                Some(Err(error)) => return Err(error),
            }
        }
        if Instant::now() >= deadline {
            return Err(late());
        }
    }
}

async fn watch(cluster: &Cluster, workload: &ObjectRef) -> Result<Events, ClusterError> {
    let fields = format!("metadata.name={}", workload.name);
    let which = Which { namespace: workload.namespace.as_deref(), fields: &fields, labels: "" };
    cluster.watch(&workload.api_version, &workload.kind, which).await
}

/// How far a Deployment or DaemonSet is; none where the object is neither.
#[must_use]
pub fn progress(object: &Value) -> Option<Progress> {
    let status = &object["status"];
    let count = |name: &str| status[name].as_u64().unwrap_or(0);
    let observed = status["observedGeneration"].as_u64() >= object["metadata"]["generation"].as_u64();
    match object["kind"].as_str()? {
        "Deployment" => {
            let wanted = object["spec"]["replicas"].as_u64().unwrap_or(1);
            // Available pods may be old ones until all are updated.
            let available = count("availableReplicas").min(count("updatedReplicas"));
            let done = observed && available >= wanted && count("replicas") == count("updatedReplicas");
            Some(Progress { wanted: observed.then_some(wanted), available, done })
        }
        "DaemonSet" => {
            let wanted = count("desiredNumberScheduled");
            let on_delete = object["spec"]["updateStrategy"]["type"] == "OnDelete";
            let updated = if on_delete { wanted } else { count("updatedNumberScheduled") };
            let available = count("numberAvailable").min(updated);
            Some(Progress { wanted: observed.then_some(wanted), available, done: observed && available >= wanted })
        }
        _ => None,
    }
}

/// What keeps the pods of a workload from being available, a line for each reason.
async fn complaints(cluster: &Cluster, workload: &ObjectRef) -> Result<String, ClusterError> {
    let labels = format!("app.kubernetes.io/name={}", workload.name);
    let which = Which { namespace: workload.namespace.as_deref(), labels: &labels, fields: "" };
    let pods = cluster.list("v1", "Pod", which).await?;
    if pods.is_empty() {
        return Ok("it has no pods; `kubectl describe` of it says why".to_owned());
    }
    let mut lines: Vec<String> = pods.iter().filter_map(complaint).collect();
    lines.sort_unstable();
    lines.truncate(10);
    Ok(if lines.is_empty() { "its pods do not say why".to_owned() } else { lines.join("\n  ") })
}

/// What a pod says of itself when it is not ready.
#[must_use]
pub fn complaint(pod: &Value) -> Option<String> {
    let place = pod["spec"]["nodeName"].as_str().map(|node| format!(" on {node}")).unwrap_or_default();
    let name = format!("{}{place}", ObjectRef::of(pod).name);
    let said = |state: &Value| {
        let (reason, message) = (state["reason"].as_str()?, state["message"].as_str().unwrap_or_default().trim());
        Some(if message.is_empty() { reason.to_owned() } else { format!("{reason}: {message}") })
    };
    let lists = [&pod["status"]["initContainerStatuses"], &pod["status"]["containerStatuses"]];
    for status in lists.into_iter().filter_map(Value::as_array).flatten().filter(|status| status["ready"] != true) {
        // How it ended before says more than that it will be started again.
        let ended = said(&status["lastState"]["terminated"]).filter(|_| status["state"]["running"].is_null());
        if let Some(why) = ended.or_else(|| said(&status["state"]["terminated"])).or_else(|| said(&status["state"]["waiting"])) {
            return Some(format!("{name}: {why}"));
        }
    }
    let conditions = pod["status"]["conditions"].as_array().into_iter().flatten();
    let wrong: Vec<_> = conditions.filter(|condition| condition["status"] == "False").filter_map(said).collect();
    wrong.last().map(|why| format!("{name}: {why}"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[track_caller]
    fn check(kind: &str, spec: Value, status: Value, expected: (Option<u64>, u64, bool)) {
        let object = json!({"kind": kind, "metadata": {"generation": 2}, "spec": spec, "status": status});
        let (wanted, available, done) = expected;
        assert_eq!(progress(&object), Some(Progress { wanted, available, done }), "{object}");
    }

    #[test]
    fn a_deployment_is_done_when_all_pods_are_new_and_available() {
        let spec = || json!({"replicas": 2});
        check("Deployment", spec(), json!({}), (None, 0, false));
        let status = |observed: u64, replicas: u64, updated: u64, available: u64| json!({"observedGeneration": observed, "replicas": replicas, "updatedReplicas": updated, "availableReplicas": available});
        check("Deployment", spec(), status(1, 2, 2, 2), (None, 2, false));
        check("Deployment", spec(), status(2, 3, 1, 2), (Some(2), 1, false));
        check("Deployment", spec(), status(2, 3, 2, 2), (Some(2), 2, false));
        check("Deployment", spec(), status(2, 2, 2, 1), (Some(2), 1, false));
        check("Deployment", spec(), status(2, 2, 2, 2), (Some(2), 2, true));
    }

    #[test]
    fn a_daemon_set_is_done_when_each_node_has_a_new_available_pod() {
        let status = |wanted: u64, updated: u64, available: u64| json!({"observedGeneration": 2, "desiredNumberScheduled": wanted, "updatedNumberScheduled": updated, "numberAvailable": available});
        check("DaemonSet", json!({}), json!({}), (None, 0, false));
        check("DaemonSet", json!({}), status(3, 1, 3), (Some(3), 1, false));
        check("DaemonSet", json!({}), status(3, 3, 2), (Some(3), 2, false));
        check("DaemonSet", json!({}), status(3, 3, 3), (Some(3), 3, true));
        check("DaemonSet", json!({}), status(0, 0, 0), (Some(0), 0, true));
        // Nobody replaces these pods but their owner.
        check("DaemonSet", json!({"updateStrategy": {"type": "OnDelete"}}), status(3, 0, 3), (Some(3), 3, true));
        assert_eq!(progress(&json!({"kind": "Pod"})), None);
    }

    #[test]
    fn a_pod_says_what_went_wrong_last() {
        let pod = |status: Value| json!({"metadata": {"name": "p"}, "spec": {"nodeName": "n"}, "status": status});
        let waiting = json!({"containerStatuses": [{"ready": false, "state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}}]});
        assert_eq!(complaint(&pod(waiting)).as_deref(), Some("p on n: ImagePullBackOff: no such image"));
        let crashed = json!({"containerStatuses": [{
            "ready": false,
            "state": {"waiting": {"reason": "CrashLoopBackOff"}},
            "lastState": {"terminated": {"reason": "Error", "message": "culvert: cgroup v2 is not mounted\n"}},
        }]});
        assert_eq!(complaint(&pod(crashed)).as_deref(), Some("p on n: Error: culvert: cgroup v2 is not mounted"));
        let unscheduled = json!({"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 nodes"}]});
        assert_eq!(complaint(&pod(unscheduled)).as_deref(), Some("p on n: Unschedulable: 0/1 nodes"));
        assert_eq!(complaint(&pod(json!({"containerStatuses": [{"ready": true, "state": {"running": {}}}]}))), None);
    }
}
