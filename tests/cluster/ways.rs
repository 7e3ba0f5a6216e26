//! Promise: between pods of the mesh nothing passes in the clear, between nodes, and on one node where that is asked for, by whatever address;
//! everybody else talks as before, until a mode says otherwise. What stays in a node's kernel obeys the same modes.

use std::time::Duration;

use harness::cluster::{ENROLLED, NodeCapture, PodSpec, Refusal, Seen, TUNNEL, TestNamespace};
use harness::{Cluster, eventually_within};

/// How a server is called.
#[derive(Clone, Copy, Debug)]
enum Way {
    Address,
    Service,
    Headless,
}

impl Way {
    const ALL: [Self; 3] = [Self::Address, Self::Service, Self::Headless];
}

/// A client on the first node and a server on each of two, in the mesh and outside of it, and a capture on the first node: what goes to its
/// own pods passes their links, what goes to the other node passes the one between the nodes.
struct Stage {
    capture: NodeCapture,
    /// The mesh's and the one outside of it.
    namespaces: [TestNamespace; 2],
    /// By namespace and node.
    servers: [[String; 2]; 2],
    clients: [String; 2],
    /// Whether pods of one node have tunnels, too.
    tunnels_within: bool,
}

impl Stage {
    fn new(cluster: Cluster, name: &str, labels: &[(&str, &str)]) -> Self {
        let nodes = cluster.nodes();
        let namespaces = [cluster.namespace(name, labels), cluster.namespace(&format!("{name}-plain"), &[])];
        let names = namespaces.each_ref().map(TestNamespace::name);
        let pod = |namespace, name, node: usize| PodSpec::new(namespace, name, &nodes[node]);
        let pods = names.map(|namespace| [pod(namespace, "client", 0), pod(namespace, "near", 0), pod(namespace, "far", 1)]);
        for namespace in names {
            for server in ["near", "far"] {
                cluster.service(namespace, server, server, false);
                cluster.service(namespace, &format!("{server}-headless"), server, true);
            }
        }
        let addresses = cluster.pods(&pods.concat());
        let [client, near, far, plain_client, plain_near, plain_far] = addresses.try_into().expect("six pods");
        Self {
            capture: cluster.capture(&nodes[0]),
            servers: [[near, far], [plain_near, plain_far]],
            clients: [client, plain_client],
            tunnels_within: labels.contains(&TUNNEL),
            namespaces,
        }
    }

    fn namespace(&self, in_mesh: bool) -> &str {
        self.namespaces[usize::from(!in_mesh)].name()
    }

    /// Has a client say something to a server; both are named by whether they are in the mesh.
    fn talk(&self, from_mesh: bool, to_mesh: bool, far: bool, way: Way, say: &str) -> Result<Seen, Refusal> {
        let (client, namespace) = (self.namespace(from_mesh), self.namespace(to_mesh));
        let name = if far { "far" } else { "near" };
        let server = match way {
            Way::Address => self.servers[usize::from(!to_mesh)][usize::from(far)].clone(),
            Way::Service => format!("{name}.{namespace}.svc.cluster.local"),
            Way::Headless => format!("{name}-headless.{namespace}.svc.cluster.local"),
        };
        // Names and services may not be everywhere yet.
        let patience = if say.starts_with("no-") { 0 } else { 10 };
        Cluster.converse_within(client, "client", &format!("{server}:8080"), say, patience)
    }

    /// Waits until both nodes refuse plaintext to pods of the mesh.
    fn wait_until_closed(&self) {
        let is_refused =
            |far| self.talk(false, true, far, Way::Address, "no-entry") == Err(Refusal("ConnectionRefused".to_owned()));
        eventually_within(Duration::from_secs(20), "both nodes refuse plaintext", || is_refused(false) && is_refused(true));
    }

    /// What everybody says by every way, whether the server hears it, and whether it is in sight.
    fn check_all(&mut self, mode: &str, is_allowed: impl Fn(bool, bool) -> bool) {
        for (from_mesh, to_mesh) in [(true, true), (true, false), (false, true), (false, false)] {
            for (far, way) in [false, true].iter().flat_map(|far| Way::ALL.map(|way| (*far, way))) {
                let allowed = is_allowed(from_mesh, to_mesh);
                let say = format!("{}{mode}-{from_mesh}-{to_mesh}-{far}-{way:?}", if allowed { "" } else { "no-" });
                match self.talk(from_mesh, to_mesh, far, way, &say) {
                    Ok(seen) => {
                        assert!(allowed, "{say}: {seen:?}");
                        assert_eq!(seen.answer, say);
                        let client = &self.clients[usize::from(!from_mesh)];
                        assert!(seen.client.starts_with(&format!("{client}:")), "{say}: the server sees {seen:?}");
                    }
                    Err(refusal) => {
                        assert!(!allowed, "{say}: {refusal:?}");
                        assert_eq!(refusal, Refusal("ConnectionRefused".to_owned()), "{say}");
                    }
                }
                // Within a node one connection of several is in a tunnel, as is what goes to a service's own address.
                let may_be_either = from_mesh && to_mesh && !far && !self.tunnels_within && !matches!(way, Way::Service);
                let in_sight = allowed && !(from_mesh && to_mesh);
                assert!(may_be_either || self.capture.shows(&say) == in_sight, "whether {say} is in sight: not {in_sight}");
            }
        }
    }
}

#[test]
fn the_mesh_is_out_of_sight_by_every_way_and_istios_plainest_manifest_closes_it_to_others() {
    let cluster = Cluster;
    let mut stage = Stage::new(cluster, "ways", &[ENROLLED, TUNNEL]);
    stage.check_all("permissive", |_, _| true);
    let flows = stage.capture.flows();
    let client = format!("{}:", stage.clients[0]);
    for server in stage.servers[0].clone() {
        let between =
            flows.iter().filter(|flow| flow.source.starts_with(&client) && flow.destination.starts_with(&format!("{server}:")));
        let between: Vec<_> = between.collect();
        assert!(!between.is_empty(), "the capture sees nothing of {client} to {server}");
        for flow in between {
            assert!(flow.tls && flow.destination.ends_with(":15008"), "{flow:?}");
        }
    }

    let strict = cluster.strict_mesh();
    stage.wait_until_closed();
    stage.check_all("strict", |from_mesh, to_mesh| from_mesh || !to_mesh);

    drop(strict);
    for far in [false, true] {
        stage.talk(false, true, far, Way::Address, "open again").expect("the mode is taken back");
    }
}

#[test]
fn within_a_node_the_mesh_may_be_in_sight_but_istios_plainest_manifest_closes_it_to_others_all_the_same() {
    let cluster = Cluster;
    let mut stage = Stage::new(cluster, "ways-kernel", &[ENROLLED]);
    let _strict = cluster.strict_mesh();
    stage.wait_until_closed();
    stage.check_all("strict", |from_mesh, to_mesh| from_mesh || !to_mesh);
    eventually_within(Duration::from_secs(20), "a connection within the node stays in its kernel", || {
        stage.talk(true, true, false, Way::Address, "straight on").expect("the mesh is open to itself");
        stage.capture.shows("straight on")
    });
}
