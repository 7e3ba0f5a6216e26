//! Promise: not to know who is at an address of the cluster's never means plaintext: who knows is asked first, and without an answer
//! there is no connection. Addresses outside of the cluster are nobody's business.

use std::io::ErrorKind;
use std::net::SocketAddr;

use harness::mesh::manifest;
use harness::{Capture, Mesh, Pod, PodSpec, app, eventually};
use nix::sys::signal::Signal;

const PORT: u16 = 8080;
const CLIENT: PodSpec<'static> = PodSpec { name: "client", namespace: "shop", node: 0, enrolled: true };
const SERVER: PodSpec<'static> = PodSpec { name: "server", namespace: "shop", node: 1, enrolled: true };

/// A pod's namespace with a server in it, of which there is no object.
fn nobody(mesh: &Mesh, name: &str, number: u16) -> Pod {
    let pod = mesh.place_only(PodSpec { name, ..SERVER }, number);
    app::server(&pod.netns, PORT, app::echo);
    pod
}

/// Whether the client reaches the server, which sees the client's own address.
fn reached(client: &Pod, server: &Pod, v6: bool) -> bool {
    app::converse(&client.netns, server.at(v6, PORT), "hello").is_ok_and(|seen| seen.client.ip() == client.at(v6, 0).ip())
}

fn none_passed(capture: &Capture, port: u16, what: &str) {
    let segments = capture.segments();
    let passed: Vec<_> = segments.iter().filter(|(from, to)| from.port() == port || to.port() == port).collect();
    assert!(passed.is_empty(), "{what}: {passed:?}");
}

#[test]
fn a_pod_that_the_clients_agent_has_not_heard_of_is_asked_about_and_reached_encrypted() {
    let mut mesh = Mesh::start();
    let client = mesh.pod(CLIENT);
    for (number, v6) in [(100, false), (101, true), (102, false)] {
        let name = format!("late-{number}");
        let spec = PodSpec { name: &name, ..SERVER };
        let server = nobody(&mesh, &name, number);
        // At first it is nobody's: an answer that must not outlive the moment.
        [false, true].into_iter().for_each(|v6| eventually("nobody's server is reached", || reached(&client, &server, v6)));
        let mut capture = mesh.capture_between_nodes();
        // Who would tell the agents of the pod is held up until the client has dialled.
        mesh.signal_controller(Signal::SIGSTOP);
        mesh.apply(&format!("pod-{name}"), &manifest(spec, number));
        let first = app::connect(&client.netns, server.at(v6, PORT));
        mesh.signal_controller(Signal::SIGCONT);
        let mut answer = first.and_then(|stream| app::converse_over(stream, "marker-late"));
        // The server's own agent may not have heard of it either, and takes no tunnel for it yet.
        eventually(&format!("{name} is reached"), || match &answer {
            Ok(seen) => seen.client.ip() == client.at(v6, 0).ip(),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{name}");
                answer = app::converse(&client.netns, server.at(v6, PORT), "marker-late");
                false
            }
        });
        capture.finish();
        assert!(!capture.shows(b"marker-late"), "{name}: in plaintext");
        none_passed(&capture, PORT, "an attempt in the clear");
        assert!(capture.segments().iter().any(|(_, to)| to.port() == 15008), "{name}: by tunnel");
    }
}

#[test]
fn without_anybody_to_ask_an_unknown_address_of_the_clusters_is_not_dialled() {
    let mut mesh = Mesh::start();
    let server = mesh.pod(SERVER);
    app::server(&server.netns, PORT, app::echo);
    let client = mesh.pod(CLIENT);
    let unknown = nobody(&mesh, "unknown", 100);
    for v6 in [false, true] {
        eventually("the server is reached", || reached(&client, &server, v6));
        // That nobody of the mesh is there is an answer. Its namespace opens when the server's agent has been told so, too.
        eventually("the unknown one is reached", || {
            app::converse(&client.netns, unknown.at(v6, PORT), "hello")
                .is_ok_and(|seen| seen.client.ip() == client.at(v6, 0).ip())
        });
    }
    mesh.kill_controller();
    eventually("the agent notices", || mesh.metrics(0).sum("culvert_xds_connected", &[]) == 0);
    for v6 in [false, true] {
        let mut capture = mesh.capture_between_nodes();
        let refused = app::converse(&client.netns, unknown.at(v6, PORT), "marker-unknown").expect_err("nobody can be asked");
        capture.finish();
        assert_eq!(refused.kind(), ErrorKind::ConnectionReset);
        let address = unknown.at(v6, 0).ip();
        let segments = capture.segments();
        assert!(segments.iter().all(|(from, to)| from.ip() != address && to.ip() != address), "on the wire: {segments:?}");
        let line = format!("dst.addr={}", unknown.at(v6, PORT));
        eventually("the refusal is logged", || {
            let parts = [line.as_str(), "destination_unreachable", "is not known"];
            mesh.log("agent-a").lines().any(|log| parts.iter().all(|part| log.contains(part)))
        });
        let mut capture = mesh.capture_between_nodes();
        app::converse(&client.netns, server.at(v6, PORT), "marker-known").expect("who is known is reached");
        capture.finish();
        assert!(!capture.shows(b"marker-known"), "in plaintext");
    }
    mesh.start_controller();
    eventually("there is somebody to ask", || reached(&client, &unknown, false));
}

#[test]
fn an_address_outside_of_the_cluster_is_dialled_by_the_client_itself() {
    let mut mesh = Mesh::start();
    let client = mesh.pod(CLIENT);
    app::server(mesh.node(1), PORT, app::echo);
    mesh.node(1).ip("addr add 192.0.2.1/32 dev br0");
    mesh.node(1).ip("addr add 2001:db8::1/128 dev br0 nodad");
    client.netns.ip("route add 192.0.2.1/32 dev eth0");
    client.netns.ip("-6 route add 2001:db8::1/128 dev eth0");
    let outside = |address: &str| SocketAddr::new(address.parse().expect("an address"), PORT);
    let untouched = |when: &str| {
        for address in ["192.0.2.1", "2001:db8::1"] {
            let seen = app::converse(&client.netns, outside(address), "hello")
                .unwrap_or_else(|error| panic!("{address} {when}: {error}"));
            assert_eq!((seen.client, seen.peer), (seen.local, outside(address)), "{address} {when}: somebody stands between");
        }
    };
    untouched("with a controller");
    mesh.kill_controller();
    eventually("the agent notices", || mesh.metrics(0).sum("culvert_xds_connected", &[]) == 0);
    untouched("without a controller");
    mesh.kill_agent(0);
    untouched("without an agent");
}
