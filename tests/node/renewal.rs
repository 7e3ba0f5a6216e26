//! Promise: certificates are short-lived, and nobody notices while there is somebody to renew them; without, they serve to their end
//! and not beyond.

use std::io::{ErrorKind, Read as _, Write as _};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use harness::{Mesh, Pod, PodSpec, app, eventually};

const PORT: u16 = 8080;

/// A client and a server on two nodes, whose certificates live this long.
fn pair(life: &str) -> (Mesh, Pod, Pod) {
    let mut mesh = Mesh::start_with(&["--cert-ttl", life]);
    let server = mesh.pod(PodSpec { name: "server", namespace: "shop", node: 1, enrolled: true });
    app::server(&server.netns, PORT, app::echo);
    let client = mesh.pod(PodSpec { name: "client", namespace: "shop", node: 0, enrolled: true });
    eventually("the server is reached", || app::converse(&client.netns, server.at(false, PORT), "warm").is_ok());
    (mesh, client, server)
}

#[test]
fn a_certificate_is_renewed_under_an_open_connection() {
    let (_mesh, client, server) = pair("4s");
    let mut stream = app::connect(&client.netns, server.at(false, PORT)).expect("a connection");
    let mut seen = [0; 64];
    let started = std::time::Instant::now();
    while started.elapsed() < Duration::from_secs(6) {
        stream.write_all(b"still here").expect("an open connection");
        assert!(stream.read(&mut seen).expect("an open connection") > 0);
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(app::converse(&client.netns, server.at(false, PORT), "new").is_ok(), "the first certificates have expired");
}

#[test]
fn without_the_controller_certificates_serve_to_their_end_and_not_beyond() {
    let (mut mesh, client, server) = pair("8s");
    let open = app::open(&client.netns, server.at(false, PORT)).expect("a connection");
    mesh.kill_controller();
    eventually("the agents notice", || (0..2).all(|node| mesh.metrics(node).sum("culvert_xds_connected", &[]) == 0));
    let ends = [(0, "client"), (1, "server")].map(|(node, account)| {
        let identity = format!("identity=\"spiffe://cluster.local/ns/shop/sa/{account}\"");
        let seconds = mesh.metrics(node).sum("culvert_certificate_expiry_timestamp_seconds", &[&identity]);
        UNIX_EPOCH + Duration::from_secs(seconds)
    });
    let converse = |marker| app::converse(&client.netns, server.at(false, PORT), marker);

    // A conversation that begins a second before the end is over by then.
    let (first, last) = (ends[0].min(ends[1]) - Duration::from_secs(1), ends[0].max(ends[1]));
    let mut served = 0;
    while SystemTime::now() < first {
        converse("served")
            .unwrap_or_else(|error| panic!("{error}, {:?} before the end", first.duration_since(SystemTime::now())));
        served += 1;
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(served > 10, "served only {served} times");
    app::ping(&open).expect("an open connection lives");

    std::thread::sleep(last.duration_since(SystemTime::now()).unwrap_or_default());
    let mut capture = mesh.capture_between_nodes();
    let refused = converse("marker-expired").expect_err("an expired certificate serves nobody");
    capture.finish();
    assert_eq!(refused.kind(), ErrorKind::ConnectionReset);
    assert!(!capture.shows(b"marker-expired"), "in plaintext");
    // Tunnels that stand may have something to say of themselves.
    let segments = capture.segments();
    assert!(segments.iter().all(|(_, to)| to.ip() != server.v4 || to.port() == 15008), "on the wire: {segments:?}");
    eventually("the refusal is logged", || {
        let log = mesh.log("agent-a");
        log.lines()
            .any(|line| line.contains("connection failed") && line.contains("reason=\"no_identity\"") && line.contains("expired"))
    });
    app::ping(&open).expect("a connection that was opened before lives on");

    mesh.start_controller();
    eventually("there are certificates again", || converse("back").is_ok());
    app::ping(&open).expect("a connection that was opened before lives on");
}
