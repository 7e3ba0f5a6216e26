//! Promise: past its bounds an agent refuses what is new and says why; nothing that is open breaks, and no pod takes the room of all others.

use std::net::TcpStream;

use harness::{Mesh, Pod, PodSpec, app, eventually};

const PORT: u16 = 8080;
/// As many as leave an agent room for three hundred connections.
const DESCRIPTORS: u32 = 1200;
const ROOM: usize = 300;

fn pod(mesh: &mut Mesh, name: &str, node: usize) -> Pod {
    mesh.pod(PodSpec { name, namespace: "shop", node, enrolled: true })
}

/// A mesh with an agent that may have few descriptors, on this node; a client and a server.
fn mesh(limited: usize) -> (Mesh, Pod, Pod) {
    let mut mesh = Mesh::prepare(Default::default());
    mesh.start_controller();
    for node in [0, 1] {
        mesh.agent_descriptors((node == limited).then_some(DESCRIPTORS));
        mesh.start_agent(node);
    }
    let (client, server) = app::pair(&mut mesh, PORT);
    (mesh, client, server)
}

/// Opens connections for as long as they are let in.
fn open_all(client: &Pod, server: &Pod) -> Vec<TcpStream> {
    let opened = std::iter::from_fn(|| app::open(&client.netns, server.at(false, PORT)).ok());
    let held: Vec<_> = opened.take(ROOM).collect();
    assert!((ROOM / 4..ROOM).contains(&held.len()), "{} were let in", held.len());
    held
}

fn says(mesh: &Mesh, agent: &str, why: &str) {
    eventually("the refusal is told, and why", || {
        mesh.log(agent).lines().any(|line| line.contains("reason=\"overloaded\"") && line.contains(why))
    });
}

/// Opens all it can from a client, and asserts that nobody else suffers where the agent of the node that is `limited` has no more room.
fn past_the_bound(limited: usize, agent: &str, why: &str) {
    let (mut mesh, client, server) = mesh(limited);
    let neighbour = pod(&mut mesh, "neighbour", 0);
    eventually("the neighbour is in the mesh", || app::converse(&neighbour.netns, server.at(false, PORT), "hello").is_ok());
    let mut held = open_all(&client, &server);
    says(&mesh, agent, why);
    app::converse(&neighbour.netns, server.at(false, PORT), "hello").expect("room for others");
    held.iter().for_each(|open| app::ping(open).expect("an open connection"));
    held.truncate(held.len() / 2);
    eventually("there is room again", || app::converse(&client.netns, server.at(false, PORT), "hello").is_ok());
    held.iter().for_each(|open| app::ping(open).expect("an open connection"));
}

#[test]
fn a_pod_that_opens_all_it_can_breaks_nothing_and_leaves_room_for_its_neighbours() {
    past_the_bound(0, "agent-a", "this pod holds as many of the agent's connections as are left for all others");
}

#[test]
fn a_server_whose_agent_has_no_more_room_loses_no_connection_and_serves_others() {
    past_the_bound(1, "agent-b", "as are left for all others");
}
