//! Promise: under STRICT the kubelet's probes of every kind reach a pod, and nobody else who comes from the node does, whatever he calls
//! himself.

use std::time::Duration;

use harness::cluster::{ENROLLED, IMAGE, PodSpec, Refusal, not_run};
use harness::{Cluster, eventually_within};
use serde_json::{Value, json};

/// A probe that is made each second and may not fail once.
fn probe(action: &Value) -> Value {
    let mut probe = json!({"periodSeconds": 1, "timeoutSeconds": 2, "failureThreshold": 1});
    probe.as_object_mut().expect("an object").extend(action.as_object().expect("an object").clone());
    probe
}

/// A pod that is ready while a probe succeeds, and is started anew when it fails.
fn probed<'a>(namespace: &'a str, name: &'a str, node: &'a str, action: &Value) -> PodSpec<'a> {
    let mut pod = PodSpec::new(namespace, name, node);
    let mut slow = probe(action);
    slow["failureThreshold"] = json!(30);
    pod.more = json!({"containers": [{
        "name": "app",
        "image": IMAGE,
        "args": ["serve"],
        "startupProbe": slow,
        "livenessProbe": probe(action),
        "readinessProbe": probe(action),
        "lifecycle": {"postStart": {"exec": {"command": ["sleep", "0.3"]}}},
    }]});
    pod
}

fn restarts(cluster: Cluster, namespace: &str) -> Vec<(String, u64)> {
    let of = |pod: &Value| {
        let name = pod["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        (name, pod["status"]["containerStatuses"][0]["restartCount"].as_u64().unwrap_or(u64::MAX))
    };
    cluster.list(namespace, "pods").iter().map(of).collect()
}

fn is_ready(pod: &Value) -> bool {
    let conditions = pod["status"]["conditions"].as_array().cloned().unwrap_or_default();
    conditions.iter().any(|condition| condition["type"] == "Ready" && condition["status"] == "True")
}

#[test]
fn probes_over_http_and_tcp_and_by_a_program_succeed_under_strict_and_are_counted() {
    let cluster = Cluster;
    let node = &cluster.nodes()[0];
    let namespace = cluster.namespace("probed", &[ENROLLED]);
    cluster.mode(namespace.name(), "STRICT");
    let before = cluster.outcomes(node, "admitted_probe");
    let kinds = [
        ("http", json!({"httpGet": {"port": 8081, "path": "/"}})),
        ("tcp", json!({"tcpSocket": {"port": 8080}})),
        ("exec", json!({"exec": {"command": ["/app", "grpc-health", "127.0.0.1:8082"]}})),
    ];
    let pods: Vec<PodSpec<'_>> = kinds.iter().map(|(name, action)| probed(namespace.name(), name, node, action)).collect();
    cluster.pods(&pods);
    // Two kinds go over the network, each second, for liveness and readiness.
    eventually_within(Duration::from_secs(30), "probes are counted", || cluster.outcomes(node, "admitted_probe") >= before + 16);
    for (name, _) in &kinds {
        cluster.wait_condition(namespace.name(), &format!("pod/{name}"), "Ready");
    }
    assert!(
        restarts(cluster, namespace.name()).iter().all(|(_, count)| *count == 0),
        "{:?}",
        restarts(cluster, namespace.name())
    );
}

#[test]
fn a_grpc_probe_of_the_kubelets_own_succeeds_under_strict_and_nobody_elses_question_does() {
    let cluster = Cluster;
    let nodes = cluster.nodes();
    let (mesh, plain) = (cluster.namespace("probed-grpc", &[ENROLLED]), cluster.namespace("probed-grpc-plain", &[]));
    cluster.mode(mesh.name(), "STRICT");
    let server = probed(mesh.name(), "server", &nodes[0], &json!({"grpc": {"port": 8082}}));
    if !cluster.keeps(&server.object(), "/spec/containers/0/livenessProbe/grpc/port") {
        return not_run("this API server offers no gRPC probes");
    }
    let before = cluster.outcomes(&nodes[0], "admitted_probe");
    // It asks where nobody answers.
    let mut deaf = PodSpec::new(mesh.name(), "deaf", &nodes[0]);
    deaf.more = json!({"containers": [{
        "name": "app", "image": IMAGE, "args": ["serve"], "readinessProbe": probe(&json!({"grpc": {"port": 8083}})),
    }]});
    cluster.apply(&deaf.object());
    let address = cluster.pods(&[server, PodSpec::new(plain.name(), "stranger", &nodes[0])]).swap_remove(0);
    eventually_within(Duration::from_secs(30), "probes are counted", || {
        cluster.outcomes(&nodes[0], "admitted_probe") >= before + 8
    });
    let is_unhealthy = |event: &Value| event["reason"] == "Unhealthy" && event["involvedObject"]["name"] == "deaf";
    eventually_within(Duration::from_secs(30), "a probe that fails is told", || {
        cluster.list(mesh.name(), "events").iter().any(is_unhealthy)
    });
    assert!(!is_ready(&cluster.get(mesh.name(), "pod", "deaf")), "a pod is ready that nobody serves in");
    assert!(is_ready(&cluster.get(mesh.name(), "pod", "server")), "the pod that serves is not ready");
    assert!(restarts(cluster, mesh.name()).iter().all(|(_, count)| *count == 0), "{:?}", restarts(cluster, mesh.name()));
    let question = ["/app", "grpc-health", &format!("{address}:8082")];
    let refused = cluster.exec(plain.name(), "stranger", &question).expect_err("a stranger's question is no probe");
    assert!(refused.contains("refused"), "{refused}");
}

#[test]
fn a_pod_in_the_nodes_network_that_calls_itself_the_kubelet_is_refused_under_strict() {
    let cluster = Cluster;
    let node = &cluster.nodes()[0];
    let namespace = cluster.namespace("imitated", &[ENROLLED]);
    let mut imitator = PodSpec::new(namespace.name(), "imitator", node);
    imitator.arguments = &["pause"];
    imitator.more = json!({"hostNetwork": true, "hostPID": true});
    let server = probed(namespace.name(), "server", node, &json!({"tcpSocket": {"port": 8080}}));
    let addresses = cluster.pods(&[server, imitator]);
    let server = format!("{}:8080", addresses[0]);
    let as_kubelet = |words: &str| {
        // A process is called like the file that it was started from.
        let script = format!("cp /app /tmp/kubelet && exec /tmp/kubelet {words}");
        cluster.exec(namespace.name(), "imitator", &["sh", "-c", &script])
    };
    let imitate =
        || harness::cluster::seen(&as_kubelet(&format!("connect {server} --say let-me-in")).unwrap_or_else(|failure| failure));
    let ask_grpc = || as_kubelet(&format!("grpc-health {}:8082", addresses[0]));
    // It comes from the kubelet's own address.
    let seen = imitate().expect("a permissive pod takes plaintext");
    ask_grpc().expect("gRPC as well");
    let probes = cluster.outcomes(node, "admitted_probe");
    cluster.mode(namespace.name(), "STRICT");
    eventually_within(Duration::from_secs(20), "the imitator is refused", || {
        imitate() == Err(Refusal("ConnectionRefused".to_owned()))
    });
    let dropped = cluster.outcomes(node, "dropped_plaintext");
    assert_eq!(imitate(), Err(Refusal("ConnectionRefused".to_owned())), "it came from {}", seen.local);
    assert!(cluster.outcomes(node, "dropped_plaintext") > dropped, "nothing was dropped");
    let refused = ask_grpc().expect_err("so is its question for the server's health");
    assert!(refused.contains("refused"), "{refused}");
    if cluster.is_ours() {
        // All that the imitator lacks is its place among the node's processes. In /tmp of a node of kind's nothing may be started.
        let script = format!(
            "cp /usr/bin/curl /var/tmp/kubelet && /var/tmp/kubelet --silent --show-error --max-time 5 http://{}:8081/",
            addresses[0]
        );
        cluster.on_node(node, &["sh", "-c", &script]).expect("a kubelet is let in");
        cluster
            .on_node(node, &["curl", "--max-time", "5", &format!("http://{}:8081/", addresses[0])])
            .expect_err("another is not");
        // What a kubelet does for a gRPC probe, which the API server of this cluster may not offer: the empty question, and SERVING.
        let script = format!(
            "printf '\\0\\0\\0\\0\\0' | /var/tmp/kubelet --silent --show-error --max-time 5 --http2-prior-knowledge --data-binary @- \
             --header 'content-type: application/grpc' --header 'te: trailers' \
             http://{}:8082/grpc.health.v1.Health/Check | od -A n -t x1",
            addresses[0]
        );
        let script = ["bash", "-o", "pipefail", "-c", &script];
        let health = cluster.on_node(node, &script).expect("a kubelet's question for health is let in");
        assert_eq!(health.trim(), "00 00 00 00 02 08 01");
    }
    // The kubelet goes on meanwhile.
    eventually_within(Duration::from_secs(20), "probes go on", || cluster.outcomes(node, "admitted_probe") >= probes + 6);
    assert!(restarts(cluster, namespace.name()).iter().all(|(_, count)| *count == 0));
}
