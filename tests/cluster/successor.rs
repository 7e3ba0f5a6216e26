//! Promise: a pod that gets the address of another one gets nothing else of it: no identity, no verdict, no mode and no tunnel.

use harness::Cluster;
use harness::cluster::{ENROLLED, PodSpec, Refusal, not_run};
use serde_json::{Value, json};

const MESH: &str = "succession";
const PLAIN: &str = "succession-plain";

fn refused() -> Result<String, Refusal> {
    Err(Refusal("ConnectionRefused".to_owned()))
}

/// An account for each of the pods, and what is said of the first: that it takes plaintext, and that it alone may ask the server.
fn set_up(cluster: Cluster) {
    for account in ["first", "second", "third"] {
        cluster.account(MESH, account);
    }
    cluster.mode(MESH, "STRICT");
    cluster.apply(&json!({
        "apiVersion": "security.istio.io/v1",
        "kind": "PeerAuthentication",
        "metadata": {"name": "first", "namespace": MESH},
        "spec": {"selector": {"matchLabels": {"app": "first"}}, "mtls": {"mode": "PERMISSIVE"}},
    }));
    cluster.apply(&json!({
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": {"name": "first-only", "namespace": MESH},
        "spec": {
            "selector": {"matchLabels": {"app": "server"}},
            "rules": [{"from": [{"source": {"principals": [format!("cluster.local/ns/{MESH}/sa/first")]}}]}],
        },
    }));
}

#[test]
fn a_pod_at_the_address_of_another_has_nothing_of_its_identity_mode_or_tunnels() {
    let cluster = Cluster;
    if !cluster.is_ours() {
        return not_run("which address a pod of this cluster gets cannot be chosen");
    }
    let nodes = cluster.nodes();
    let _namespaces = [cluster.namespace(MESH, &[ENROLLED]), cluster.namespace(PLAIN, &[])];
    set_up(cluster);
    let others = cluster.pods(&[
        PodSpec::new(MESH, "server", &nodes[1]),
        PodSpec::new(MESH, "client", &nodes[1]),
        PodSpec::new(PLAIN, "outsider", &nodes[1]),
    ]);
    let server = format!("{}:8080", others[0]);
    let mut capture = cluster.capture(&nodes[0]);
    let make = |name: &str, labels: &[(&str, &str)]| -> String {
        let mut pod = PodSpec::new(MESH, name, &nodes[0]);
        pod.labels = labels;
        pod.more = json!({"serviceAccountName": name});
        cluster.pods(&[pod])[0].clone()
    };
    let say = |namespace: &str, pod: &str, to: &str, what: &str| {
        cluster.converse_within(namespace, pod, to, what, 20).map(|seen| seen.answer)
    };
    let try_saying =
        |namespace: &str, pod: &str, to: &str, what: &str| cluster.converse(namespace, pod, to, what).map(|seen| seen.answer);

    let address = make("first", &[]);
    let here = format!("{address}:8080");
    assert_eq!(say(MESH, "first", &server, "first-out"), Ok("first-out".to_owned()));
    assert_eq!(say(MESH, "client", &here, "first-in"), Ok("first-in".to_owned()));
    assert_eq!(say(PLAIN, "outsider", &here, "first-open"), Ok("first-open".to_owned()));
    assert!(!capture.shows("first-out") && !capture.shows("first-in") && capture.shows("first-open"));

    // The kernel and both agents have just had to do with the first.
    let replace = |former: &str, name: &str, labels: &[(&str, &str)]| {
        cluster.kubectl(&["--namespace", MESH, "delete", "pod", former, "--wait=true"]);
        cluster.set_next_address(&nodes[0], &address);
        assert_eq!(make(name, labels), address, "{name} has another address");
    };
    replace("first", "second", &[]);
    try_saying(MESH, "second", &server, "second-out").expect_err("the second is let in as the first");
    assert_eq!(try_saying(PLAIN, "outsider", &here, "second-open"), refused(), "the second's mode is the first's");
    assert_eq!(say(MESH, "client", &here, "second-in"), Ok("second-in".to_owned()));
    // The same when all have heard of the second.
    let denied = |line: &Value| {
        line["reason"] == "policy_denied" && line["src.identity"] == format!("spiffe://cluster.local/ns/{MESH}/sa/second")
    };
    harness::eventually_within(std::time::Duration::from_secs(20), "the second is denied as itself", || {
        try_saying(MESH, "second", &server, "second-out").expect_err("the second is let in as the first");
        cluster.agent_log(&nodes[1]).iter().any(denied)
    });
    assert_eq!(try_saying(PLAIN, "outsider", &here, "second-open"), refused(), "the second's mode is the first's");
    assert!(!capture.shows("second-"), "something of the second's is in the clear");

    replace("second", "third", &[("culvert.dev/mesh", "disabled")]);
    assert_eq!(try_saying(MESH, "third", &server, "third-out"), refused(), "plaintext is let in");
    assert_eq!(say(PLAIN, "outsider", &here, "third-open"), Ok("third-open".to_owned()));
    assert_eq!(say(MESH, "client", &here, "third-in"), Ok("third-in".to_owned()));
    assert!(capture.shows("third-in"), "the third, which is outside of the mesh, has a tunnel");
    assert_eq!(try_saying(MESH, "third", &server, "third-out"), refused(), "plaintext is let in");
}
