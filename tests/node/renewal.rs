//! Promise: certificates are short-lived, and nobody notices.

use std::io::{Read as _, Write as _};

use harness::{Mesh, app};

const PORT: u16 = 8080;

#[test]
fn a_certificate_is_renewed_under_an_open_connection() {
    let mut mesh = Mesh::start_with(&["--cert-ttl", "4s"]);
    let (client, server) = app::pair(&mut mesh, PORT);
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
