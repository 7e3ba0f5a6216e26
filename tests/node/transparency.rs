//! Promise: applications notice nothing. Addresses are what they would be without a mesh, and what is none of ours is left alone.

use std::net::UdpSocket;
use std::time::Duration;

use harness::{Mesh, PodSpec, app, eventually};

const PORT: u16 = 8080;

#[test]
fn both_ends_see_the_addresses_that_they_would_see_without_a_mesh() {
    let mut mesh = Mesh::start();
    let (client, server) = app::pair(&mut mesh, PORT);
    for v6 in [false, true] {
        let seen = app::converse(&client.netns, server.at(v6, PORT), "hello").expect("a conversation");
        assert_eq!(seen.peer, server.at(v6, PORT), "getpeername");
        assert_eq!(seen.local.ip(), client.at(v6, 0).ip(), "getsockname");
        assert_eq!(seen.client.ip(), client.at(v6, 0).ip(), "what the server sees");
    }
    let mapped = format!("[::ffff:{}]:{PORT}", server.v4).parse().expect("an address");
    let seen = app::converse(&client.netns, mapped, "mapped").expect("a conversation over a mapped address");
    assert_eq!(seen.client.ip(), client.v4);
    let localhost = app::converse(&server.netns, ([127, 0, 0, 1], PORT).into(), "lo").expect("localhost is untouched");
    assert_eq!(localhost.client, localhost.local);
}

#[test]
fn a_pod_reaches_itself_by_its_own_addresses_whatever_its_mode() {
    let mut mesh = Mesh::start();
    let (_client, server) = app::pair(&mut mesh, PORT);
    let outsider = mesh.pod(PodSpec { name: "outsider", namespace: "shop", node: 1, enrolled: false });
    let refused = |v6| app::converse(&outsider.netns, server.at(v6, PORT), "hello").is_err();
    for mode in ["PERMISSIVE", "STRICT"] {
        mesh.mode("shop", mode);
        eventually(&format!("{mode} holds"), || [false, true].map(refused) == [mode == "STRICT"; 2]);
        let mut capture = mesh.capture_on_node(1);
        for v6 in [false, true] {
            let own = app::converse(&server.netns, server.at(v6, PORT), "marker-self").expect("a pod reaches itself");
            assert_eq!((own.client, own.peer), (own.local, server.at(v6, PORT)), "{mode}: somebody stands between");
        }
        capture.finish();
        assert!(!capture.shows(b"marker-self"), "{mode}: it has left the pod");
    }
}

#[test]
fn what_is_outside_the_mesh_is_not_proxied() {
    let mut mesh = Mesh::start();
    let outside = mesh.pod(PodSpec { name: "outside", namespace: "shop", node: 1, enrolled: false });
    app::server(&outside.netns, PORT, app::echo);
    let client = mesh.pod(PodSpec { name: "client", namespace: "shop", node: 0, enrolled: true });
    let seen = app::converse(&client.netns, outside.at(false, PORT), "hello").expect("a conversation");
    assert_eq!(seen.client, seen.local, "the same port at both ends: one connection");
}

#[test]
fn udp_is_untouched() {
    let mut mesh = Mesh::start();
    let (client, server) = app::pair(&mut mesh, PORT);
    mesh.mode("shop", "STRICT");
    let outsider = mesh.pod(PodSpec { name: "outsider", namespace: "shop", node: 0, enrolled: false });
    eventually("STRICT holds", || app::converse(&outsider.netns, server.at(false, PORT), "hello").is_err());
    let socket = server.netns.run(|| UdpSocket::bind("[::]:8080").expect("a free port"));
    std::thread::spawn(move || {
        let mut datagram = [0; 64];
        while let Ok((length, from)) = socket.recv_from(&mut datagram) {
            let _gone = socket.send_to(&datagram[..length], from);
        }
    });
    let mut capture = mesh.capture_between_nodes();
    for (pod, marker) in [(&client, "udp-of-a-member"), (&outsider, "udp-of-an-outsider")] {
        for v6 in [false, true] {
            let to = server.at(v6, PORT);
            pod.netns.run(move || {
                let any = if v6 { "[::]:0" } else { "0.0.0.0:0" };
                let socket = UdpSocket::bind(any).expect("a socket");
                socket.set_read_timeout(Some(Duration::from_secs(5))).expect("an option");
                socket.connect(to).expect("connected");
                assert_eq!(socket.peer_addr().expect("connected"), to);
                socket.send(marker.as_bytes()).expect("sent");
                let mut answer = [0; 64];
                let length = socket.recv(&mut answer).expect("an answer");
                assert_eq!(&answer[..length], marker.as_bytes());
            });
        }
        eventually("the datagrams are seen as they are", || capture.shows(marker.as_bytes()));
    }
    capture.finish();
}

#[test]
fn applications_may_use_the_agents_ports() {
    let mut mesh = Mesh::start();
    let (client, server) = app::pair(&mut mesh, PORT);
    for port in [15001, 15006, 15008] {
        app::server(&server.netns, port, app::echo);
        let seen = app::converse(&client.netns, server.at(false, port), "hello").expect("the application's own port");
        assert_eq!(seen.client.ip(), client.v4);
    }
}
