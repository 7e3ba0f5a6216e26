//! Promise: connections that a client makes one after the other are in the server's queue in that order, whatever carries them.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::mpsc::{Receiver, channel};

use harness::{Endpoint, Mesh, Pod, PodSpec, Service, app, eventually};

const PORT: u16 = 8080;
const QUEUE: u16 = 8081;
const CONNECTIONS: u32 = 100;

in_each_form!(connections_arrive_in_the_order_in_which_they_were_made);
in_the_kernel!(connections_arrive_in_the_order_in_which_they_were_made);

/// A server that tells the number that each connection begins with, in the order in which it is given the connections.
fn in_turn(server: &Pod, port: u16) -> Receiver<u32> {
    let (tell, told) = channel();
    let listener = server.netns.run(move || app::listener(port));
    std::thread::spawn(move || {
        let mut open = Vec::new();
        for mut stream in listener.incoming().flatten() {
            let mut number = [0; 4];
            stream.read_exact(&mut number).expect("a number");
            open.push(stream);
            if tell.send(u32::from_be_bytes(number)).is_err() {
                return;
            }
        }
    });
    told
}

/// Makes connections one after the other, and asserts that they arrive so.
fn assert_order(client: &Pod, to: SocketAddr, told: &Receiver<u32>) {
    let open: Vec<TcpStream> = client.netns.run(move || {
        let connect = |number: u32| {
            let mut stream = TcpStream::connect(to).expect("a connection");
            stream.write_all(&number.to_be_bytes()).expect("open");
            stream
        };
        (0..CONNECTIONS).map(connect).collect()
    });
    let arrived: Vec<u32> = open.iter().map(|_| told.recv_timeout(app::PATIENCE).expect("each arrives")).collect();
    let early: Vec<_> = arrived.iter().zip(0..).filter(|(number, place)| *number != place).collect();
    assert!(early.is_empty(), "to {to}: {} are elsewhere than in their place: {early:?}", early.len());
}

fn connections_arrive_in_the_order_in_which_they_were_made(forms: [&str; 2]) {
    let mut mesh = Mesh::start_in(forms);
    let (client, server) = app::pair(&mut mesh, PORT);
    if mesh.in_the_kernel() {
        // The first would be in tunnels, and later ones overtake them.
        app::await_verdict(&mesh, &client, &server, QUEUE);
    }
    let told = in_turn(&server, QUEUE);
    let service = "10.96.0.80".parse().expect("an address");
    mesh.serve(
        Service { name: "queue", addresses: &[service], port: 80, target: "8081", more: "" },
        &[Endpoint::ready(server.v4, QUEUE)],
    );
    for v6 in [false, true] {
        assert_order(&client, server.at(v6, QUEUE), &told);
    }
    let to = SocketAddr::new(service, 80);
    eventually("the service is known", || app::connect(&client.netns, to).and_then(|mut one| one.write_all(&[0; 4])).is_ok());
    told.recv_timeout(app::PATIENCE).expect("the first through the service");
    assert_order(&client, to, &told);
}

#[test]
fn plaintext_that_policy_is_asked_about_arrives_in_order_too() {
    let mut mesh = Mesh::start();
    let (_client, server) = app::pair(&mut mesh, PORT);
    let outsider = mesh.pod(PodSpec { name: "outsider", namespace: "shop", node: 0, enrolled: false });
    // Nobody of this test, but policy must be asked.
    mesh.deny("denied");
    eventually("plaintext comes to the agent", || {
        app::converse(&outsider.netns, server.at(false, PORT), "hello").is_ok() && mesh.outcome(1, "steered_plaintext") > 0
    });
    let before = mesh.outcome(1, "steered_plaintext");
    assert_order(&outsider, server.at(false, QUEUE), &in_turn(&server, QUEUE));
    assert_eq!(mesh.outcome(1, "steered_plaintext") - before, u64::from(CONNECTIONS), "all of it came to the agent");
}
