//! Promise: the controller and the API server may go and come back: nothing passes in the clear meanwhile, and traffic goes on.

use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use harness::cluster::{CULVERT, PodSpec, Refusal, not_run};
use harness::{Cluster, eventually_within};

use crate::stage::{Stage, check};

/// For how long a part of the cluster may leave the API server alone that it has not found.
const RECOVERY: Duration = Duration::from_secs(90);

#[test]
fn without_a_controller_pods_go_on_new_ones_stay_closed_and_are_served_when_it_is_back() {
    let cluster = Cluster;
    let stage = Stage::new("no-controller");
    let plain = cluster.namespace("no-controller-plain", &[]);
    let open = format!("{}:8080", cluster.pods(&[PodSpec::new(plain.name(), "server", &stage.nodes[1])])[0]);
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
    let early = |server: &str, say: &str| cluster.converse(stage.namespace.name(), "early", server, say);
    let refused = Err(Refusal("ConnectionRefused".to_owned()));
    // The one would refuse what is in the clear itself, the other takes it.
    for server in [&stage.server, &open] {
        assert_eq!(early(server, &stage.marker), refused, "a pod that nobody knows is let out");
    }
    stage.check_traffic(5);
    scale("2");
    cluster.wait_rollout(CULVERT, "deployment/culvert-controller");
    eventually_within(Duration::from_secs(40), "the pod that waited is served", || {
        early(&stage.server, &stage.marker).is_ok() && early(&open, "to somebody outside of the mesh").is_ok()
    });
    stage.check_new_pod("late", 0);
    stage.check_traffic(2);
}

#[test]
fn while_the_api_server_is_down_for_a_minute_traffic_goes_on_and_new_pods_are_served_afterwards() {
    let cluster = Cluster;
    if !cluster.is_ours() {
        return not_run("the API server of this cluster cannot be stopped");
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
    stage.capture = Some(cluster.capture(&stage.nodes[0]));
    stage.check_new_pod("new", 0);
    stage.check_traffic(2);
    await_recovery(&stage.nodes);
}

/// Waits until the cluster's own parts follow the API server again, as other tests expect of them: a new pod may have its account's token,
/// and each node's port leads to a new service. When a part asks again is up to it.
fn await_recovery(nodes: &[String]) {
    let cluster = Cluster;
    let namespace = cluster.namespace("recovered", &[]);
    let server = PodSpec::new(namespace.name(), "server", &nodes[1]);
    eventually_within(RECOVERY, "a pod may be made", || cluster.try_apply(&server.object().to_string()).is_ok());
    cluster.pods(&[server]);
    let port = cluster.node_port(namespace.name());
    for node in nodes {
        let to: SocketAddr = format!("{}:{port}", cluster.node_address(node)).parse().expect("an address");
        eventually_within(RECOVERY, &format!("{to} leads to the service"), || {
            cluster.outside(move || TcpStream::connect_timeout(&to, Duration::from_secs(1)).is_ok())
        });
    }
}
