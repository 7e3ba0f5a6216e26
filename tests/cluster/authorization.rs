//! Promise: who may connect is who a policy names, by service account or namespace, wherever his pod runs.

use std::time::Duration;

use harness::cluster::{ENROLLED, PodSpec};
use harness::{Cluster, eventually_within};
use serde_json::{Value, json};

const OURS: &str = "authz";
const OTHERS: &str = "authz-others";

/// Who gets an answer, of the clients by namespace and name.
fn served(server: &str) -> Vec<(&'static str, &'static str)> {
    let clients = [(OURS, "friend"), (OURS, "stranger"), (OTHERS, "visitor")];
    clients.into_iter().filter(|(namespace, name)| Cluster.converse(namespace, name, server, "let me in").is_ok()).collect()
}

fn policy(from: &Value) -> Value {
    json!({
        "apiVersion": "security.istio.io/v1beta1",
        "kind": "AuthorizationPolicy",
        "metadata": {"name": "who", "namespace": OURS},
        "spec": {
            "selector": {"matchLabels": {"app": "server"}},
            "action": "ALLOW",
            "rules": [{"from": [{"source": from}]}],
        },
    })
}

#[test]
fn a_policy_lets_in_whom_it_names_by_principal_or_by_namespace_and_nobody_else() {
    let cluster = Cluster;
    let nodes = cluster.nodes();
    let _namespaces = [cluster.namespace(OURS, &[ENROLLED]), cluster.namespace(OTHERS, &[ENROLLED])];
    cluster.apply(&json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "friend", "namespace": OURS}}));
    let mut friend = PodSpec::new(OURS, "friend", &nodes[0]);
    friend.more = json!({"serviceAccountName": "friend"});
    let pods = [
        PodSpec::new(OURS, "server", &nodes[1]),
        friend,
        PodSpec::new(OURS, "stranger", &nodes[1]),
        PodSpec::new(OTHERS, "visitor", &nodes[0]),
    ];
    let server = format!("{}:8080", cluster.pods(&pods)[0]);
    let becomes = |what: &str, wanted: &[(&str, &str)]| {
        eventually_within(Duration::from_secs(20), what, || served(&server) == wanted);
    };
    becomes("without a policy all are let in", &[(OURS, "friend"), (OURS, "stranger"), (OTHERS, "visitor")]);
    cluster.apply(&policy(&json!({"principals": [format!("cluster.local/ns/{OURS}/sa/friend")]})));
    becomes("the friend alone is let in", &[(OURS, "friend")]);
    cluster.apply(&policy(&json!({"namespaces": [OTHERS]})));
    becomes("the other namespace alone is let in", &[(OTHERS, "visitor")]);
    cluster.apply(&policy(&json!({"notNamespaces": [OTHERS]})));
    becomes("all but the other namespace are let in", &[(OURS, "friend"), (OURS, "stranger")]);
}
