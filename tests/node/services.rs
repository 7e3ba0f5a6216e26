//! Promise: a service is reached as its objects say: any endpoint in turn, on the port behind, ready, near where that is asked for;
//! and the client sees the service's address as its peer, whatever is behind.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr};

use harness::{Endpoint, Mesh, Pod, PodSpec, Service, app, eventually};

const PORT: u16 = 8080;
const SERVICE: Service<'static> = Service { name: "web", addresses: &[], port: 80, target: "8080", more: "" };

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

/// A pod whose servers on `PORT` and the next port say its name and the client's address.
fn named(mesh: &mut Mesh, name: &'static str, node: usize, enrolled: bool) -> Pod {
    let pod = mesh.pod(PodSpec { name, namespace: "shop", node, enrolled });
    for port in [PORT, PORT + 1] {
        app::server(&pod.netns, port, move |stream| tell(stream, name));
    }
    pod
}

fn tell(mut stream: std::net::TcpStream, name: &str) {
    let Ok(mut client) = stream.peer_addr() else { return };
    client.set_ip(client.ip().to_canonical());
    // In one piece, so that a capture shows it in one.
    let _gone = stream.write_all(format!("{name} {client}").as_bytes());
}

/// Whom a client reached there, and from which address.
fn ask(client: &Pod, to: SocketAddr) -> io::Result<(String, SocketAddr)> {
    let mut stream = app::connect(&client.netns, to)?;
    assert_eq!(stream.peer_addr()?, to, "getpeername");
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (name, seen) = answer.split_once(' ').ok_or(ErrorKind::UnexpectedEof)?;
    let seen = seen.parse().map_err(|_no_address| io::Error::from(ErrorKind::InvalidData))?;
    Ok((name.to_owned(), seen))
}

/// How often each endpoint was reached.
fn spread(client: &Pod, to: SocketAddr, times: usize) -> BTreeMap<String, usize> {
    let mut reached = BTreeMap::new();
    for _ in 0..times {
        let (name, seen) = ask(client, to).expect("an endpoint");
        assert_eq!(seen.ip(), client.at(to.is_ipv6(), 0).ip(), "what {name} sees");
        *reached.entry(name).or_default() += 1;
    }
    reached
}

fn evenly<'a>(names: impl IntoIterator<Item = &'a str>, times: usize) -> BTreeMap<String, usize> {
    names.into_iter().map(|name| (name.to_owned(), times)).collect()
}

fn refused(client: &Pod, to: SocketAddr) -> bool {
    app::connect(&client.netns, to).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
}

#[test]
fn connections_go_to_each_endpoint_in_turn_on_the_port_behind_the_services() {
    let mut mesh = Mesh::start();
    let near = named(&mut mesh, "near", 0, true);
    let far = named(&mut mesh, "far", 1, true);
    let outside = named(&mut mesh, "outside", 1, false);
    let client = named(&mut mesh, "client", 0, true);
    let addresses = [ip("10.96.0.1"), ip("fd96::1")];
    let all: Vec<_> = [&near, &far, &outside].iter().flat_map(|pod| [pod.v4, pod.v6]).collect();
    let endpoints: Vec<_> = all.iter().map(|address| Endpoint::ready(*address, PORT)).collect();
    mesh.serve(Service { addresses: &addresses, ..SERVICE }, &endpoints);
    let mut capture = mesh.capture_between_nodes();
    for address in addresses {
        let vip = SocketAddr::new(address, 80);
        eventually("the service is known", || ask(&client, vip).is_ok());
        assert_eq!(spread(&client, vip, 12), evenly(["near", "far", "outside"], 4), "{vip}");
        assert!(refused(&client, SocketAddr::new(address, 81)), "a port that the service has not");
    }
    capture.finish();
    assert!(!capture.shows(b"far 10.77."), "to the far endpoint in plaintext");
    assert!(capture.shows(b"outside 10.77."), "to the endpoint outside of the mesh as it is");

    // The port's name stands for another number in each pod.
    let by_name = [Endpoint::ready(near.v4, PORT), Endpoint::ready(far.v4, PORT + 1)];
    mesh.serve(Service { name: "named", addresses: &[ip("10.96.0.2")], target: "http", ..SERVICE }, &by_name);
    let vip = SocketAddr::new(ip("10.96.0.2"), 80);
    eventually("the service is known", || ask(&client, vip).is_ok());
    assert_eq!(spread(&client, vip, 8), evenly(["near", "far"], 4));

    // An endpoint that is ready no more gets nothing new, and the last one leaves a service that refuses.
    let one_left = [Endpoint { ready: false, ..by_name[0] }, by_name[1]];
    mesh.serve(Service { name: "named", addresses: &[ip("10.96.0.2")], target: "http", ..SERVICE }, &one_left);
    eventually("only the ready endpoint is reached", || spread(&client, vip, 4) == evenly(["far"], 4));
    mesh.serve(Service { name: "named", addresses: &[ip("10.96.0.2")], target: "http", ..SERVICE }, &one_left[..1]);
    eventually("without a ready endpoint connect() itself is refused", || refused(&client, vip));
}

#[test]
fn a_headless_service_is_reached_by_its_pods_addresses() {
    let mut mesh = Mesh::start();
    let pods = [named(&mut mesh, "near", 0, true), named(&mut mesh, "far", 1, true)];
    let client = named(&mut mesh, "client", 0, true);
    let endpoints = [Endpoint::ready(pods[0].v4, PORT), Endpoint { ready: false, ..Endpoint::ready(pods[1].v4, PORT) }];
    mesh.serve(Service { name: "headless", ..SERVICE }, &endpoints);
    for (pod, name) in pods.iter().zip(["near", "far"]) {
        for v6 in [false, true] {
            eventually("the pod is reached", || ask(&client, pod.at(v6, PORT)).is_ok());
            // A pod's own address leads to it, ready or not, on any port.
            assert_eq!(ask(&client, pod.at(v6, PORT)).expect("the pod").0, name);
            assert_eq!(ask(&client, pod.at(v6, PORT + 1)).expect("the pod").0, name);
        }
    }
}

#[test]
fn a_local_traffic_policy_keeps_connections_on_the_clients_node() {
    let mut mesh = Mesh::start();
    let near = named(&mut mesh, "near", 0, true);
    let far = named(&mut mesh, "far", 1, true);
    let clients = [named(&mut mesh, "client-a", 0, true), named(&mut mesh, "client-b", 1, true)];
    let local = Service { name: "local", addresses: &[ip("10.96.0.3")], more: "internalTrafficPolicy: Local", ..SERVICE };
    let vip = SocketAddr::new(ip("10.96.0.3"), 80);
    mesh.serve(local, &[Endpoint::ready(near.v4, PORT), Endpoint::ready(far.v4, PORT)]);
    for (client, name) in clients.iter().zip(["near", "far"]) {
        eventually("the service is known", || ask(client, vip).is_ok());
        assert_eq!(spread(client, vip, 4), evenly([name], 4));
    }
    mesh.serve(local, &[Endpoint::ready(far.v4, PORT)]);
    eventually("no endpoint on the node, no connection", || refused(&clients[0], vip));
    assert_eq!(spread(&clients[1], vip, 2), evenly(["far"], 2));
}

#[test]
fn a_service_may_publish_pods_that_are_not_ready() {
    let mut mesh = Mesh::start();
    let pod = named(&mut mesh, "starting", 1, true);
    let client = named(&mut mesh, "client", 0, true);
    let unready = mesh.manifest("pod-starting").replace("type: Ready, status: \"True\"", "type: Ready, status: \"False\"");
    mesh.apply("pod-starting", &unready);
    let vip = SocketAddr::new(ip("10.96.0.4"), 80);
    let service = Service { name: "early", addresses: &[ip("10.96.0.4")], ..SERVICE };
    mesh.serve(service, &[Endpoint { ready: false, ..Endpoint::ready(pod.v4, PORT) }]);
    eventually("a pod that is not ready is no endpoint", || refused(&client, vip));
    // The cluster calls such endpoints ready; the pod still is not.
    let published = Service { more: "publishNotReadyAddresses: true", ..service };
    mesh.serve(published, &[Endpoint::ready(pod.v4, PORT)]);
    eventually("the pod is reached before it is ready", || ask(&client, vip).is_ok_and(|(name, _)| name == "starting"));
    mesh.serve(service, &[Endpoint { ready: false, ..Endpoint::ready(pod.v4, PORT) }]);
    eventually("and no more", || refused(&client, vip));
}

#[test]
fn a_pod_reaches_itself_through_its_own_service() {
    let mut mesh = Mesh::start();
    let pod = named(&mut mesh, "own", 1, true);
    let addresses = [ip("10.96.0.5"), ip("fd96::5")];
    let endpoints = [Endpoint::ready(pod.v4, PORT), Endpoint::ready(pod.v6, PORT)];
    mesh.serve(Service { name: "own", addresses: &addresses, ..SERVICE }, &endpoints);
    mesh.mode("shop", "STRICT");
    let mut capture = mesh.capture_on_node(1);
    for address in addresses {
        let vip = SocketAddr::new(address, 80);
        eventually("the service is known", || ask(&pod, vip).is_ok());
        assert_eq!(spread(&pod, vip, 4), evenly(["own"], 4));
    }
    capture.finish();
    assert!(!capture.shows(b"own 10.77."), "it never leaves the pod");
}

#[test]
fn an_endpoint_on_its_nodes_own_network_is_reached_beside_the_meshs() {
    let mut mesh = Mesh::start();
    let member = named(&mut mesh, "member", 1, true);
    let client = named(&mut mesh, "client", 0, true);
    let on_node = ip("10.77.0.2");
    app::server(mesh.node(1), PORT, |stream| tell(stream, "on-node"));
    let host = "apiVersion: v1\nkind: Pod\nmetadata: {name: on-node, namespace: shop, labels: {culvert.dev/mesh: enabled}}\n\
                spec: {nodeName: b, hostNetwork: true, containers: [{name: app, image: none}]}\n\
                status: {phase: Running, podIP: 10.77.0.2, podIPs: [{ip: 10.77.0.2}], conditions: [{type: Ready, status: \"True\"}]}\n";
    mesh.apply("pod-on-node", host);
    let slice = |mesh: &Mesh| {
        let endpoints = [Endpoint::ready(member.v4, PORT), Endpoint::ready(on_node, PORT)];
        mesh.serve(Service { name: "mixed", addresses: &[ip("10.96.0.6")], ..SERVICE }, &endpoints);
        // The cluster names the pod behind an address that is its node's.
        let named = mesh.manifest("service-mixed").replace(
            "{addresses: [\"10.77.0.2\"],",
            "{addresses: [\"10.77.0.2\"], targetRef: {kind: Pod, name: on-node, namespace: shop},",
        );
        mesh.apply("service-mixed", &named);
    };
    slice(&mesh);
    let vip = SocketAddr::new(ip("10.96.0.6"), 80);
    eventually("both endpoints are known", || {
        let reached: Vec<_> = (0..4).filter_map(|_| ask(&client, vip).ok()).map(|(name, _)| name).collect();
        reached.len() == 4 && reached.iter().any(|name| name == "on-node")
    });
    assert_eq!(spread(&client, vip, 8), evenly(["member", "on-node"], 4));
}

#[test]
fn a_service_with_nothing_of_the_mesh_behind_it_is_left_to_the_node() {
    let mut mesh = Mesh::start();
    let outside = named(&mut mesh, "outside", 1, false);
    let client = named(&mut mesh, "client", 0, true);
    app::server(&outside.netns, 80, |stream| tell(stream, "outside"));
    // One behind which is a pod, and one behind which is none at all, as behind the API server's.
    for (name, vip, endpoint) in [("plain", "10.96.0.7", outside.v4), ("podless", "10.96.0.8", ip("192.0.2.1"))] {
        mesh.serve(Service { name, addresses: &[ip(vip)], ..SERVICE }, &[Endpoint::ready(endpoint, PORT)]);
        eventually("the agent knows the service", || mesh.admin(0, "/services").contains(vip));
        // The node's service routing, as little of it as will do.
        outside.netns.ip(&format!("addr add {vip}/32 dev eth0"));
        client.netns.ip(&format!("route add {vip}/32 dev eth0"));
        let mut stream =
            app::connect(&client.netns, SocketAddr::new(ip(vip), 80)).unwrap_or_else(|error| panic!("{name}: {error}"));
        let own = stream.local_addr().expect("connected");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        assert_eq!(answer, format!("outside {own}"), "{name}: somebody stands between");
    }
}
