//! A pod on each node that takes the programs out of its kernel.
//!
//! It is made from the agent's own pod, so that it has the same image, paths, capabilities and tolerations; only what it runs is
//! another, and what it does not need is left out.

use std::collections::BTreeMap;
use std::time::Duration;

use futures_util::StreamExt as _;
use serde_json::{Map, Value, json};
use tokio::time::Instant;

use super::{Outcome, Removal, remove};
use crate::installation::cluster::{Cluster, ClusterError, ObjectRef, Which};
use crate::installation::install::Step;
use crate::installation::rollout::{self, complaint};
use crate::installation::{InstallError, Values, chart};

/// The label of these pods.
const NAME: &str = "culvert-leave";
/// Flags of the agent's that say where things are on the node.
const PLACES: [&str; 3] = ["--bpf-dir=", "--netns-dir=", "--state-dir="];

/// Cleans every node that runs pods, and waits for it. `agents` is the DaemonSet as it was installed, if it was.
pub(super) async fn every_node(
    cluster: &Cluster,
    removal: &Removal,
    agents: Option<&Value>,
    outcome: &mut Outcome,
    tell: &mut impl FnMut(Step),
) -> Result<(), InstallError> {
    let fallback = if agents.is_some() { Value::Null } else { default_agents(cluster, &removal.namespace)? };
    let template = &agents.unwrap_or(&fallback)["spec"]["template"];
    let labels = format!("app.kubernetes.io/name={NAME}");
    let pods = Which::labelled(&removal.namespace, &labels);
    // Those of an earlier try: a pod cannot be made to run again.
    for pod in outcome.note(cluster.list("v1", "Pod", pods).await).unwrap_or_default() {
        outcome.note(cluster.delete(&ObjectRef::of(&pod)).await);
    }
    outcome.note(rollout::wait_for_no_pods(cluster, &removal.namespace, &labels, removal.limit).await);
    let Some(nodes) = outcome.note(cluster.list("v1", "Node", Which::default()).await) else { return Ok(()) };
    let mut waiting = BTreeMap::new();
    for node in nodes.iter().filter(|node| node["metadata"]["labels"]["kubernetes.io/os"] != "windows") {
        let name = ObjectRef::of(node).name;
        let pod = pod(template, &removal.namespace, &name);
        let reference = ObjectRef::of(&pod);
        if outcome.note(cluster.apply(&pod).await).is_some() {
            waiting.insert(reference.name, name);
        }
    }
    outcome.note(wait(cluster, pods, removal.limit, &mut waiting).await);
    for node in waiting.values() {
        outcome.failures.push(format!(
            "node {node} was not cleaned: run this again when it is ready, or `culvert uninstall --node {node}` on it"
        ));
    }
    for pod in outcome.note(cluster.list("v1", "Pod", pods).await).unwrap_or_default() {
        if waiting.contains_key(&ObjectRef::of(&pod).name) {
            outcome.failures.extend(complaint(&pod));
        }
        remove(cluster, &ObjectRef::of(&pod), outcome, tell).await;
    }
    Ok(())
}

/// Waits until the pods of all nodes in `waiting`, by their own names, have done their work; takes those that have out of it.
async fn wait(
    cluster: &Cluster,
    pods: Which<'_>,
    limit: Duration,
    waiting: &mut BTreeMap<String, String>,
) -> Result<(), ClusterError> {
    let deadline = Instant::now() + limit;
    while !waiting.is_empty() && Instant::now() < deadline {
        let mut events = cluster.watch("v1", "Pod", pods).await?;
        while !waiting.is_empty() {
            let Ok(Some(event)) = tokio::time::timeout_at(deadline, events.next()).await else { break };
            let (pod, _) = event?;
            if pod["status"]["phase"] == "Succeeded" {
                waiting.remove(&ObjectRef::of(&pod).name);
            }
        }
        if !waiting.is_empty() {
            tokio::time::sleep_until(deadline.min(Instant::now() + rollout::PAUSE)).await;
        }
    }
    Ok(())
}

/// The agents of the chart's defaults, for where they are gone already.
fn default_agents(cluster: &Cluster, namespace: &str) -> Result<Value, InstallError> {
    let values = Values::merge(&[], &[])?;
    let target = chart::Target { namespace: namespace.to_owned(), api_versions: cluster.api_versions().to_vec() };
    let mut objects = chart::render(&values, &target)?.into_iter().flat_map(|file| file.objects);
    Ok(objects.find(|object| object["kind"] == "DaemonSet").unwrap_or_default())
}

/// The pod for `node`, from the agents' pod template.
fn pod(template: &Value, namespace: &str, node: &str) -> Value {
    let (metadata, template) = (&template["metadata"], &template["spec"]);
    let agent = &template["containers"][0];
    // Before it was a field, what confines a container was an annotation that names it.
    let annotations = metadata["annotations"].as_object().into_iter().flatten();
    let confinement: Map<_, _> = annotations
        .filter(|(name, _)| name.starts_with("container.apparmor."))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    let arguments = agent["args"].as_array().into_iter().flatten().filter_map(Value::as_str);
    let places = arguments.filter(|argument| PLACES.iter().any(|place| argument.starts_with(place)));
    let mut arguments = vec!["uninstall".to_owned(), format!("--node={node}")];
    arguments.extend(places.map(str::to_owned));
    let on_host = |volume: &&Value| volume["hostPath"].is_object();
    let volumes: Vec<&Value> = template["volumes"].as_array().into_iter().flatten().filter(on_host).collect();
    let is_there = |mount: &&Value| volumes.iter().any(|volume| volume["name"] == mount["name"]);
    let mounts: Vec<&Value> = agent["volumeMounts"].as_array().into_iter().flatten().filter(is_there).collect();
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": format!("{NAME}-{node}"),
            "namespace": namespace,
            "labels": {"app.kubernetes.io/name": NAME, "app.kubernetes.io/part-of": "culvert"},
            "annotations": confinement,
        },
        "spec": {
            "nodeName": node,
            "restartPolicy": "OnFailure",
            "hostNetwork": true,
            "hostPID": true,
            "automountServiceAccountToken": false,
            "tolerations": [{"operator": "Exists"}],
            "imagePullSecrets": template["imagePullSecrets"].as_array().cloned().unwrap_or_default(),
            "containers": [{
                "name": agent["name"],
                "image": agent["image"],
                "imagePullPolicy": agent["imagePullPolicy"],
                "args": arguments,
                "terminationMessagePolicy": "FallbackToLogsOnError",
                "securityContext": agent["securityContext"],
                "volumeMounts": mounts,
            }],
            "volumes": volumes,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pod_is_the_agents_without_what_it_does_not_need() {
        let values = Values::merge(&[], &["agent.bpffsDir=/mnt/bpf".to_owned()]).expect("values");
        let rendered = chart::render(&values, &chart::Target::unasked(chart::NAMESPACE)).expect("rendered");
        let agents = rendered.iter().flat_map(|file| &file.objects).find(|object| object["kind"] == "DaemonSet").expect("agents");
        let pod = pod(&agents["spec"]["template"], "culvert-system", "node.example");
        let template = &agents["spec"]["template"]["spec"];
        let container = &pod["spec"]["containers"][0];
        assert_eq!(
            container["args"],
            json!([
                "uninstall",
                "--node=node.example",
                "--netns-dir=/run/netns",
                "--bpf-dir=/mnt/bpf/culvert",
                "--state-dir=/var/lib/culvert"
            ])
        );
        assert_eq!(container["securityContext"], template["containers"][0]["securityContext"]);
        assert_eq!(container["image"], template["containers"][0]["image"]);
        let names = |list: &Value| list.as_array().expect("a list").iter().map(|item| item["name"].clone()).collect::<Vec<_>>();
        assert_eq!(names(&pod["spec"]["volumes"]), ["netns", "bpffs", "state", "cgroup"]);
        assert_eq!(names(&container["volumeMounts"]), ["netns", "bpffs", "state", "cgroup"]);
        assert!(container.get("readinessProbe").is_none() && container.get("ports").is_none());
        assert_eq!(pod["spec"]["nodeName"], "node.example");
        assert_eq!(pod["metadata"]["annotations"], json!({"container.apparmor.security.beta.kubernetes.io/agent": "unconfined"}));
    }
}
