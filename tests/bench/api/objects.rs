//! The objects of a large cluster, and the changes of some of them.

use anyhow::{Context as _, Result, ensure};
use futures_util::{StreamExt as _, TryStreamExt as _};
use http::Method;
use kube::Client;
use serde_json::{Value, json};

use super::send;

/// How many nodes there are.
pub(crate) const NODES: usize = 500;
/// How many pods, beside an agent for each node.
pub(crate) const PODS: usize = 10_000;
/// How many pods are behind each service.
const A_SERVICE: usize = 20;
const NAMESPACES: usize = 50;
/// Where agents and controller are.
pub(crate) const SYSTEM: &str = "culvert-system";
const AGENT: &str = "culvert-agent";
/// How many objects there are, without namespaces and the account.
pub(crate) const COUNT: usize = NODES + PODS + NODES + PODS / A_SERVICE * 2;
/// Whom an agent's token is for.
const AUDIENCE: &str = "culvert-controller";
/// Requests under way.
const AT_ONCE: usize = 48;

/// An object to be made: in which collection, and with what status, which is given to it afterwards.
struct Wanted {
    collection: String,
    object: Value,
    status: Option<Value>,
}

/// Makes all objects.
pub(crate) async fn make(client: &Client) -> Result<()> {
    let namespaces = (0..NAMESPACES).map(team).map(|name| (name, json!({"culvert.dev/mesh": "enabled"})));
    let namespaces = namespaces.chain([(SYSTEM.to_owned(), json!({}))]).map(|(name, labels)| Wanted {
        collection: "/api/v1/namespaces".to_owned(),
        object: json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}),
        status: None,
    });
    make_all(client, namespaces).await?;
    let account = Wanted {
        collection: format!("/api/v1/namespaces/{SYSTEM}/serviceaccounts"),
        object: json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": AGENT}}),
        status: None,
    };
    make_all(client, [account].into_iter().chain((0..NODES).map(node))).await?;
    make_all(client, (0..PODS / A_SERVICE).flat_map(|group| [service(group), slice(group)])).await?;
    make_all(client, (0..NODES).map(agent).chain((0..PODS).map(pod))).await
}

async fn make_all(client: &Client, wanted: impl Iterator<Item = Wanted>) -> Result<()> {
    let made = futures_util::stream::iter(wanted).map(|wanted| make_one(client, wanted)).buffer_unordered(AT_ONCE);
    made.try_collect().await
}

async fn make_one(client: &Client, Wanted { collection, object, status }: Wanted) -> Result<()> {
    crate::interrupt::check()?;
    send(client, Method::POST, &collection, &object).await?;
    if let Some(status) = status {
        let name = object["metadata"]["name"].as_str().context("an object without a name")?;
        send(client, Method::PATCH, &format!("{collection}/{name}/status"), &json!({"status": status})).await?;
    }
    Ok(())
}

/// Says of a pod that it is not ready any more.
pub(crate) async fn set_unready(client: &Client, number: usize) -> Result<()> {
    let path = format!("{}/{}/status", pods_of(&team_of(number)), pod_name(number));
    send(client, Method::PATCH, &path, &json!({"status": {"conditions": conditions(false)}})).await.map(drop)
}

/// The name of a pod's resource, as agents hear of it.
pub(crate) fn resource_name(number: usize) -> String {
    format!("Kubernetes//Pod/{}/{}", team_of(number), pod_name(number))
}

/// The token of a node's agent, as its kubelet would get it: bound to the agent's pod.
pub(crate) async fn token(client: &Client, node: usize) -> Result<String> {
    let request = json!({
        "apiVersion": "authentication.k8s.io/v1",
        "kind": "TokenRequest",
        "spec": {
            "audiences": [AUDIENCE],
            "expirationSeconds": 7200,
            "boundObjectRef": {"apiVersion": "v1", "kind": "Pod", "name": agent_name(node)},
        },
    });
    let path = format!("/api/v1/namespaces/{SYSTEM}/serviceaccounts/{AGENT}/token");
    let answer = send(client, Method::POST, &path, &request).await?;
    let token = answer["status"]["token"].as_str().context("an answer without a token")?;
    ensure!(!token.is_empty(), "an empty token");
    Ok(token.to_owned())
}

/// The tokens of all nodes' agents, in the order of the nodes.
pub(crate) async fn tokens(client: &Client) -> Result<Vec<String>> {
    futures_util::stream::iter(0..NODES).map(|node| token(client, node)).buffered(AT_ONCE).try_collect().await
}

/// The roots that the controller has published.
pub(crate) async fn roots(client: &Client) -> Result<String> {
    let path = format!("/api/v1/namespaces/{SYSTEM}/configmaps/culvert-root-cert");
    let object: Value = client.request(http::Request::get(path).body(Vec::new())?).await?;
    Ok(object["data"]["root-cert.pem"].as_str().context("no root in it")?.to_owned())
}

/// A node's name.
pub(crate) fn node_name(number: usize) -> String {
    format!("node-{number}")
}

fn node(number: usize) -> Wanted {
    let range = format!("10.{}.{}.0/24", 128 + number / 256, number % 256);
    let spec = json!({"podCIDR": range, "podCIDRs": [range]});
    Wanted {
        collection: "/api/v1/nodes".to_owned(),
        object: json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": node_name(number)}, "spec": spec}),
        status: None,
    }
}

fn pod(number: usize) -> Wanted {
    let (group, address) = (number / A_SERVICE, address(number));
    let made_by = json!({
        "apiVersion": "apps/v1",
        "kind": "ReplicaSet",
        "name": format!("app-{group}-5d4f8c7b9"),
        "uid": format!("00000000-0000-4000-8000-{group:012}"),
        "controller": true,
    });
    let labels = json!({"app": format!("app-{group}"), "pod-template-hash": "5d4f8c7b9", "version": "v1"});
    Wanted {
        collection: pods_of(&team_of(number)),
        object: json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": pod_name(number), "labels": labels, "ownerReferences": [made_by]},
            "spec": {
                "nodeName": node_name(number % NODES),
                "serviceAccountName": format!("app-{group}"),
                "containers": [{"name": "app", "image": "none", "ports": [{"name": "http", "containerPort": 8080}]}],
            },
        }),
        status: Some(running(&address, &address)),
    }
}

fn agent(number: usize) -> Wanted {
    let address = format!("192.168.{}.{}", number / 250, number % 250 + 1);
    Wanted {
        collection: pods_of(SYSTEM),
        object: json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": agent_name(number), "labels": {"app.kubernetes.io/name": AGENT, "culvert.dev/mesh": "disabled"}},
            "spec": {
                "nodeName": node_name(number),
                "serviceAccountName": AGENT,
                "hostNetwork": true,
                "containers": [{"name": "agent", "image": "none"}],
            },
        }),
        status: Some(running(&address, &address)),
    }
}

fn running(host: &str, address: &str) -> Value {
    json!({
        "phase": "Running",
        "hostIP": host,
        "podIP": address,
        "podIPs": [{"ip": address}],
        "conditions": conditions(true),
        "containerStatuses": [],
    })
}

fn conditions(ready: bool) -> Value {
    let status = if ready { "True" } else { "False" };
    json!(["Initialized", "Ready", "ContainersReady", "PodScheduled"].map(|kind| json!({"type": kind, "status": status})))
}

fn service(group: usize) -> Wanted {
    let name = format!("app-{group}");
    Wanted {
        collection: format!("/api/v1/namespaces/{}/services", team(group % NAMESPACES)),
        object: json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name},
            "spec": {"selector": {"app": name}, "ports": [{"name": "http", "port": 80, "targetPort": "http"}]},
        }),
        status: None,
    }
}

fn slice(group: usize) -> Wanted {
    let namespace = team(group % NAMESPACES);
    let endpoint = |number: usize| {
        json!({
            "addresses": [address(number)],
            "conditions": {"ready": true},
            "targetRef": {"kind": "Pod", "namespace": namespace, "name": pod_name(number)},
        })
    };
    let endpoints: Vec<_> = (group * A_SERVICE..(group + 1) * A_SERVICE).map(endpoint).collect();
    let name = format!("app-{group}");
    Wanted {
        collection: format!("/apis/discovery.k8s.io/v1beta1/namespaces/{namespace}/endpointslices"),
        object: json!({
            "apiVersion": "discovery.k8s.io/v1beta1",
            "kind": "EndpointSlice",
            "metadata": {"name": format!("{name}-x7k2p"), "labels": {"kubernetes.io/service-name": name}},
            "addressType": "IPv4",
            "endpoints": endpoints,
            "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        }),
        status: None,
    }
}

/// Of the range of the pod's node.
fn address(number: usize) -> String {
    let node = number % NODES;
    format!("10.{}.{}.{}", 128 + node / 256, node % 256, number / NODES + 2)
}

fn pod_name(number: usize) -> String {
    format!("app-{}-5d4f8c7b9-{number:05}", number / A_SERVICE)
}

fn agent_name(node: usize) -> String {
    format!("{AGENT}-{node}")
}

fn team(number: usize) -> String {
    format!("team-{number}")
}

fn team_of(pod: usize) -> String {
    team(pod / A_SERVICE % NAMESPACES)
}

fn pods_of(namespace: &str) -> String {
    format!("/api/v1/namespaces/{namespace}/pods")
}
