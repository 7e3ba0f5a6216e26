//! Promise: who cannot prove to be the workload that is meant is refused, on either side, with a log line, a count and a reset.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use harness::forge::{Credentials, Forge, Wanted, self_signed};
use harness::http2::{self, kind};
use harness::mesh::manifest;
use harness::peer::{self, Refused};
use harness::{Mesh, MeshSpec, PodSpec, app, attacker, eventually, eventually_within};

const PORT: u16 = 8080;
const CLIENT: &str = "spiffe://cluster.local/ns/shop/sa/client";
const SERVER: &str = "spiffe://cluster.local/ns/shop/sa/server";

/// Credentials that do not hold for `id`, each with what the refusing side must say.
fn rogues(mesh: &Mesh, id: &str) -> Vec<(&'static str, Credentials)> {
    let (right, nobody) = (Forge::of_controller(mesh), Forge::of_nobody());
    let elsewhere = id.replace("cluster.local", "elsewhere.example");
    vec![
        ("it is expired since", right.make(&Wanted::workload(id).valid(-7200, -3600))),
        ("it is not valid before", right.make(&Wanted::workload(id).valid(3600, 7200))),
        // Its root has the right name and the wrong key.
        ("its chain does not verify", nobody.make(&Wanted::workload(id))),
        ("it chains to none of the trusted roots", self_signed(&Wanted::workload(id))),
        ("has 0 URI names", right.make(&Wanted::host("server.shop.svc"))),
        ("elsewhere.example", right.make(&Wanted::workload(&elsewhere))),
    ]
}

#[test]
fn a_client_that_proves_nothing_is_refused_and_one_that_does_is_served() {
    let mut mesh = Mesh::start();
    let server = mesh.pod(PodSpec { name: "server", namespace: "shop", node: 1, enrolled: true });
    app::server(&server.netns, PORT, app::echo);
    let stranger = mesh.pod(PodSpec { name: "stranger", namespace: "shop", node: 0, enrolled: false });
    let dial = |credentials| peer::dial(&stranger.netns, server.v4, credentials, server.at(false, PORT), "hello");
    let good = || Forge::of_controller(&mesh).make(&Wanted::workload(CLIENT));
    let served = |credentials: Credentials| dial(Some(credentials)).is_ok_and(|answer| answer.ends_with("\nhello"));
    eventually("a client with a good certificate is served", || served(good()));

    let refusals = || mesh.metrics(1).sum("culvert_handshakes_total", &["side=\"server\"", "result=\"peer_not_authenticated\""]);
    for (words, credentials) in rogues(&mesh, CLIENT) {
        let before = (refusals(), mesh.log("agent-b").len());
        let refused = dial(Some(credentials)).expect_err(words);
        assert!(matches!(&refused, Refused::Connection(_)), "{words}: {refused:?}");
        eventually(&format!("the refusal is logged: {words}"), || {
            let log = mesh.log("agent-b");
            let line = log[before.1..].lines().find(|line| line.contains("connection failed"));
            line.is_some_and(|line| line.contains("peer_not_authenticated") && line.contains(words))
        });
        eventually("the refusal is counted", || refusals() > before.0);
    }
    let before = refusals();
    assert!(matches!(dial(None), Err(Refused::Connection(_))));
    eventually("the lack of a certificate is counted", || refusals() > before);
    eventually("the lack of a certificate is logged", || mesh.log("agent-b").contains("the peer presented no certificate"));
    assert!(served(good()), "a good certificate is served after all of these");
}

#[test]
fn a_client_is_who_its_certificate_says_and_nobody_else() {
    let mut mesh = Mesh::start();
    let server = mesh.pod(PodSpec { name: "server", namespace: "shop", node: 1, enrolled: true });
    app::server(&server.netns, PORT, app::echo);
    let stranger = mesh.pod(PodSpec { name: "stranger", namespace: "shop", node: 0, enrolled: false });
    let policy = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: client-only, namespace: shop}\n\
                  spec: {rules: [{from: [{source: {principals: [cluster.local/ns/shop/sa/client]}}]}]}\n";
    mesh.apply("client-only", policy);
    mesh.await_policy("shop", Some("client-only"));
    let dial = |id: &str| {
        let credentials = Forge::of_controller(&mesh).make(&Wanted::workload(id));
        peer::dial(&stranger.netns, server.v4, Some(credentials), server.at(false, PORT), "hello")
    };
    eventually("the workload that is allowed is served", || dial(CLIENT).is_ok_and(|answer| answer.ends_with("\nhello")));
    for other in ["spiffe://cluster.local/ns/shop/sa/other", "spiffe://cluster.local/ns/street/sa/client"] {
        assert_eq!(dial(other), Err(Refused::Status(401)), "{other}");
        let identity = format!("src.identity={other} ");
        eventually("the refusal is logged", || {
            let log = mesh.log("agent-b");
            log.lines().any(|line| line.contains(&identity) && line.contains("reason=\"policy_denied\""))
        });
    }
    assert!(dial(CLIENT).is_ok(), "the workload that is allowed is served after all of these");
}

#[test]
fn a_tunnel_leads_to_its_own_pod_only() {
    let mut mesh = Mesh::start();
    let pods = ["server", "other"].map(|name| {
        let pod = mesh.pod(PodSpec { name, namespace: "shop", node: 1, enrolled: true });
        app::server(&pod.netns, PORT, app::echo);
        pod
    });
    let [server, other] = &pods;
    let stranger = mesh.pod(PodSpec { name: "stranger", namespace: "shop", node: 0, enrolled: false });
    let good = Forge::of_controller(&mesh).make(&Wanted::workload(CLIENT));
    let ask = |authority| peer::dial(&stranger.netns, server.v4, Some(good.clone()), authority, "hello");
    eventually("the pod's own address is served", || ask(server.at(false, PORT)).is_ok());
    for (place, authority) in [
        // The application would see its own pod's address in the client's place.
        ("the pod's address of the other family", server.at(true, PORT)),
        ("another pod of the node", other.at(false, PORT)),
        ("loopback", ([127, 0, 0, 1], PORT).into()),
        ("the node", ([10, 77, 0, 2], PORT).into()),
    ] {
        assert_eq!(ask(authority), Err(Refused::Status(400)), "{place}");
        let line = format!("dst.addr={authority}");
        eventually("the refusal is logged", || {
            mesh.log("agent-b").lines().any(|log| log.contains(&line) && log.contains("bad_request"))
        });
    }
}

#[test]
fn a_server_that_is_not_the_workload_that_was_meant_gets_no_byte() {
    let mut mesh = Mesh::prepare(MeshSpec::default());
    mesh.start_controller();
    mesh.start_agent(0);
    let client = mesh.pod(PodSpec { name: "client", namespace: "shop", node: 0, enrolled: true });
    let right = Forge::of_controller(&mesh);
    let mut servers = rogues(&mesh, SERVER);
    servers.push(("it names another workload", right.make(&Wanted::workload("spiffe://cluster.local/ns/shop/sa/thief"))));
    let refusals = || mesh.metrics(0).sum("culvert_handshakes_total", &["side=\"client\"", "result=\"peer_not_authenticated\""]);
    for (number, (words, credentials)) in servers.into_iter().enumerate() {
        // No agent runs on that node: who listens is whoever got there.
        let name = format!("server-{number}");
        let (spec, place) = (PodSpec { name: &name, namespace: "shop", node: 1, enrolled: true }, 100 + number as u16);
        let account = format!("serviceAccountName: {name}");
        mesh.apply(&format!("pod-{name}"), &manifest(spec, place).replace(&account, "serviceAccountName: server"));
        let server = mesh.place_only(spec, place);
        let seen = peer::accept(&server.netns, credentials);
        let mut capture = mesh.capture_between_nodes();
        let before = (refusals(), mesh.log("agent-a").len());
        let logged = || {
            let log = mesh.log("agent-a");
            let line = log[before.1..].lines().find(|line| line.contains("peer_not_authenticated"));
            line.is_some_and(|line| line.contains(words))
        };
        eventually(&format!("the refusal is logged: {words}"), || {
            let answer = app::converse(&client.netns, server.at(false, PORT), "marker-for-nobody");
            let reset = answer.as_ref().is_err_and(|error| {
                [std::io::ErrorKind::ConnectionReset, std::io::ErrorKind::ConnectionRefused].contains(&error.kind())
            });
            assert!(reset, "{words}: {answer:?}");
            logged()
        });
        assert!(refusals() > before.0, "the refusal is counted: {words}");
        capture.finish();
        assert!(!capture.shows(b"marker-for-nobody"));
        let ends = seen.lock().expect("no panic");
        assert!(ends.iter().all(|end| matches!(end, Err(Refused::Connection(_)))), "{words}: {ends:?}");
    }
    let server = mesh.place(PodSpec { name: "server", namespace: "shop", node: 1, enrolled: true });
    let _seen = peer::accept(&server.netns, right.make(&Wanted::workload(SERVER)));
    eventually("the right certificate is served", || {
        let mut stream = app::connect(&client.netns, server.at(false, PORT)).expect("captured");
        let answer = std::io::Write::write_all(&mut stream, b"hello")
            .and_then(|()| stream.shutdown(std::net::Shutdown::Write))
            .and_then(|()| std::io::read_to_string(&mut stream));
        answer.is_ok_and(|answer| answer == "hello")
    });
}

#[test]
fn a_tunnel_carries_nothing_new_once_a_root_of_its_day_is_withdrawn() {
    for form in ["auto", "hbone"] {
        let mut mesh = Mesh::prepare(MeshSpec { agents: [&["--tunnel-form", form]; 2], ..MeshSpec::default() });
        mesh.start_controller();
        let roots = [Forge::of_controller(&mesh).root_pem, Forge::of_nobody().root_pem];
        let files = [0, 1].map(|node| {
            let file = mesh.directory().join(format!("roots-{node}.pem"));
            std::fs::write(&file, roots.concat()).expect("a file");
            mesh.trust(&file);
            mesh.start_agent(node);
            file
        });
        let server = mesh.pod(PodSpec { name: "server", namespace: "shop", node: 1, enrolled: true });
        app::server(&server.netns, PORT, app::echo);
        let client = mesh.pod(PodSpec { name: "client", namespace: "shop", node: 0, enrolled: true });
        let converse = || app::converse(&client.netns, server.at(false, PORT), "hello").is_ok();
        eventually("the server is reached", converse);
        let handshakes = || mesh.metrics(0).sum("culvert_handshakes_total", &["side=\"client\"", "result=\"ok\""]);
        // One after the other: each side has to see to it, whoever the other is.
        for (side, file) in ["client", "server"].iter().zip(&files) {
            let before = handshakes();
            assert!(converse() && converse());
            assert_eq!(handshakes(), before, "{form}: the tunnel is warm");
            std::fs::write(file, &roots[0]).expect("a file");
            let renewed = || converse() && handshakes() > before;
            eventually_within(
                Duration::from_secs(20),
                &format!("{form}: the {side} wants to see the certificate again"),
                renewed,
            );
        }
    }
}

#[test]
fn a_client_that_heeds_no_farewell_opens_nothing_once_its_root_is_withdrawn() {
    let mut mesh = Mesh::prepare(MeshSpec::default());
    mesh.start_controller();
    let (controller, withdrawn) = (Forge::of_controller(&mesh), Forge::of_nobody());
    let file = mesh.directory().join("roots.pem");
    std::fs::write(&file, [&*controller.root_pem, &*withdrawn.root_pem].concat()).expect("a file");
    mesh.trust(&file);
    mesh.start_agent(1);
    let server = mesh.pod(PodSpec { name: "server", namespace: "shop", node: 1, enrolled: true });
    app::server(&server.netns, PORT, app::echo);
    let outsider = mesh.pod(PodSpec { name: "outsider", namespace: "shop", node: 0, enrolled: false });
    let credentials = withdrawn.make(&Wanted::workload(CLIENT));
    let (tunnels, echo) = (SocketAddr::new(server.v4, 15008), server.at(false, PORT));
    let warm = credentials.clone();
    eventually("a client of the second root is served", || {
        peer::dial(&outsider.netns, server.v4, Some(warm.clone()), echo, "hello").is_ok()
    });
    outsider.netns.run(move || {
        let authority = echo.to_string();
        let mut tunnel = attacker::connect(tunnels, Some(&credentials), &[b"h2"]).expect("the root is believed");
        tunnel.write_all(&[http2::PREFACE, &http2::frame(kind::SETTINGS, 0, 0, &[])].concat()).expect("the peer reads");
        assert!(http2::tunnel_stream(&mut tunnel, 1, &authority).expect("an answer"), "a stream is granted before the end");
        std::fs::write(&file, &*controller.root_pem).expect("a file");
        let mut streams = (3..).step_by(2);
        let mut granted = || {
            let stream = streams.next().expect("a number");
            let granted = http2::tunnel_stream(&mut tunnel, stream, &authority).expect("an answer");
            if granted {
                // It ends, so that it is not for their number that one is refused.
                tunnel.write_all(&http2::frame(kind::DATA, http2::END_STREAM, stream, b"hello")).expect("the peer reads");
                http2::tunnel_answer(&mut tunnel, stream).expect("an answer");
            }
            granted
        };
        eventually_within(Duration::from_secs(30), "it is refused", || !granted());
        assert!(!granted(), "and stays so");
    });
    let told = |line: &str| line.contains("reason=\"peer_not_authenticated\"") && line.contains("other roots are believed");
    eventually("the refusal is told", || mesh.log("agent-b").lines().any(told));
}

#[test]
fn a_tunnel_carries_nothing_new_when_its_client_s_certificate_has_ended() {
    const LIFE: i64 = 6;
    let mut mesh = Mesh::start();
    let server = mesh.pod(PodSpec { name: "server", namespace: "shop", node: 1, enrolled: true });
    app::server(&server.netns, PORT, app::echo);
    let thief = mesh.pod(PodSpec { name: "thief", namespace: "shop", node: 0, enrolled: false });
    let right = Forge::of_controller(&mesh);
    let (tunnels, echo) = (SocketAddr::new(server.v4, 15008), server.at(false, PORT));
    eventually("a client with a good certificate is served", || {
        peer::dial(&thief.netns, server.v4, Some(right.make(&Wanted::workload(CLIENT))), echo, "hello").is_ok()
    });
    let stolen = right.make(&Wanted::workload(CLIENT).valid(-60, LIFE));
    let ended = Instant::now() + Duration::from_secs(LIFE.unsigned_abs());
    thief.netns.run(move || {
        let authority = echo.to_string();
        let mut shared = attacker::connect(tunnels, Some(&stolen), &[b"h2"]).expect("the certificate is good still");
        let mut single = attacker::connect(tunnels, Some(&stolen), &[b"culvert/1"]).expect("the certificate is good still");
        shared.write_all(&[http2::PREFACE, &http2::frame(kind::SETTINGS, 0, 0, &[])].concat()).expect("the peer reads");
        assert!(http2::tunnel_stream(&mut shared, 1, &authority).expect("an answer"), "a stream is granted before the end");
        let mut streams = (3..).step_by(2);
        let refused = eventually_refused(|| http2::tunnel_stream(&mut shared, streams.next().expect("a number"), &authority));
        assert!(refused >= ended - Duration::from_secs(1), "it was refused {:?} too early", ended - refused);
        // What was opened in time goes on, for a peer that heeds nothing of what it was told of the tunnel's end.
        shared.write_all(&http2::frame(kind::DATA, http2::END_STREAM, 1, b"still here")).expect("the stream is open");
        assert!(http2::tunnel_answer(&mut shared, 1).expect("an answer").ends_with(b"still here"));
        // Where a tunnel carries one stream at a time, there is none in it now, and no more to come.
        let end = single.read(&mut [0; 64]);
        assert!(end.as_ref().map_or_else(|error| error.kind() == ErrorKind::ConnectionReset, |read| *read == 0), "{end:?}");
    });
    let told =
        |line: &str| line.contains("reason=\"peer_not_authenticated\"") && line.contains("the client's certificate has ended");
    eventually("the refusal is told", || mesh.log("agent-b").lines().any(told));
}

/// Asks now and then until it is refused, and says when that was.
fn eventually_refused(mut is_granted: impl FnMut() -> std::io::Result<bool>) -> Instant {
    let mut refused = None;
    eventually("it is refused", || {
        std::thread::sleep(Duration::from_millis(100));
        refused = (!is_granted().expect("an answer")).then(Instant::now);
        refused.is_some()
    });
    refused.expect("it was refused")
}
