//! Every program loads on this kernel, is attached, and is pinned with its maps, so that it outlives the agent.

use std::collections::BTreeSet;
use std::io::ErrorKind;

use harness::{Attached, Mesh, MeshSpec, PodSpec, app};

#[test]
fn every_program_and_map_is_pinned_on_each_node() {
    let mesh = Mesh::start();
    for node in harness::mesh::NODES {
        let pins: BTreeSet<String> = mesh.pins(node).into_iter().collect();
        for program in ["connect4", "connect6", "getpeername4", "getpeername6", "sock_ops"] {
            assert!(pins.iter().any(|pin| pin.contains(program)), "{program} is not pinned on {node}: {pins:?}");
        }
        for map in ["NAMESPACES", "DESTINATIONS", "CAPTURED", "DELIVERIES", "ADMISSIONS", "LISTENERS", "SETTINGS"] {
            assert!(pins.contains(map), "{map} is not pinned on {node}: {pins:?}");
        }
    }
}

#[test]
fn the_programs_that_know_a_kubelet_are_pinned_where_there_is_one() {
    let mesh = Mesh::start_as(MeshSpec { attached: Attached::ToKubelet, ..MeshSpec::default() });
    for node in harness::mesh::NODES {
        let pins = mesh.pins(node);
        for program in ["kubelet_connect4", "kubelet_connect6", "kubelet_sock_ops"] {
            assert!(pins.iter().any(|pin| pin == program), "{program} is not pinned on {node}: {pins:?}");
        }
    }
}

#[test]
fn a_second_agent_of_a_node_takes_over_without_a_moment_unattached() {
    let mut mesh = Mesh::start();
    let before = mesh.pins("a");
    mesh.kill_agent(0);
    assert_eq!(mesh.pins("a"), before, "the dead agent's programs are gone");
    mesh.start_agent(0);
    assert_eq!(mesh.pins("a"), before);
}

#[test]
fn a_captured_connection_is_out_of_sight_and_one_of_an_outsider_is_refused() {
    const PORT: u16 = 8080;
    const TUNNELS: u16 = 15008;
    let mut mesh = Mesh::start();
    mesh.mode("shop", "STRICT");
    let (client, server) = app::pair(&mut mesh, PORT);
    let outsider = mesh.pod(PodSpec { name: "outsider", namespace: "shop", node: 0, enrolled: false });
    for v6 in [false, true] {
        let address = server.at(v6, PORT);
        let mut capture = mesh.capture_between_nodes();
        let seen = app::converse(&client.netns, address, "marker-captured").expect("both are in the mesh");
        capture.finish();
        assert_eq!((seen.client.ip(), seen.peer), (client.at(v6, 0).ip(), address));
        assert!(!capture.shows(b"marker-captured"), "{address}: in plaintext");
        let segments = capture.segments();
        assert!(segments.iter().any(|(_, to)| *to == server.at(v6, TUNNELS)), "{address}: not by tunnel: {segments:?}");
        assert!(segments.iter().all(|(_, to)| to.port() != PORT), "{address}: beside the tunnel: {segments:?}");

        let refused = app::converse(&outsider.netns, address, "marker-refused").expect_err("the outsider has no identity");
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "{address}");
    }
    // The link of socket_lookup has the name of a pod's namespace: its cookie.
    let pins = mesh.pins("b");
    assert!(pins.iter().any(|pin| pin.parse::<u64>().is_ok()), "socket_lookup is pinned for no pod: {pins:?}");
}
