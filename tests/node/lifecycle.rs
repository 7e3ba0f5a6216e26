//! Promise: no moment in the life of a pod, an agent or the controller lets plaintext out where there should be none.

use std::io::{Read as _, Write as _};

use harness::{Mesh, PodSpec, app, eventually};

const PORT: u16 = 8080;

#[test]
fn a_stopped_agent_closes_its_pods_and_its_successor_opens_them() {
    let mut mesh = Mesh::start();
    let server = mesh.pod(PodSpec { name: "server", namespace: "shop", node: 1, enrolled: true });
    app::server(&server.netns, PORT, app::echo);
    let client = mesh.pod(PodSpec { name: "client", namespace: "shop", node: 0, enrolled: true });
    let reached = || app::converse(&client.netns, server.at(false, PORT), "marker-stopped");
    eventually("the server is reached", || reached().is_ok());

    mesh.kill_agent(0);
    let mut capture = mesh.capture_between_nodes();
    let refused = reached().expect_err("nobody carries the connection");
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    capture.finish();
    assert!(!capture.shows(b"marker-stopped"));

    mesh.start_agent(0);
    eventually("the successor takes over", || reached().is_ok());
}

#[test]
fn traffic_goes_on_without_the_controller() {
    let mut mesh = Mesh::start();
    let server = mesh.pod(PodSpec { name: "server", namespace: "shop", node: 1, enrolled: true });
    app::server(&server.netns, PORT, app::echo);
    let client = mesh.pod(PodSpec { name: "client", namespace: "shop", node: 0, enrolled: true });
    let reached = || app::converse(&client.netns, server.at(false, PORT), "hello").is_ok();
    eventually("the server is reached", reached);
    mesh.kill_controller();
    assert!(reached());
    mesh.start_controller();
    mesh.mode("shop", "STRICT");
    let plain = mesh.pod(PodSpec { name: "plain", namespace: "shop", node: 0, enrolled: false });
    eventually("changes arrive again", || app::converse(&plain.netns, server.at(false, PORT), "hello").is_err());
    assert!(reached());
}

#[test]
fn a_certificate_is_renewed_under_an_open_connection() {
    let mut mesh = Mesh::start_with(&["--cert-ttl", "4s"]);
    let server = mesh.pod(PodSpec { name: "server", namespace: "shop", node: 1, enrolled: true });
    app::server(&server.netns, PORT, app::echo);
    let client = mesh.pod(PodSpec { name: "client", namespace: "shop", node: 0, enrolled: true });
    eventually("the server is reached", || app::converse(&client.netns, server.at(false, PORT), "warm").is_ok());
    let mut stream = app::connect(&client.netns, server.at(false, PORT)).expect("a connection");
    let mut seen = [0; 64];
    let started = std::time::Instant::now();
    while started.elapsed() < std::time::Duration::from_secs(6) {
        stream.write_all(b"still here").expect("an open connection");
        assert!(stream.read(&mut seen).expect("an open connection") > 0);
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    assert!(app::converse(&client.netns, server.at(false, PORT), "new").is_ok(), "the first certificates have expired");
}
