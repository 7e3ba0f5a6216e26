//! Promise: what enforces network policies sees pods' own addresses: a policy that lets in one pod lets in that pod, and keeps others out. It
//! has to let in the port of tunnels and, where connections within a node are left to the kernel, the application's.

use std::time::Duration;

use harness::cluster::{ENROLLED, PodSpec, TUNNEL, not_run};
use harness::{Cluster, eventually_within};

/// Rules of a node's packet filter, as an enforcer of network policies has them; gone when dropped.
struct Rules<'a> {
    node: &'a str,
    rules: Vec<String>,
}

impl<'a> Rules<'a> {
    /// To this pod only those may connect, and only to these ports.
    fn new(node: &'a str, pod: &str, let_in: &[&String], ports: &[u16]) -> Self {
        let mut rules = vec![format!("-d {pod} -p tcp --syn -j REJECT --reject-with tcp-reset")];
        for port in ports {
            rules.extend(let_in.iter().map(|client| format!("-s {client} -d {pod} -p tcp --syn --dport {port} -j ACCEPT")));
        }
        // Each goes before those that are there.
        for rule in &rules {
            Cluster.on_node(node, &["sh", "-c", &format!("iptables -w -I FORWARD {rule}")]).expect("a rule");
        }
        Self { node, rules }
    }
}

impl Drop for Rules<'_> {
    fn drop(&mut self) {
        for rule in &self.rules {
            if let Err(error) = Cluster.on_node(self.node, &["sh", "-c", &format!("iptables -w -D FORWARD {rule}")]) {
                eprintln!("removing {rule}: {error}");
            }
        }
    }
}

#[test]
fn a_policy_by_pods_addresses_and_the_tunnels_port_lets_in_whom_it_names_and_nobody_else() {
    check("filtered", &[ENROLLED, TUNNEL], &[15008]);
}

#[test]
fn within_a_node_it_has_to_let_in_the_applications_port_as_well_unless_tunnels_are_asked_for() {
    check("filtered-kernel", &[ENROLLED], &[15008, 8080]);
}

/// Holds two clients that are let in and two that are not, on either node, against these ports.
fn check(name: &str, labels: &[(&str, &str)], ports: &[u16]) {
    let cluster = Cluster;
    if !cluster.is_ours() {
        return not_run("the packet filters of this cluster's nodes are not ours");
    }
    let nodes = cluster.nodes();
    let namespace = cluster.namespace(name, labels);
    let pod = |name, node: usize| PodSpec::new(namespace.name(), name, &nodes[node]);
    let pods = [pod("server", 1), pod("far", 0), pod("near", 1), pod("far-stranger", 0), pod("near-stranger", 1)];
    let addresses = cluster.pods(&pods);
    let server = format!("{}:8080", addresses[0]);
    let mut capture = cluster.capture(&nodes[1]);
    let is_served = |client: &str| cluster.converse(namespace.name(), client, &server, "seen-by-the-filter").is_ok();
    let clients = ["far", "near", "far-stranger", "near-stranger"];
    for client in clients {
        eventually_within(Duration::from_secs(20), client, || is_served(client));
    }
    // Tunnels that are kept warm have been let in before.
    cluster.kubectl(&["--namespace", namespace.name(), "delete", "pod", "far-stranger", "near-stranger", "--wait=true"]);
    let rules = Rules::new(&nodes[1], &addresses[0], &[&addresses[1], &addresses[2]], ports);
    cluster.pods(&[pod("far-stranger", 0), pod("near-stranger", 1)]);
    // Its own address and the ports are all that the server's node is told of the client. Of several connections, as the first within a node
    // differs from the others.
    for _ in 0..3 {
        for (client, wanted) in clients.iter().zip([true, true, false, false]) {
            assert_eq!(is_served(client), wanted, "{client}");
        }
    }
    drop(rules);
    for client in clients {
        eventually_within(Duration::from_secs(20), client, || is_served(client));
    }
    let to_server = format!("{}:", addresses[0]);
    let flows: Vec<_> = capture.flows().into_iter().filter(|flow| flow.destination.starts_with(&to_server)).collect();
    assert!(flows.iter().any(|flow| flow.source.starts_with(&addresses[1])), "the capture sees nothing: {flows:?}");
    let of_nodes = nodes.iter().map(|node| format!("{}:", cluster.node_address(node))).collect::<Vec<_>>();
    for flow in &flows {
        let port = flow.destination.rsplit(':').next().and_then(|port| port.parse().ok()).unwrap_or_default();
        assert!(ports.contains(&port) && flow.tls == (port == 15008), "{flow:?}");
        assert!(of_nodes.iter().all(|node| !flow.source.starts_with(node)), "a node's address for a pod's: {flow:?}");
    }
    assert_eq!(capture.shows("seen-by-the-filter"), ports.len() > 1, "whether what stays within the node is in sight");
}
