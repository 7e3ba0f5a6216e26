//! Promise: what an operator does to a cluster that serves, restarts and upgrades of the agents and nodes that are drained, lets nothing pass
//! in the clear, and costs traffic no more than it must.

use std::time::Duration;

use harness::cluster::{CULVERT, IMAGE};
use harness::{Cluster, eventually_within};
use serde_json::json;

use crate::stage::Stage;

/// Traffic while all agents are replaced.
fn while_agents_are_replaced(name: &str, replace: impl FnOnce(Cluster)) {
    let cluster = Cluster;
    let stage = Stage::new(name);
    stage.check_traffic(2);
    let before = cluster.traffic(stage.namespace.name(), "traffic").len();
    let former = stage.nodes.iter().map(|node| cluster.agent(node)).collect::<Vec<_>>();
    replace(cluster);
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
    for (node, pod) in ["new-here", "new-there"].iter().enumerate() {
        stage.check_new_pod(pod, node);
    }
}

#[test]
fn while_agents_are_restarted_under_traffic_nothing_is_in_the_clear_and_then_all_is_well() {
    while_agents_are_replaced("agents-restart", |cluster| {
        cluster.kubectl(&["--namespace", CULVERT, "rollout", "restart", "daemonset/culvert-agent"]);
    });
}

#[test]
fn while_the_installation_is_upgraded_under_traffic_nothing_is_in_the_clear_and_then_all_is_well() {
    while_agents_are_replaced("upgrade", |cluster| {
        let said = cluster.install(&["log.filter=info,culvert=debug"]);
        assert!(said.contains("DaemonSet"), "{said}");
        let agents = cluster.get(CULVERT, "daemonset", "culvert-agent");
        let environment = agents["spec"]["template"]["spec"]["containers"][0]["env"].to_string();
        assert!(environment.contains("culvert=debug"), "{environment}");
    });
    // As it was, for the other tests, which is an upgrade as well.
    let _as_told = Cluster.install(&[]);
    Cluster.wait_rollout(CULVERT, "daemonset/culvert-agent");
}

/// A node that takes no pods until this is dropped.
struct Drained(String);

impl Drop for Drained {
    fn drop(&mut self) {
        if let Err(error) = Cluster.try_kubectl(&["uncordon", &self.0]) {
            eprintln!("uncordoning {}: {error}", self.0);
        }
    }
}

#[test]
fn while_a_node_is_drained_no_new_connection_to_a_service_fails() {
    const NAME: &str = "drained";
    let cluster = Cluster;
    let stage = Stage::with(NAME, |nodes| {
        let metadata = json!({"name": "server", "namespace": NAME});
        let labels = json!({"app": "server"});
        let preferred = json!({"weight": 100, "podAffinityTerm": {"topologyKey": "kubernetes.io/hostname",
                               "labelSelector": {"matchLabels": labels}}});
        cluster.apply(&json!({
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": metadata,
            "spec": {
                "replicas": nodes.len(),
                "selector": {"matchLabels": labels},
                "template": {
                    "metadata": {"labels": labels},
                    "spec": {
                        "terminationGracePeriodSeconds": 20,
                        "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [preferred]}},
                        "containers": [{
                            "name": "app",
                            "image": IMAGE,
                            // As applications do that want no connection to fail: those that have heard of their end late are served
                            // still. Then they refuse what is new, and whoever sends it there is found out.
                            "args": ["serve", "--linger", "6"],
                            "readinessProbe": {"tcpSocket": {"port": 8080}, "periodSeconds": 1},
                            "lifecycle": {"preStop": {"exec": {"command": ["sleep", "8"]}}},
                        }],
                    },
                },
            },
        }));
        cluster.service(NAME, "server", "server", false);
        cluster.wait_rollout(NAME, "deployment/server");
        format!("server.{NAME}.svc.cluster.local:8080")
    });
    let on = |node: &str| cluster.list(NAME, "pods").iter().filter(|pod| pod["spec"]["nodeName"] == node).count();
    let node = &stage.nodes[1];
    assert!(on(node) > 0, "there is nothing to be drained");
    stage.check_traffic(2);
    let before = cluster.traffic(NAME, "traffic").len();
    let drained = Drained(node.clone());
    cluster.kubectl(&["drain", node, "--ignore-daemonsets", "--force", "--delete-emptydir-data", "--timeout=120s"]);
    cluster.wait_rollout(NAME, "deployment/server");
    assert_eq!(on(node), 0, "pods are left");
    let _some_more = stage.next(3);
    for second in cluster.traffic(NAME, "traffic").split_off(before) {
        assert!(second.served > 0 && second.failed == 0, "{second:?}");
        let kept = second.kept_failure;
        assert!(kept.as_ref().is_none_or(|failure| !failure.starts_with("TimedOut")), "its server has gone silently: {kept:?}");
    }
    cluster.wait_rollout(CULVERT, "deployment/culvert-controller");
    cluster.wait_condition(CULVERT, &format!("pod/{}", cluster.agent(node)), "Ready");
    drop(drained);
    stage.check_new_pod("back", 1);
}
