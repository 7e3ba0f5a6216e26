//! Promise: what Culvert is made of may go and come back: nothing passes in the clear meanwhile, and traffic goes on as far as it can.

use std::time::Duration;

use harness::cluster::{CULVERT, ENROLLED, NodeCapture, PodSpec, Refusal, Second, TestNamespace};
use harness::{Cluster, eventually_within};

/// A namespace of the mesh that takes nothing else, with a server on the second node, traffic to it from the first, and a capture
/// between.
struct Stage {
    namespace: TestNamespace,
    nodes: Vec<String>,
    server: String,
    marker: String,
    /// None: the API server, through which it is asked, has been away.
    capture: Option<NodeCapture>,
}

impl Stage {
    fn new(name: &str) -> Self {
        let cluster = Cluster;
        let nodes = cluster.nodes();
        let namespace = cluster.namespace(name, &[ENROLLED]);
        cluster.mode(name, "STRICT");
        let server = format!("{}:8080", cluster.pods(&[PodSpec::new(name, "server", &nodes[1])])[0]);
        let capture = Some(cluster.capture(&nodes[1]));
        let marker = format!("the-secret-of-{name}");
        cluster.start_traffic(name, "traffic", &nodes[0], &server, &marker);
        Self { namespace, nodes, server, marker, capture }
    }

    fn next(&self, seconds: usize) -> Vec<Second> {
        Cluster.next_traffic(self.namespace.name(), "traffic", seconds)
    }

    /// Each new connection serves, and the one that is kept does.
    fn check_traffic(&self, seconds: usize) {
        check(&self.next(seconds));
    }

    /// A pod that is made now is served in the end.
    fn check_new_pod(&self, name: &str) {
        let namespace = self.namespace.name();
        Cluster.pods(&[PodSpec::new(namespace, name, &self.nodes[0])]);
        Cluster.converse_within(namespace, name, &self.server, &self.marker, 20).expect("a new pod is served");
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if !std::thread::panicking()
            && let Some(capture) = &mut self.capture
        {
            assert!(!capture.shows(&self.marker), "something was said in the clear");
            assert!(capture.flows().iter().any(|flow| flow.tls), "the capture sees nothing");
        }
    }
}

fn check(seconds: &[Second]) {
    for second in seconds {
        assert!(second.served > 0 && second.failed == 0 && second.kept_failure.is_none(), "{seconds:#?}");
    }
}

#[test]
fn while_agents_are_restarted_under_traffic_nothing_is_in_the_clear_and_then_all_is_well() {
    let cluster = Cluster;
    let stage = Stage::new("agents-restart");
    stage.check_traffic(2);
    let before = cluster.traffic(stage.namespace.name(), "traffic").len();
    let former = stage.nodes.iter().map(|node| cluster.agent(node)).collect::<Vec<_>>();
    cluster.kubectl(&["--namespace", CULVERT, "rollout", "restart", "daemonset/culvert-agent"]);
    cluster.wait_rollout(CULVERT, "daemonset/culvert-agent");
    assert!(stage.nodes.iter().all(|node| !former.contains(&cluster.agent(node))), "agents were not replaced");
    let mut last = Vec::new();
    eventually_within(Duration::from_secs(30), "new connections serve again", || {
        last = stage.next(3);
        last.iter().all(|second| second.served > 0 && second.failed == 0)
    });
    let seconds = cluster.traffic(stage.namespace.name(), "traffic").split_off(before);
    let cut = seconds.iter().filter(|second| second.failed > 0).count();
    let kept = seconds.last().and_then(|second| second.kept_failure.clone());
    eprintln!("in {} s connections failed in {cut}; the one that was kept: {kept:?}", seconds.len());
    // How long that is depends on when the kubelet lets the successor start. A connection that was cut hears of it at once.
    assert!(kept.is_none_or(|failure| failure.starts_with("ConnectionReset")), "{seconds:#?}");
    stage.check_new_pod("new");
}

#[test]
fn without_a_controller_pods_go_on_new_ones_stay_closed_and_are_served_when_it_is_back() {
    let cluster = Cluster;
    let stage = Stage::new("no-controller");
    let scale = |replicas: &str| {
        let replicas = format!("--replicas={replicas}");
        cluster.kubectl(&["--namespace", CULVERT, "scale", "deployment/culvert-controller", &replicas]);
    };
    let pods = "app.kubernetes.io/name=culvert-controller";
    cluster.kubectl(&["--namespace", CULVERT, "delete", "pods", "--selector", pods, "--grace-period=0", "--force"]);
    scale("0");
    cluster.wait_for("controllers are gone", CULVERT, "pods", |pods| {
        pods.iter().all(|pod| pod["metadata"]["labels"]["app.kubernetes.io/name"] != "culvert-controller")
    });
    cluster.pods(&[PodSpec::new(stage.namespace.name(), "early", &stage.nodes[0])]);
    let early = || cluster.converse(stage.namespace.name(), "early", &stage.server, &stage.marker);
    assert_eq!(early(), Err(Refusal("ConnectionRefused".to_owned())), "a pod that nobody knows is let out");
    stage.check_traffic(5);
    scale("2");
    cluster.wait_rollout(CULVERT, "deployment/culvert-controller");
    eventually_within(Duration::from_secs(40), "the pod that waited is served", || early().is_ok());
    stage.check_new_pod("late");
    stage.check_traffic(2);
}

#[test]
fn while_the_api_server_is_down_for_a_minute_traffic_goes_on_and_new_pods_are_served_afterwards() {
    let cluster = Cluster;
    if !cluster.is_ours() {
        return eprintln!("the API server of this cluster cannot be stopped: not tried");
    }
    let mut stage = Stage::new("no-api-server");
    stage.check_traffic(2);
    stage.capture = None;
    let before = cluster.traffic(stage.namespace.name(), "traffic").len();
    let stopped = cluster.stop("api-server");
    std::thread::sleep(Duration::from_secs(60));
    drop(stopped);
    let seconds = cluster.traffic(stage.namespace.name(), "traffic").split_off(before);
    assert!(seconds.len() >= 59, "only {} s of traffic", seconds.len());
    check(&seconds);
    for node in &stage.nodes {
        cluster.wait_condition("", &format!("node/{node}"), "Ready");
    }
    stage.capture = Some(cluster.capture(&stage.nodes[1]));
    stage.check_new_pod("new");
    stage.check_traffic(2);
}
