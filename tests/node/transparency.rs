//! Promise: applications notice nothing. Addresses, ends of streams, resets and refusals are what they would be without a mesh.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use harness::{Mesh, Pod, PodSpec, app, eventually};
use socket2::SockRef;

const PORT: u16 = 8080;

/// Two pods of the mesh on two nodes; the server echoes.
fn pair(mesh: &mut Mesh) -> (Pod, Pod) {
    let server = mesh.pod(PodSpec { name: "server", namespace: "shop", node: 1, enrolled: true });
    app::server(&server.netns, PORT, app::echo);
    let client = mesh.pod(PodSpec { name: "client", namespace: "shop", node: 0, enrolled: true });
    eventually("the server is reached", || app::converse(&client.netns, server.at(false, PORT), "warm").is_ok());
    (client, server)
}

#[test]
fn both_ends_see_the_addresses_that_they_would_see_without_a_mesh() {
    let mut mesh = Mesh::start();
    let (client, server) = pair(&mut mesh);
    for v6 in [false, true] {
        let seen = app::converse(&client.netns, server.at(v6, PORT), "hello").expect("a conversation");
        assert_eq!(seen.peer, server.at(v6, PORT), "getpeername");
        assert_eq!(seen.local.ip(), client.at(v6, 0).ip(), "getsockname");
        assert_eq!(seen.client.ip(), client.at(v6, 0).ip(), "what the server sees");
    }
    let mapped = format!("[::ffff:{}]:{PORT}", server.v4).parse().expect("an address");
    let seen = app::converse(&client.netns, mapped, "mapped").expect("a conversation over a mapped address");
    assert_eq!(seen.client.ip(), client.v4);
    let own = app::converse(&server.netns, server.at(false, PORT), "self").expect("a pod reaches itself");
    assert_eq!((own.client, own.peer), (own.local, server.at(false, PORT)), "and nobody stands between");
    let localhost = app::converse(&server.netns, ([127, 0, 0, 1], PORT).into(), "lo").expect("localhost is untouched");
    assert_eq!(localhost.client, localhost.local);
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
fn a_refused_connection_is_reset_and_a_service_without_endpoints_refused() {
    let mut mesh = Mesh::start();
    let (client, server) = pair(&mut mesh);
    let mut refused = app::connect(&client.netns, server.at(false, PORT + 7)).expect("the agent has taken the connection");
    assert_eq!(refused.read(&mut [0; 16]).expect_err("nobody listens").kind(), ErrorKind::ConnectionReset);

    let service = |ready: bool| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: web, namespace: shop}}\n\
             spec: {{clusterIP: 10.96.0.9, clusterIPs: [10.96.0.9], selector: {{app: server}}, ports: [{{port: 80, targetPort: {PORT}}}]}}\n---\n\
             apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: web-1, namespace: shop, labels: {{kubernetes.io/service-name: web}}}}\n\
             addressType: IPv4\nendpoints: [{{addresses: [{}], conditions: {{ready: {ready}}}}}]\nports: [{{port: {PORT}, protocol: TCP, name: \"\"}}]\n",
            server.v4
        )
    };
    client.netns.ip("route add default via 10.77.0.1");
    let vip = ([10, 96, 0, 9], 80).into();
    mesh.apply("web", &service(true));
    eventually("the service leads to its endpoint", || {
        app::converse(&client.netns, vip, "hello").is_ok_and(|seen| seen.client.ip() == client.v4 && seen.peer == vip)
    });
    mesh.apply("web", &service(false));
    eventually("without a ready endpoint connect() itself is refused", || {
        app::connect(&client.netns, vip).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
    });
}

#[test]
fn a_half_close_leaves_the_other_direction_open_and_a_reset_is_a_reset() {
    fn reset_after_hello(mut stream: TcpStream) {
        let _hello = stream.read(&mut [0; 16]);
        SockRef::from(&stream).set_linger(Some(Duration::ZERO)).expect("an option");
    }
    fn answers_after_the_end(mut stream: TcpStream) {
        let mut all = Vec::new();
        let _read = stream.read_to_end(&mut all);
        let _written = writeln!(stream, "{} bytes", all.len());
    }
    fn speaks_first(mut stream: TcpStream) {
        let _written = stream.write_all(b"welcome\n");
        let _read = stream.read(&mut [0; 16]);
    }
    let mut mesh = Mesh::start();
    let (client, server) = pair(&mut mesh);
    app::server(&server.netns, PORT + 1, reset_after_hello);
    app::server(&server.netns, PORT + 2, answers_after_the_end);
    app::server(&server.netns, PORT + 3, speaks_first);

    let mut stream = app::connect(&client.netns, server.at(false, PORT + 1)).expect("a connection");
    stream.write_all(b"hello").expect("open");
    assert_eq!(stream.read(&mut [0; 16]).expect_err("a reset").kind(), ErrorKind::ConnectionReset);

    let mut stream = app::connect(&client.netns, server.at(false, PORT + 2)).expect("a connection");
    stream.write_all(&[7; 100_000]).expect("open");
    stream.shutdown(Shutdown::Write).expect("half closed");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("the other half is open");
    assert_eq!(answer, "100000 bytes\n");

    let mut stream = app::connect(&client.netns, server.at(false, PORT + 3)).expect("a connection");
    let mut welcome = [0; 8];
    stream.read_exact(&mut welcome).expect("the server speaks first");
    assert_eq!(&welcome, b"welcome\n");
}

#[test]
fn applications_may_use_the_agents_ports() {
    let mut mesh = Mesh::start();
    let (client, server) = pair(&mut mesh);
    for port in [15001, 15006, 15008] {
        app::server(&server.netns, port, app::echo);
        let seen = app::converse(&client.netns, server.at(false, port), "hello").expect("the application's own port");
        assert_eq!(seen.client.ip(), client.v4);
    }
}
