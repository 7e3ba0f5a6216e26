//! The mesh: the kinds that its users write, what of their policies cannot be enforced, and pods that are labelled and not captured.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::Finding;
use crate::installation::cluster::ObjectRef;
use crate::model::enrolment;
use crate::policy::compile::{self, MeshContext};
use crate::policy::objects::{self, AuthorizationPolicySpec, PeerAuthenticationSpec};
use crate::policy::peer_authentication;

/// What in policies does not do what it says.
pub(super) fn policies(peer_authentications: &[Value], authorization_policies: &[Value], mesh: &MeshContext) -> Vec<Finding> {
    let modes = peer_authentications.iter().flat_map(|object| match objects::parse::<PeerAuthenticationSpec, _>(object) {
        Ok(parsed) => told(object, peer_authentication::check(&parsed, &mesh.root_namespace)),
        Err(error) => vec![ignored(object, &error.to_string())],
    });
    let rules = authorization_policies.iter().flat_map(|object| {
        let compiled = objects::parse::<AuthorizationPolicySpec, _>(object).map_err(|error| error.to_string());
        match compiled.and_then(|parsed| compile::authorization(&parsed, mesh).map_err(|error| error.to_string())) {
            Ok(compiled) => told(object, compiled.problems),
            Err(error) => vec![ignored(object, &error)],
        }
    });
    let mut findings: Vec<Finding> = modes.chain(rules).collect();
    if findings.is_empty() {
        let count = peer_authentications.len() + authorization_policies.len();
        findings.push(Finding::ok("policies", format!("{count} policies are enforced as they are written")));
    }
    findings
}

fn told(object: &Value, problems: Vec<crate::policy::Problem>) -> Vec<Finding> {
    let told = problems.into_iter().map(|problem| {
        let message = format!("{}: {}: `{}`; {}", ObjectRef::of(object), problem.field, problem.value, problem.effect);
        Finding::warning("policies", message, problem.message)
    });
    told.collect()
}

fn ignored(object: &Value, error: &str) -> Finding {
    let message = format!("{} is not in force: {error}", ObjectRef::of(object));
    Finding::error("policies", message, "correct the object")
}

/// What one agent says of itself in its metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Told {
    /// Pods that it captures.
    pub(super) enrolled: Option<u64>,
    /// Whether it has a controller.
    pub(super) connected: Option<bool>,
    /// When the first of its certificates expires, in seconds since 1970.
    pub(super) next_expiry: Option<u64>,
}

impl Told {
    /// Reads a page of OpenMetrics text.
    pub(super) fn read(page: &str) -> Self {
        let value = |line: &str| line.rsplit_once(' ').and_then(|(_, value)| value.parse::<u64>().ok());
        let first = |name: &str| page.lines().find(|line| line.split(['{', ' ']).next() == Some(name)).and_then(value);
        let expiries = page.lines().filter(|line| line.starts_with("culvert_certificate_expiry_timestamp_seconds{"));
        Self {
            enrolled: first("culvert_enrolled_pods"),
            connected: first("culvert_xds_connected").map(|connected| connected == 1),
            next_expiry: expiries.filter_map(value).min(),
        }
    }
}

/// How many running pods of each node are enrolled by their labels.
pub(super) fn labelled(namespaces: &[Value], pods: &[Value], excluded: &BTreeSet<String>) -> BTreeMap<String, u64> {
    let of_namespaces: BTreeMap<String, bool> =
        namespaces.iter().filter_map(|namespace| Some((ObjectRef::of(namespace).name, enrolment(&labels(namespace))?))).collect();
    let mut counts = BTreeMap::new();
    for pod in pods {
        let namespace = ObjectRef::of(pod).namespace.unwrap_or_default();
        let runs = pod["status"]["phase"] == "Running" && pod["spec"]["hostNetwork"] != true;
        let labelled = enrolment(&labels(pod)).or_else(|| of_namespaces.get(&namespace).copied());
        if runs && labelled == Some(true) && !excluded.contains(&namespace) {
            let node = pod["spec"]["nodeName"].as_str().unwrap_or_default();
            *counts.entry(node.to_owned()).or_default() += 1;
        }
    }
    counts
}

fn labels(object: &Value) -> BTreeMap<String, String> {
    let labels = object["metadata"]["labels"].as_object().into_iter().flatten();
    labels.filter_map(|(name, value)| Some((name.clone(), value.as_str()?.to_owned()))).collect()
}

/// What agents say, against what labels ask for.
pub(super) fn captured(agents: &BTreeMap<String, Told>, labelled: &BTreeMap<String, u64>) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (node, told) in agents {
        let wanted = labelled.get(node).copied().unwrap_or(0);
        if told.connected == Some(false) {
            let message = format!("the agent on {node} has no connection to a controller: it goes on with what it knows");
            findings.push(Finding::error("agents", message, "see its log: name, network policy and token of the controller"));
        }
        if let Some(enrolled) = told.enrolled.filter(|enrolled| *enrolled < wanted) {
            let message = format!(
                "{wanted} running pods on {node} are enrolled by label, and {enrolled} are captured: the others are closed"
            );
            let remedy = "if it stays so: see the agent's log, and `culvert check --node` there";
            findings.push(Finding::error("enrolment", message, remedy));
        }
    }
    if findings.is_empty() && !agents.is_empty() {
        let total: u64 = labelled.values().sum();
        findings.push(Finding::ok("enrolment", format!("all {total} running pods that are enrolled by label are captured")));
    }
    findings
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::diagnosis::{Severity, worst};

    #[test]
    fn what_cannot_be_enforced_is_told_with_the_field_and_what_to_write() {
        let mesh =
            MeshContext { root_namespace: "istio-system".to_owned(), trust_domain: "cluster.local".parse().expect("a domain") };
        let policy = |spec: Value| json!({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": {"name": "p", "namespace": "shop"}, "spec": spec});
        let http = policy(json!({"rules": [{"to": [{"operation": {"methods": ["GET"]}}]}]}));
        let findings = policies(&[], &[http], &mesh);
        assert_eq!(worst(&findings), Severity::Warning);
        assert!(findings[0].message.starts_with("AuthorizationPolicy shop/p: spec.rules[0]"), "{findings:?}");
        let misspelt = policy(json!({"rule": []}));
        assert_eq!(worst(&policies(&[], &[misspelt], &mesh)), Severity::Error);
        assert_eq!(worst(&policies(&[], &[policy(json!({}))], &mesh)), Severity::Ok);
    }

    #[test]
    fn an_agents_page_tells_of_pods_controller_and_certificates() {
        let page = "# TYPE culvert_enrolled_pods gauge\nculvert_enrolled_pods 3\nculvert_xds_connected 0\n\
            culvert_certificate_expiry_timestamp_seconds{identity=\"a\"} 1900\n\
            culvert_certificate_expiry_timestamp_seconds{identity=\"b\"} 1800\n# EOF\n";
        let told = Told { enrolled: Some(3), connected: Some(false), next_expiry: Some(1800) };
        assert_eq!(Told::read(page), told);
        assert_eq!(Told::read("nonsense"), Told::default());
    }

    #[test]
    fn labels_of_pods_win_over_those_of_namespaces_and_excluded_namespaces_never_join() {
        let namespace = |name: &str, labels: Value| json!({"metadata": {"name": name, "labels": labels}});
        let pod = |namespace: &str, labels: Value, host_network: bool, phase: &str| {
            json!({"metadata": {"name": "p", "namespace": namespace, "labels": labels},
                "spec": {"nodeName": "n", "hostNetwork": host_network}, "status": {"phase": phase}})
        };
        let (enabled, disabled) = (json!({"culvert.dev/mesh": "enabled"}), json!({"culvert.dev/mesh": "disabled"}));
        let namespaces =
            [namespace("in", enabled.clone()), namespace("out", json!({})), namespace("kube-system", enabled.clone())];
        let pods = [
            pod("in", json!({}), false, "Running"),
            pod("in", disabled, false, "Running"),
            pod("in", json!({}), true, "Running"),
            pod("in", json!({}), false, "Succeeded"),
            pod("out", json!({}), false, "Running"),
            pod("out", enabled, false, "Running"),
            pod("kube-system", json!({}), false, "Running"),
        ];
        let excluded = BTreeSet::from(["kube-system".to_owned()]);
        assert_eq!(labelled(&namespaces, &pods, &excluded), BTreeMap::from([("n".to_owned(), 2)]));
    }

    #[test]
    fn pods_that_are_labelled_and_not_captured_are_an_error() {
        let agents = |enrolled: u64, connected: bool| {
            BTreeMap::from([("n".to_owned(), Told { enrolled: Some(enrolled), connected: Some(connected), next_expiry: None })])
        };
        let labelled = BTreeMap::from([("n".to_owned(), 2)]);
        assert_eq!(worst(&captured(&agents(2, true), &labelled)), Severity::Ok);
        assert_eq!(worst(&captured(&agents(1, true), &labelled)), Severity::Error);
        assert_eq!(worst(&captured(&agents(2, false), &labelled)), Severity::Error);
        assert!(captured(&BTreeMap::new(), &labelled).is_empty());
    }
}
