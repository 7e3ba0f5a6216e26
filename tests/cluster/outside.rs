//! Promise: who comes from outside of the cluster, by a node's port, is served as a client without an identity: by pods outside of the mesh
//! always, by those of the mesh while their mode allows plaintext.
//!
//! Such a client is a machine without pods, in the nodes' network. Its connection is plaintext, whatever is done in the cluster: what
//! ends TLS for clients from outside is a gateway, which is a pod.

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::Duration;

use harness::cluster::{ENROLLED, PodSpec};
use harness::{Cluster, eventually_within};

const PATIENCE: Duration = Duration::from_secs(5);

/// Says something, and gives the answer.
fn talk(to: SocketAddr, say: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(say.as_bytes())?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

#[test]
fn a_nodes_port_leads_outsiders_to_pods_outside_of_the_mesh_and_to_permissive_ones_of_it() {
    let cluster = Cluster;
    let nodes = cluster.nodes();
    let (mesh, plain) = (cluster.namespace("port-mesh", &[ENROLLED]), cluster.namespace("port-plain", &[]));
    let servers = [&mesh, &plain].map(|namespace| PodSpec::new(namespace.name(), "server", &nodes[1]));
    cluster.pods(&servers);
    let mut capture = cluster.capture(&nodes[1]);
    let ports = [&mesh, &plain].map(|namespace| cluster.node_port(namespace.name()));
    let addresses = [0, 1].map(|node: usize| cluster.node_address(&nodes[node]));
    let from_outside = |port: u16, node: usize, say: &str| {
        let (to, say) = (format!("{}:{port}", addresses[node]).parse().expect("an address"), say.to_owned());
        cluster.outside(move || talk(to, &say))
    };
    // By the port of the node that the server is on, and by that of the other.
    for (mode, mesh_is_open) in [("PERMISSIVE", true), ("STRICT", false), ("PERMISSIVE", true)] {
        cluster.mode(mesh.name(), mode);
        for (in_mesh, port) in [(true, ports[0]), (false, ports[1])] {
            let open = !in_mesh || mesh_is_open;
            for node in [0, 1] {
                let case = format!("from-outside-{mode}-{in_mesh}-{node}");
                eventually_within(Duration::from_secs(20), &case, || from_outside(port, node, "is it open?").is_ok() == open);
                match from_outside(port, node, &case) {
                    Ok(answer) => {
                        assert!(open && answer.ends_with(&case), "{case}: {answer}");
                        assert!(capture.shows(&case), "{case}: what comes from outside is in the clear");
                    }
                    Err(error) => {
                        assert!(!open, "{case}: {error}");
                        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{case}");
                        assert!(!capture.shows(&case), "{case}: something was said");
                    }
                }
            }
        }
    }
    cluster.mode(mesh.name(), "STRICT");
    // A pod of the mesh that comes by a node's port has no identity either: the node is no workload.
    let client = PodSpec::new(mesh.name(), "client", &nodes[0]);
    cluster.pods(&[client]);
    eventually_within(Duration::from_secs(20), "a pod by a node's port is refused", || {
        cluster.converse(mesh.name(), "client", &format!("{}:{}", addresses[1], ports[0]), "by the node's port").is_err()
    });
    cluster.converse_within(mesh.name(), "client", "server:8080", "by the service", 20).expect("by the service it is served");
}
