//! A whole cluster, by its API.
//!
//! What cannot be read becomes a warning that says so, and the rest is looked at all the same.

use std::collections::{BTreeMap, BTreeSet};
use std::time::SystemTime;

use futures_util::StreamExt as _;
use serde_json::{Value, json};

use super::mesh::Told;
use super::{Finding, certificates, clock, mesh, nodes, workloads};
use crate::installation::cluster::{Cluster, ClusterError, ObjectRef, Which};
use crate::model::TrustDomain;
use crate::policy::compile::MeshContext;

/// Agents that are asked at once.
const AT_ONCE: usize = 16;
/// What the controller must be allowed, each with a name if the rule has one: verb, group, resource, name.
const CONTROLLER_NEEDS: [(&str, &str, &str, &str); 8] = [
    ("watch", "", "pods", ""),
    ("watch", "", "nodes", ""),
    ("watch", "", "namespaces", ""),
    ("watch", "", "services", ""),
    ("watch", "discovery.k8s.io", "endpointslices", ""),
    ("create", "authentication.k8s.io", "tokenreviews", ""),
    ("get", "", "secrets", "culvert-ca"),
    ("patch", "", "configmaps", "culvert-root-cert"),
];

/// Looks at everything.
pub async fn check(cluster: &Cluster, namespace: &str, now: SystemTime) -> Vec<Finding> {
    let mut asked = Asked { cluster, findings: Vec::new() };
    asked.api(now).await;
    asked.controllers_permissions(namespace).await;
    let nodes = asked.list("", "Node", Which::default()).await;
    asked.findings.extend(nodes::check(&nodes));
    asked.clocks(&nodes).await;
    let deployment = asked.workload("Deployment", "culvert-controller", namespace).await;
    let controllers = asked.pods("culvert-controller", namespace).await;
    asked.findings.extend(workloads::check("controller", "culvert-controller", deployment.as_ref(), &controllers));
    let agents = asked.workload("DaemonSet", "culvert-agent", namespace).await;
    let agent_pods = asked.pods("culvert-agent", namespace).await;
    asked.findings.extend(workloads::check("agents", "culvert-agent", agents.as_ref(), &agent_pods));
    if agents.is_some() {
        asked.findings.extend(workloads::nodes_without(&nodes, &agent_pods));
    }
    asked.findings.extend(workloads::releases(&controllers, &agent_pods));
    asked.authority(namespace, now).await;
    let settings = Settings::of(deployment.as_ref(), namespace);
    asked.policies(&settings).await;
    asked.agents(&agent_pods, namespace, &settings, now).await;
    asked.findings
}

/// A cluster, and what was found so far.
struct Asked<'a> {
    cluster: &'a Cluster,
    findings: Vec<Finding>,
}

/// What the controller was told, as far as a check depends on it.
struct Settings {
    mesh: Option<MeshContext>,
    excluded: BTreeSet<String>,
}

impl Settings {
    fn of(deployment: Option<&Value>, namespace: &str) -> Self {
        let arguments = deployment.and_then(|object| object.pointer("/spec/template/spec/containers/0/args")?.as_array());
        let arguments: Vec<&str> = arguments.into_iter().flatten().filter_map(Value::as_str).collect();
        let all = |flag: &str| {
            arguments.iter().filter_map(|argument| argument.strip_prefix(flag)).map(str::to_owned).collect::<Vec<_>>()
        };
        let last = |flag: &str, default: &str| all(flag).pop().unwrap_or_else(|| default.to_owned());
        let trust_domain = last("--trust-domain=", "cluster.local").parse::<TrustDomain>().ok();
        let root_namespace = last("--root-namespace=", "istio-system");
        let excluded = all("--exclude-namespace=").into_iter().chain([namespace.to_owned()]).collect();
        Self { mesh: trust_domain.map(|trust_domain| MeshContext { root_namespace, trust_domain }), excluded }
    }
}

impl Asked<'_> {
    /// Keeps what could not be read as a warning.
    fn note<T>(&mut self, result: Result<T, ClusterError>) -> Option<T> {
        let error = match result {
            Ok(value) => return Some(value),
            Err(error) => error,
        };
        let remedy = if error.is_forbidden() {
            "ask for the right to read it: this check knows only what you may see"
        } else {
            "see that the API server answers"
        };
        self.findings.push(Finding::warning("permissions", error.to_string(), remedy));
        None
    }

    /// All objects of a kind; none where the API has no such kind.
    async fn list(&mut self, group: &str, kind: &str, which: Which<'_>) -> Vec<Value> {
        let Some(version) = self.cluster.version_of(group, kind).map(str::to_owned) else { return Vec::new() };
        let listed = self.cluster.list(&version, kind, which).await;
        self.note(listed).unwrap_or_default()
    }

    async fn workload(&mut self, kind: &str, name: &str, namespace: &str) -> Option<Value> {
        let found = self.cluster.get(&ObjectRef::namespaced("apps/v1", kind, namespace, name)).await;
        self.note(found).flatten()
    }

    async fn pods(&mut self, name: &str, namespace: &str) -> Vec<Value> {
        let labels = format!("app.kubernetes.io/name={name}");
        self.list("", "Pod", Which::labelled(namespace, &labels)).await
    }

    async fn api(&mut self, now: SystemTime) {
        let clock = self.cluster.clock().await;
        if let Some(api) = self.note(clock).flatten() {
            self.findings.push(clock::of_the_asker(now, api));
        }
        let missing: Vec<&str> = ["PeerAuthentication", "AuthorizationPolicy"]
            .into_iter()
            .filter(|kind| self.cluster.version_of("security.istio.io", kind).is_none())
            .collect();
        self.findings.push(match missing.as_slice() {
            [] => Finding::ok("definitions", "the API has the kinds that policies are written in"),
            missing => Finding::warning(
                "definitions",
                format!("the API has no {}: nobody can write policies", missing.join(" and no ")),
                "culvert install makes them, unless it is told --skip-crds",
            ),
        });
    }

    async fn controllers_permissions(&mut self, namespace: &str) {
        let mut denied = Vec::new();
        for (verb, group, resource, name) in CONTROLLER_NEEDS {
            let mut attributes = json!({"verb": verb, "group": group, "resource": resource, "name": name});
            if resource == "secrets" {
                attributes["namespace"] = namespace.into();
            }
            let review = json!({
                "apiVersion": "authorization.k8s.io/v1",
                "kind": "SubjectAccessReview",
                "spec": {"user": format!("system:serviceaccount:{namespace}:culvert-controller"), "resourceAttributes": attributes},
            });
            let answer = self.cluster.create(&review).await;
            // Who may not ask for one may not ask for the others.
            let Some(answer) = self.note(answer) else { return };
            if answer["status"]["allowed"] != true {
                denied.push(format!("{verb} {resource}{}{name}", if name.is_empty() { "" } else { " " }));
            }
        }
        self.findings.push(if denied.is_empty() {
            Finding::ok("permissions", "the controller may do what it must")
        } else {
            let message = format!("the controller may not {}", denied.join(", "));
            Finding::error("permissions", message, "culvert install brings its roles back")
        });
    }

    async fn clocks(&mut self, nodes: &[Value]) {
        let leases =
            self.list("coordination.k8s.io", "Lease", Which { namespace: Some("kube-node-lease"), ..Which::default() }).await;
        let clock = self.cluster.clock().await;
        let Some(api) = self.note(clock).flatten() else { return };
        let known: BTreeSet<String> = nodes.iter().map(|node| ObjectRef::of(node).name).collect();
        let leases = leases.iter().map(|lease| (ObjectRef::of(lease).name, lease)).filter(|(name, _)| known.contains(name));
        let wrong: Vec<Finding> = leases.filter_map(|(name, lease)| clock::of_node(&name, lease, api)).collect();
        if wrong.is_empty() && !known.is_empty() {
            self.findings.push(Finding::ok("clock", "no node's clock is off, by its lease"));
        }
        self.findings.extend(wrong);
    }

    async fn authority(&mut self, namespace: &str, now: SystemTime) {
        let roots = self.cluster.get(&ObjectRef::namespaced("v1", "ConfigMap", namespace, "culvert-root-cert")).await;
        let Some(roots) = self.note(roots) else { return };
        match roots.as_ref().and_then(|roots| roots["data"]["root-cert.pem"].as_str()) {
            Some(pem) => self.findings.extend(certificates::authority("the root certificate", pem.as_bytes(), now)),
            None => self.findings.push(Finding::error(
                "certificates",
                format!("there is no ConfigMap {namespace}/culvert-root-cert: agents cannot start"),
                "see the controller's log",
            )),
        }
    }

    async fn policies(&mut self, settings: &Settings) {
        let peers = self.list("security.istio.io", "PeerAuthentication", Which::default()).await;
        let rules = self.list("security.istio.io", "AuthorizationPolicy", Which::default()).await;
        if let Some(mesh) = &settings.mesh {
            self.findings.extend(mesh::policies(&peers, &rules, mesh));
        }
    }

    async fn agents(&mut self, pods: &[Value], namespace: &str, settings: &Settings, now: SystemTime) {
        let cluster = self.cluster;
        let running = pods.iter().filter(|pod| pod["status"]["phase"] == "Running");
        let asked = running.map(|pod| {
            let (name, node) = (ObjectRef::of(pod).name, pod["spec"]["nodeName"].as_str().unwrap_or_default().to_owned());
            let path = format!("/api/v1/namespaces/{namespace}/pods/{name}:15020/proxy/metrics");
            async move { (node, cluster.text(&path).await) }
        });
        let answers: Vec<_> = futures_util::stream::iter(asked).buffer_unordered(AT_ONCE).collect().await;
        let mut told = BTreeMap::new();
        let mut silent = Vec::new();
        for (node, answer) in answers {
            match answer {
                Ok(page) => drop(told.insert(node, Told::read(&page))),
                Err(error) => silent.push(format!("{node} ({error})")),
            }
        }
        if let Some(first) = silent.first() {
            let message = format!("{} agents could not be asked for their metrics, such as that on {first}", silent.len());
            let remedy = "see that you may use pods/proxy, and that the API server reaches port 15020 of nodes";
            self.findings.push(Finding::warning("agents", message, remedy));
        }
        let namespaces = self.list("", "Namespace", Which::default()).await;
        let all_pods = self.list("", "Pod", Which::default()).await;
        let labelled = mesh::labelled(&namespaces, &all_pods, &settings.excluded);
        self.findings.extend(mesh::captured(&told, &labelled));
        self.findings.extend(told.iter().filter_map(|(node, told)| certificates::held(node, told.next_expiry, now)));
    }
}

#[cfg(test)]
mod tests;
