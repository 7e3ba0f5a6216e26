//! Every program loads on this kernel, is attached, and is pinned with its maps, so that it outlives the agent.

use std::collections::BTreeSet;

use harness::Mesh;

#[test]
fn every_program_and_map_is_pinned_on_each_node() {
    let mesh = Mesh::start();
    for node in harness::mesh::NODES {
        let pins: BTreeSet<String> = mesh.pins(node).into_iter().collect();
        for program in ["connect4", "connect6", "getpeername4", "getpeername6", "sock_ops"] {
            assert!(pins.iter().any(|pin| pin.contains(program)), "{program} is not pinned on {node}: {pins:?}");
        }
        for map in ["NAMESPACES", "DESTINATIONS", "CAPTURED", "ATTESTED", "ADMISSIONS", "LISTENERS", "SETTINGS"] {
            assert!(pins.contains(map), "{map} is not pinned on {node}: {pins:?}");
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
