//! Promise: pods that come and go all the time are each served, say nothing in the clear, and disturb nobody.

use harness::Cluster;
use harness::cluster::{ENROLLED, PodSpec};
use serde_json::json;

const ROUNDS: usize = 5;
/// In each round, on both nodes.
const PODS: usize = 40;

#[test]
fn two_hundred_pods_come_talk_and_go_under_traffic_that_does_not_fail_once() {
    let cluster = Cluster;
    let nodes = cluster.nodes();
    let namespace = cluster.namespace("churn", &[ENROLLED]);
    // Whoever talks in the clear is answered, and so is seen to.
    cluster.mode(namespace.name(), "PERMISSIVE");
    let server = format!("{}:8080", cluster.pods(&[PodSpec::new(namespace.name(), "server", &nodes[1])])[0]);
    let mut capture = cluster.capture(&nodes[1]);
    cluster.start_traffic(namespace.name(), "traffic", &nodes[0], &server, "said-by-traffic");
    let arguments = ["connect", &server, "--say", "said-in-passing", "--retry-for", "60"];
    for round in 0..ROUNDS {
        let names: Vec<String> = (0..PODS).map(|number| format!("passer-{round}-{number}")).collect();
        let round = round.to_string();
        let pods = names.iter().enumerate().map(|(number, name)| {
            let mut pod = PodSpec::new(namespace.name(), name, &nodes[number % 2]);
            pod.arguments = &arguments;
            let labels = [("round", round.as_str())];
            pod.labels = &labels;
            pod.more = json!({"restartPolicy": "Never"});
            pod.object()
        });
        cluster.apply(&json!({"apiVersion": "v1", "kind": "List", "items": pods.collect::<Vec<_>>()}));
        cluster.wait_for("all have been served", namespace.name(), "pods", |pods| {
            let passers = pods.iter().filter(|pod| pod["metadata"]["labels"]["round"] == round.as_str());
            let phases: Vec<_> = passers.map(|pod| pod["status"]["phase"].as_str().unwrap_or_default().to_owned()).collect();
            assert!(!phases.contains(&"Failed".to_owned()), "a pod was not served");
            phases.iter().filter(|phase| *phase == "Succeeded").count() == PODS
        });
        // They go while the next ones come.
        let selector = format!("--selector=round={round}");
        cluster.kubectl(&["--namespace", namespace.name(), "delete", "pods", &selector, "--wait=false"]);
    }
    let seconds = cluster.traffic(namespace.name(), "traffic");
    assert!(seconds.iter().all(|second| second.failed == 0 && second.kept_failure.is_none()), "{seconds:#?}");
    assert!(!capture.shows("said-by-traffic") && !capture.shows("said-in-passing"), "something was said in the clear");
    assert!(capture.flows().iter().any(|flow| flow.tls), "the capture sees nothing");
}
