//! Promise: agents choose the form of their tunnels as their operators let them, and every choice of two agents fits.

use std::net::TcpStream;

use harness::{Mesh, PodSpec, app, eventually};

const PORT: u16 = 8080;
const STREAMS: u64 = 5;

#[test]
fn the_single_form_is_spoken_where_both_agents_may_and_http2_where_one_may_not() {
    for (forms, single) in
        [(["auto", "auto"], true), (["auto", "hbone"], false), (["hbone", "auto"], false), (["hbone", "hbone"], false)]
    {
        let mut mesh = Mesh::start_in(forms);
        let server = mesh.pod(PodSpec { name: "server", namespace: "shop", node: 1, enrolled: true });
        app::server(&server.netns, PORT, app::echo);
        let mut capture = mesh.capture_between_nodes();
        let client = mesh.pod(PodSpec { name: "client", namespace: "shop", node: 0, enrolled: true });
        eventually("the server is reached", || app::converse(&client.netns, server.at(false, PORT), "marker-form").is_ok());
        capture.finish();
        assert!(!capture.shows(b"marker-form"), "{forms:?}: in plaintext");
        // What the client's agent offers is the one thing of a handshake that is in sight.
        assert!(capture.shows(b"h2"), "{forms:?}: HTTP/2 is always offered");
        assert_eq!(capture.shows(b"culvert/1"), forms[0] == "auto", "{forms:?}: the single form is offered");

        // HTTP/2 carries them all in one tunnel; the single form has one for each.
        let open: Vec<TcpStream> =
            (0..STREAMS).map(|_| app::connect(&client.netns, server.at(false, PORT)).expect("a connection")).collect();
        eventually("all are open", || mesh.metrics(1).sum("culvert_connections_open", &["direction=\"inbound\""]) == STREAMS);
        let tunnels = mesh.metrics(1).sum("culvert_tunnels_open", &["side=\"server\""]);
        assert_eq!(tunnels, if single { STREAMS } else { 1 }, "{forms:?}: tunnels for {STREAMS} connections");
        drop(open);
    }
}
