//! Promise: an agent is ready once it knows the mesh, says until then what is missing, and stays ready while its controller is away.

use std::net::SocketAddr;

use harness::{Mesh, MeshSpec, eventually, metrics};

/// The answer of a node's agent to who asks whether it is ready.
fn answer(mesh: &Mesh, node: usize) -> String {
    let ready = SocketAddr::from(([127, 0, 0, 1], 15021));
    mesh.node(node).run(move || metrics::get(ready, "/healthz/ready")).unwrap_or_default()
}

fn is_ready(mesh: &Mesh, node: usize) -> bool {
    answer(mesh, node).starts_with("HTTP/1.0 200 ")
}

#[test]
fn an_agent_is_ready_from_when_it_knows_the_mesh() {
    let mut mesh = Mesh::prepare(MeshSpec::default());
    mesh.start_agent(0);
    let early = answer(&mesh, 0);
    assert!(early.starts_with("HTTP/1.0 503 ") && early.contains("mesh known: not yet"), "{early}");
    assert!(!early.contains("programs"), "what is there is not missing: {early}");
    mesh.start_controller();
    eventually("it is ready", || is_ready(&mesh, 0));
    mesh.kill_controller();
    eventually("it notices", || mesh.metrics(0).sum("culvert_xds_connected", &[]) == 0);
    assert!(is_ready(&mesh, 0), "what it knows holds without a controller");
    // One that starts now knows nothing.
    mesh.start_agent(1);
    assert!(answer(&mesh, 1).starts_with("HTTP/1.0 503 "));
    mesh.start_controller();
    eventually("it is ready, too", || is_ready(&mesh, 1));
}
