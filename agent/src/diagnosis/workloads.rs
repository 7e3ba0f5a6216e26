//! Culvert's own workloads: whether they run, and are of one release.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{Finding, Severity};
use crate::installation::cluster::ObjectRef;
use crate::installation::rollout::{complaint, progress};

const VERSION: &str = "app.kubernetes.io/version";

/// A workload and its pods.
pub(super) fn check(check: &'static str, name: &str, workload: Option<&Value>, pods: &[Value]) -> Vec<Finding> {
    let Some(workload) = workload else {
        return vec![Finding::error(check, format!("there is no {name}"), "culvert install")];
    };
    let Some(progress) = progress(workload) else { return Vec::new() };
    let wanted = progress.wanted.map_or_else(|| "?".to_owned(), |wanted| wanted.to_string());
    let message = format!("{} of {wanted} {name} pods are ready and up to date", progress.available);
    if progress.done {
        return vec![Finding::ok(check, message)];
    }
    let mut findings = vec![Finding::error(check, message, format!("see `kubectl -n NAMESPACE logs` of the pods of {name}"))];
    let complaints = pods.iter().filter_map(complaint);
    findings.extend(complaints.map(|said| Finding::error(check, said, "mend what it says; the pod is started again by itself")));
    findings
}

/// The releases of controllers and agents. Agents may be one step behind while an upgrade runs, and never ahead: they would ask for what
/// the controller does not know.
pub(super) fn releases(controllers: &[Value], agents: &[Value]) -> Vec<Finding> {
    let (controllers, agents) = (versions(controllers), versions(agents));
    let list = |versions: &BTreeSet<&str>| versions.iter().copied().collect::<Vec<_>>().join(", ");
    let (Some(newest), true) = (controllers.iter().next_back(), !agents.is_empty()) else { return Vec::new() };
    if controllers.len() == 1 && agents == controllers {
        return vec![Finding::ok("versions", format!("controllers and agents are of release {newest}"))];
    }
    let severity = if agents.iter().any(|agent| order(agent) > order(newest)) { Severity::Error } else { Severity::Warning };
    let message = format!("controllers are of release {}, agents of {}", list(&controllers), list(&agents));
    let remedy = "wait for the upgrade, or finish it: `culvert install` of the newest release".to_owned();
    vec![Finding { check: "versions", severity, message, remedy: Some(remedy) }]
}

fn versions(pods: &[Value]) -> BTreeSet<&str> {
    pods.iter().filter_map(|pod| pod["metadata"]["labels"][VERSION].as_str()).collect()
}

/// The numbers of a release, to compare it by.
fn order(version: &str) -> Vec<u64> {
    version.split(|letter: char| !letter.is_ascii_digit()).filter_map(|number| number.parse().ok()).collect()
}

/// Linux nodes that have no agent.
pub(super) fn nodes_without(nodes: &[Value], agents: &[Value]) -> Vec<Finding> {
    let served: BTreeSet<&str> = agents.iter().filter_map(|pod| pod["spec"]["nodeName"].as_str()).collect();
    let linux = nodes.iter().filter(|node| node["metadata"]["labels"]["kubernetes.io/os"] != "windows");
    let without = linux.map(|node| ObjectRef::of(node).name).filter(|name| !served.contains(name.as_str()));
    let finding = |name: String| {
        let message = format!("node {name} has no agent: pods there are neither protected nor captured");
        Finding::warning("agents", message, "see the DaemonSet's agent.nodeSelector, agent.affinity and agent.tolerations")
    };
    without.map(finding).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::diagnosis::worst;

    fn pods(versions: &[&str]) -> Vec<Value> {
        versions.iter().map(|version| json!({"metadata": {"labels": {VERSION: version}}})).collect()
    }

    #[test]
    fn agents_may_lag_behind_controllers_and_never_be_ahead() {
        let check = |controllers: &[&str], agents: &[&str]| {
            releases(&pods(controllers), &pods(agents)).first().map(|finding| finding.severity)
        };
        assert_eq!(check(&["0.2.0"], &["0.2.0", "0.2.0"]), Some(Severity::Ok));
        assert_eq!(check(&["0.10.0"], &["0.9.0", "0.10.0"]), Some(Severity::Warning));
        assert_eq!(check(&["0.9.0"], &["0.10.0"]), Some(Severity::Error));
        assert_eq!(check(&["0.9.0", "0.10.0"], &["0.9.0"]), Some(Severity::Warning));
        assert_eq!(check(&[], &["0.1.0"]), None);
    }

    #[test]
    fn a_workload_that_is_missing_or_not_ready_is_an_error_with_its_pods_words() {
        assert_eq!(worst(&check("agents", "culvert-agent", None, &[])), Severity::Error);
        let status =
            json!({"observedGeneration": 1, "desiredNumberScheduled": 1, "updatedNumberScheduled": 1, "numberAvailable": 0});
        let agents = json!({"kind": "DaemonSet", "metadata": {"generation": 1}, "status": status});
        let crashed = json!({"metadata": {"name": "a"}, "status": {"containerStatuses": [
            {"ready": false, "state": {"terminated": {"reason": "Error", "message": "no bpffs"}}}]}});
        let findings = check("agents", "culvert-agent", Some(&agents), &[crashed]);
        assert!(findings.iter().any(|finding| finding.message == "a: Error: no bpffs"), "{findings:?}");
    }

    #[test]
    fn linux_nodes_without_an_agent_are_named() {
        let node = |name: &str, os: &str| json!({"metadata": {"name": name, "labels": {"kubernetes.io/os": os}}});
        let nodes = [node("a", "linux"), node("b", "linux"), node("c", "windows")];
        let agents = [json!({"spec": {"nodeName": "a"}})];
        let findings = nodes_without(&nodes, &agents);
        assert_eq!(findings.len(), 1);
        assert!(findings[0].message.starts_with("node b has no agent"));
    }
}
