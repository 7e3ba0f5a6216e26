//! Promise: much data and many connections pass whole, and at the pace of the slower end.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use harness::{Mesh, PodSpec, app, eventually};

const PORT: u16 = 8080;
const BLOCK: usize = 1 << 16;
const BLOCKS: usize = 4096;

/// The block of this number: no two are alike.
fn block(number: usize) -> Vec<u8> {
    (0..BLOCK).map(|place| (place.wrapping_mul(31) ^ number) as u8).collect()
}

fn send_all(mut stream: &TcpStream) {
    for number in 0..BLOCKS {
        stream.write_all(&block(number)).expect("an open connection");
    }
    stream.shutdown(std::net::Shutdown::Write).expect("an open connection");
}

fn check_all(mut stream: &TcpStream) {
    let mut seen = vec![0; BLOCK];
    for number in 0..BLOCKS {
        stream.read_exact(&mut seen).expect("an open connection");
        assert!(seen == block(number), "block {number} is damaged");
        if number == 64 {
            // The sender must wait meanwhile, not the agents' memory grow.
            std::thread::sleep(Duration::from_millis(300));
        }
    }
    assert_eq!(stream.read(&mut seen).expect("an end in order"), 0);
}

fn both_ways(stream: &TcpStream) {
    std::thread::scope(|scope| {
        scope.spawn(|| send_all(stream));
        check_all(stream);
    });
}

#[test]
fn a_quarter_gibibyte_each_way_at_once_arrives_whole_past_a_reader_that_pauses() {
    let mut mesh = Mesh::start();
    let server = mesh.pod(PodSpec { name: "server", namespace: "shop", node: 1, enrolled: true });
    app::server(&server.netns, PORT, |stream| both_ways(&stream));
    let client = mesh.pod(PodSpec { name: "client", namespace: "shop", node: 0, enrolled: true });
    both_ways(&app::connect(&client.netns, server.at(false, PORT)).expect("a connection"));
}

#[test]
fn a_thousand_connections_are_open_at_once_and_each_is_its_own() {
    let mut mesh = Mesh::start();
    let server = mesh.pod(PodSpec { name: "server", namespace: "shop", node: 1, enrolled: true });
    app::server(&server.netns, PORT, app::echo);
    let client = mesh.pod(PodSpec { name: "client", namespace: "shop", node: 0, enrolled: true });
    eventually("the server is reached", || app::converse(&client.netns, server.at(false, PORT), "warm").is_ok());
    let to = server.at(false, PORT);
    client.netns.run(move || {
        let open: Vec<_> = (0..1000).map(|_| TcpStream::connect(to).expect("a connection")).collect();
        for (number, mut stream) in open.iter().enumerate() {
            writeln!(stream, "connection {number}").expect("an open connection");
        }
        for (number, mut stream) in open.iter().enumerate() {
            stream.shutdown(std::net::Shutdown::Write).expect("an open connection");
            let mut answer = String::new();
            stream.read_to_string(&mut answer).expect("an answer");
            assert!(answer.ends_with(&format!("\nconnection {number}\n")), "connection {number} got {answer:?}");
        }
    });
}
