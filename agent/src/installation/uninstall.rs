//! Taking Culvert off a cluster, from the nodes' kernels and from the API.
//!
//! Enters: a cluster. Leaves: nothing of Culvert's. Agents leave their programs in force when they end, so that an enrolled pod is
//! closed and not open; here a short-lived pod on each node takes them out. Every step is tried, and all failures are told; what
//! belongs to the user (policies, `cacerts`, a namespace that Culvert did not make) stays.

mod leave;

use std::time::Duration;

use serde_json::Value;
use tokio::time::Instant;

use super::InstallError;
use super::cluster::{Cluster, ClusterError, ObjectRef, Which};
use super::install::{Change, Step};
use super::rollout;

/// What every object of the chart is labelled with.
const PART_OF: &str = "app.kubernetes.io/part-of=culvert";

/// The chart's kinds in its namespace, by group; workloads are removed before.
const NAMESPACED: [(&str, &str); 8] = [
    ("", "Service"),
    ("networking.k8s.io", "NetworkPolicy"),
    ("policy", "PodDisruptionBudget"),
    ("rbac.authorization.k8s.io", "RoleBinding"),
    ("rbac.authorization.k8s.io", "Role"),
    ("", "ServiceAccount"),
    ("", "ResourceQuota"),
    ("coordination.k8s.io", "Lease"),
];
/// The chart's kinds of the whole cluster, by group.
const CLUSTER_WIDE: [(&str, &str); 2] =
    [("rbac.authorization.k8s.io", "ClusterRoleBinding"), ("rbac.authorization.k8s.io", "ClusterRole")];

/// What the controller makes: the root certificate in namespaces, in the whole cluster, and the authority's key.
const ROOT_CONFIG_MAP: &str = "culvert-root-cert";
const ROOT_BUNDLE: &str = "culvert.dev:mesh:root";
const AUTHORITY: &str = "culvert-ca";
/// The user's own intermediate.
const USERS_AUTHORITY: &str = "cacerts";

/// What is to be removed.
#[derive(Clone, Debug)]
pub struct Removal {
    /// Where Culvert is.
    pub namespace: String,
    /// How long pods may take to end, and nodes to be cleaned.
    pub limit: Duration,
}

/// How it went.
#[derive(Debug, Default)]
pub struct Outcome {
    /// What is left and why, a sentence each.
    pub failures: Vec<String>,
    /// What was left on purpose, a sentence each.
    pub kept: Vec<String>,
}

impl Outcome {
    /// Keeps a failure, and gives what there was otherwise.
    fn note<T>(&mut self, result: Result<T, ClusterError>) -> Option<T> {
        result.map_err(|error| self.failures.push(error.to_string())).ok()
    }
}

/// Removes everything. `tell` hears of each object.
///
/// # Errors
/// [`InstallError`] when the chart cannot be rendered; what fails on the cluster is in the [`Outcome`].
pub async fn uninstall(cluster: &Cluster, removal: &Removal, mut tell: impl FnMut(Step)) -> Result<Outcome, InstallError> {
    let mut outcome = Outcome::default();
    let namespace = removal.namespace.as_str();
    let workload = |kind: &str, name: &str| ObjectRef::namespaced("apps/v1", kind, namespace, name);
    let agents = workload("DaemonSet", "culvert-agent");
    let installed = outcome.note(cluster.get(&agents).await).flatten();
    // Without agents nothing is enrolled anew, and without controllers nothing is published anew.
    for workload in [agents, workload("Deployment", "culvert-controller")] {
        remove(cluster, &workload, &mut outcome, &mut tell).await;
        let labels = format!("app.kubernetes.io/name={}", workload.name);
        outcome.note(rollout::wait_for_no_pods(cluster, namespace, &labels, removal.limit).await);
    }
    leave::every_node(cluster, removal, installed.as_ref(), &mut outcome, &mut tell).await?;
    remove_published(cluster, namespace, &mut outcome, &mut tell).await;
    for (group, kind) in NAMESPACED {
        remove_labelled(cluster, (group, kind), Which::labelled(namespace, PART_OF), &mut outcome, &mut tell).await;
    }
    for (group, kind) in CLUSTER_WIDE {
        remove_labelled(cluster, (group, kind), Which { labels: PART_OF, ..Which::default() }, &mut outcome, &mut tell).await;
    }
    remove_definitions(cluster, &mut outcome, &mut tell).await;
    remove_namespace(cluster, removal, &mut outcome, &mut tell).await;
    Ok(outcome)
}

async fn remove(cluster: &Cluster, object: &ObjectRef, outcome: &mut Outcome, tell: &mut impl FnMut(Step)) {
    if outcome.note(cluster.delete(object).await) == Some(true) {
        tell(Step::Object(object.clone(), Change::Removed));
    }
}

async fn remove_published(cluster: &Cluster, namespace: &str, outcome: &mut Outcome, tell: &mut impl FnMut(Step)) {
    let fields = format!("metadata.name={ROOT_CONFIG_MAP}");
    let which = Which { fields: &fields, ..Which::default() };
    for object in outcome.note(cluster.list("v1", "ConfigMap", which).await).unwrap_or_default() {
        remove(cluster, &ObjectRef::of(&object), outcome, tell).await;
    }
    if let Some(version) = cluster.version_of("certificates.k8s.io", "ClusterTrustBundle") {
        let bundle = ObjectRef {
            api_version: version.to_owned(),
            kind: "ClusterTrustBundle".to_owned(),
            namespace: None,
            name: ROOT_BUNDLE.to_owned(),
        };
        remove(cluster, &bundle, outcome, tell).await;
    }
    remove(cluster, &ObjectRef::namespaced("v1", "Secret", namespace, AUTHORITY), outcome, tell).await;
}

async fn remove_labelled(
    cluster: &Cluster,
    (group, kind): (&str, &str),
    which: Which<'_>,
    outcome: &mut Outcome,
    tell: &mut impl FnMut(Step),
) {
    let Some(version) = cluster.version_of(group, kind) else { return };
    for object in outcome.note(cluster.list(version, kind, which).await).unwrap_or_default() {
        remove(cluster, &ObjectRef::of(&object), outcome, tell).await;
    }
}

/// Removes the kinds that Culvert made, unless they have objects: those are the user's policies, and would go with them.
async fn remove_definitions(cluster: &Cluster, outcome: &mut Outcome, tell: &mut impl FnMut(Step)) {
    let Some(version) = cluster.version_of("apiextensions.k8s.io", "CustomResourceDefinition") else { return };
    let which = Which { labels: PART_OF, ..Which::default() };
    let definitions = cluster.list(version, "CustomResourceDefinition", which).await;
    for definition in outcome.note(definitions).unwrap_or_default() {
        let text = |path: &str| definition.pointer(path).and_then(Value::as_str).unwrap_or_default().to_owned();
        let (group, kind) = (text("/spec/group"), text("/spec/names/kind"));
        let objects = match cluster.version_of(&group, &kind) {
            Some(version) => outcome.note(cluster.list(version, &kind, Which::default()).await),
            None => Some(Vec::new()),
        };
        match objects {
            Some(objects) if objects.is_empty() => remove(cluster, &ObjectRef::of(&definition), outcome, tell).await,
            Some(objects) => outcome.kept.push(format!(
                "the kind {kind}, with {} objects of yours; `kubectl delete crd {}` removes both",
                objects.len(),
                text("/metadata/name")
            )),
            None => {}
        }
    }
}

async fn remove_namespace(cluster: &Cluster, removal: &Removal, outcome: &mut Outcome, tell: &mut impl FnMut(Step)) {
    let namespace = removal.namespace.as_str();
    let reference =
        ObjectRef { api_version: "v1".to_owned(), kind: "Namespace".to_owned(), namespace: None, name: namespace.to_owned() };
    let Some(Some(found)) = outcome.note(cluster.get(&reference).await) else { return };
    let label = |name: &str| found["metadata"]["labels"][name] == "culvert";
    if !(label("app.kubernetes.io/part-of") && label("app.kubernetes.io/managed-by")) {
        outcome.kept.push(format!("the namespace {namespace}, which Culvert did not make"));
        return;
    }
    let users = ObjectRef::namespaced("v1", "Secret", namespace, USERS_AUTHORITY);
    if outcome.note(cluster.get(&users).await).is_some_and(|secret| secret.is_some()) {
        outcome.kept.push(format!("the namespace {namespace}, for your Secret {USERS_AUTHORITY} in it"));
        return;
    }
    if outcome.failures.is_empty() {
        remove(cluster, &reference, outcome, tell).await;
        outcome.note(wait_until_gone(cluster, &reference, removal.limit).await);
    } else {
        outcome.kept.push(format!("the namespace {namespace}, until the rest is gone; run this again"));
    }
}

/// The API server empties a namespace first, and takes nothing new into it meanwhile: not the next installation, either.
async fn wait_until_gone(cluster: &Cluster, namespace: &ObjectRef, limit: Duration) -> Result<(), ClusterError> {
    let deadline = Instant::now() + limit;
    while let Some(found) = cluster.get(namespace).await? {
        if Instant::now() >= deadline {
            let why = found["status"]["conditions"].to_string();
            return Err(ClusterError::Late { what: format!("{namespace} is not gone"), seconds: limit.as_secs(), why });
        }
        tokio::time::sleep(rollout::PAUSE).await;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
