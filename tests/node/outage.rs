//! Promise: an agent or a controller that stops, is killed, comes late or comes back never opens what is closed, and what is open
//! goes on.

use std::io::ErrorKind;
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use harness::{Mesh, MeshSpec, Pod, PodSpec, app, eventually, mesh};
use nix::sys::signal::Signal;

const PORT: u16 = 8080;
const SOON: Duration = Duration::from_secs(5);
const SERVER: PodSpec<'static> = PodSpec { name: "server", namespace: "shop", node: 1, enrolled: true };
const CLIENT: PodSpec<'static> = PodSpec { name: "client", namespace: "shop", node: 0, enrolled: true };

fn reached(client: &Pod, server: &Pod) -> bool {
    app::converse(&client.netns, server.at(false, PORT), "hello").is_ok()
}

fn open(client: &Pod, server: &Pod) -> TcpStream {
    app::open(&client.netns, server.at(false, PORT)).expect("a connection")
}

/// Asserts that a connection of the client's is refused, and that none of its bytes was on the wire.
fn closed(mesh: &Mesh, client: &Pod, server: &Pod) {
    let mut capture = mesh.capture_between_nodes();
    let error = app::converse(&client.netns, server.at(false, PORT), "marker-closed").expect_err("nobody carries the connection");
    capture.finish();
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    assert!(!capture.shows(b"marker-closed"));
    assert!(capture.segments().iter().all(|(_, to)| to.port() != PORT), "a connection was tried in the clear");
}

#[test]
fn an_agent_that_is_told_to_stop_lets_open_connections_end_and_takes_no_new_ones() {
    let mut mesh = Mesh::start();
    let (client, server) = app::pair(&mut mesh, PORT);
    let open = open(&client, &server);
    mesh.signal_agent(0, Signal::SIGTERM);
    eventually("the agent takes nothing new", || !reached(&client, &server));
    closed(&mesh, &client, &server);
    for _ in 0..20 {
        app::ping(&open).expect("an open connection goes on");
        std::thread::sleep(Duration::from_millis(20));
    }
    drop(open);
    assert!(mesh.await_agent(0), "the agent ended in order once its connections had");
    closed(&mesh, &client, &server);
    mesh.start_agent(0);
    eventually("the successor serves", || reached(&client, &server));
}

#[test]
fn connections_that_do_not_end_are_reset_at_the_deadline() {
    let arguments: &[&str] = &["--drain-timeout", "1s"];
    let mut mesh = Mesh::start_as(MeshSpec { agents: [arguments; 2], ..MeshSpec::default() });
    let (client, server) = app::pair(&mut mesh, PORT);
    let open = open(&client, &server);
    let told = Instant::now();
    mesh.signal_agent(0, Signal::SIGTERM);
    let ended = loop {
        if let Err(error) = app::ping(&open) {
            break error;
        }
    };
    assert!((900..5000).contains(&told.elapsed().as_millis()), "after {:?}", told.elapsed());
    assert_eq!(ended.kind(), ErrorKind::ConnectionReset, "a reset, no end of file");
    assert!(mesh.await_agent(0));
    assert!(mesh.log("agent-a").contains("reason=\"draining\""));
}

#[test]
fn an_agent_that_is_killed_leaves_its_pods_closed_and_its_successor_opens_them() {
    let mut mesh = Mesh::start();
    let (client, server) = app::pair(&mut mesh, PORT);
    let streams = [open(&client, &server), open(&client, &server)];
    mesh.kill_agent(0);
    for stream in &streams {
        let error = (0..100).find_map(|_| app::ping(stream).err()).expect("nobody carries it on");
        assert!(matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::UnexpectedEof | ErrorKind::BrokenPipe), "{error}");
    }
    closed(&mesh, &client, &server);
    // Longer than an agent whose programs see more than pods is taken for alive.
    std::thread::sleep(Duration::from_secs(4));
    closed(&mesh, &client, &server);
    // So is a pod that starts meanwhile, whether it is in the mesh or not: nobody can tell.
    let late = ["late-member", "late-outsider"]
        .map(|name| mesh.place(PodSpec { name, namespace: "shop", node: 0, enrolled: name == "late-member" }));
    late.iter().for_each(|pod| closed(&mesh, pod, &server));
    mesh.start_agent(0);
    eventually("the successor serves", || reached(&client, &server));
    late.iter().for_each(|pod| eventually("who came meanwhile is served", || reached(pod, &server)));
    // The server's side, too: what was its agent's is not open to plaintext.
    mesh.mode("shop", "STRICT");
    let outsider = mesh.pod(PodSpec { name: "outsider", namespace: "shop", node: 0, enrolled: false });
    eventually("STRICT holds", || !reached(&outsider, &server));
    mesh.kill_agent(1);
    let refused = app::converse(&outsider.netns, server.at(false, PORT), "hello").expect_err("STRICT holds without an agent");
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    assert!(!reached(&client, &server));
    mesh.start_agent(1);
    eventually("the successor serves", || reached(&client, &server));
    assert!(!reached(&outsider, &server));
}

#[test]
fn an_agent_takes_over_from_one_of_another_layout_and_opens_nothing_meanwhile() {
    let mut mesh = Mesh::start();
    mesh.mode("shop", "STRICT");
    let (client, server) = app::pair(&mut mesh, PORT);
    let outsider = mesh.pod(PodSpec { name: "outsider", namespace: "shop", node: 0, enrolled: false });
    for node in [0, 1] {
        mesh.kill_agent(node);
        let pins = mesh.pin_dir(node);
        std::fs::rename(&pins, pins.with_file_name("v1")).expect("another layout");
    }
    closed(&mesh, &client, &server);
    let mut watch = mesh.capture_between_nodes();
    let (stop, to) = (Arc::new(AtomicBool::new(false)), server.at(false, PORT));
    let stopped = Arc::clone(&stop);
    let tries = client.netns.spawn(move || {
        while !stopped.load(Ordering::Relaxed) {
            let _refused_at_first =
                TcpStream::connect_timeout(&to, SOON).and_then(|stream| app::converse_over(stream, "marker-meanwhile"));
        }
    });
    (0..2).for_each(|node| mesh.start_agent(node));
    eventually("the successors serve", || reached(&client, &server));
    stop.store(true, Ordering::Relaxed);
    tries.join().expect("no panic");
    watch.finish();
    let in_the_clear = watch.segments().iter().any(|(_, to)| to.port() == PORT);
    assert!(!in_the_clear && !watch.shows(b"marker-meanwhile"), "something left in the clear");
    assert!(!reached(&outsider, &server), "plaintext gets in");
    for node in [0, 1] {
        assert!(mesh.pin_dir(node).is_dir() && !mesh.pin_dir(node).with_file_name("v1").exists());
    }
    assert!(mesh.log("agent-a").contains("taken over from an agent of another version"));
}

#[test]
fn without_the_controller_everything_that_is_known_goes_on() {
    let mut mesh = Mesh::start();
    let (client, server) = app::pair(&mut mesh, PORT);
    let open = open(&client, &server);
    // Two more pods are known before they start: one of an account that runs here already, one of a new account.
    let (known, new) = (
        PodSpec { name: "known", namespace: "shop", node: 0, enrolled: true },
        PodSpec { name: "new", namespace: "shop", node: 0, enrolled: true },
    );
    let text = mesh::manifest(known, 60).replace("serviceAccountName: known", "serviceAccountName: client");
    mesh.apply("pod-known", &text);
    mesh.apply("pod-new", &mesh::manifest(new, 61));
    let workloads = || mesh.metrics(0).sum("culvert_xds_connected", &[]) == 1 && mesh.admin(0, "/workloads").contains("\"new\"");
    eventually("the agent knows them", workloads);

    mesh.kill_controller();
    eventually("the agent notices", || mesh.metrics(0).sum("culvert_xds_connected", &[]) == 0);
    assert!(reached(&client, &server), "new connections are carried");
    app::ping(&open).expect("open ones go on");
    let known = mesh.place_only(known, 60);
    eventually("a pod of a known account is served", || reached(&known, &server));
    let new = mesh.place_only(new, 61);
    eventually("a new account's pod is enrolled", || mesh.log("agent-a").contains("pod enrolled pod=new "));
    let mut capture = mesh.capture_between_nodes();
    assert!(!reached(&new, &server), "nobody can have signed its certificate");
    capture.finish();
    assert!(capture.segments().iter().all(|(_, to)| to.port() != PORT), "it was tried in the clear");

    let root = std::fs::read(mesh.directory().join("state/root-cert.pem")).expect("a root");
    let back = Instant::now();
    mesh.start_controller();
    eventually("what waited is served", || reached(&new, &server));
    eprintln!("served {:?} after the controller was started", back.elapsed());
    assert_eq!(std::fs::read(mesh.directory().join("state/root-cert.pem")).expect("a root"), root, "the root is kept");
    app::ping(&open).expect("open ones go on");
    mesh.mode("shop", "STRICT");
    let outsider = mesh.pod(PodSpec { name: "outsider", namespace: "shop", node: 0, enrolled: false });
    eventually("changes arrive again", || !reached(&outsider, &server));
    app::ping(&open).expect("open ones go on");
}

#[test]
fn a_controller_that_is_back_sends_only_what_has_changed() {
    let mut mesh = Mesh::prepare(MeshSpec::default());
    mesh.agent_environment("CULVERT_LOG", "info,culvert::discovery=debug");
    mesh.start_all();
    let (client, server) = app::pair(&mut mesh, PORT);
    mesh.kill_controller();
    eventually("the agent notices", || mesh.metrics(0).sum("culvert_xds_connected", &[]) == 0);
    let before = mesh.log("agent-a").len();
    mesh.apply("pod-later", &mesh::manifest(PodSpec { name: "later", namespace: "shop", node: 1, enrolled: true }, 60));
    mesh.start_controller();
    let sent = || -> usize {
        let log = mesh.log("agent-a");
        let counts =
            log[before..].lines().filter_map(|line| line.split(" resources=").nth(1)?.split(' ').next()?.parse::<usize>().ok());
        counts.sum()
    };
    eventually("the change arrives", || sent() > 0);
    assert!(reached(&client, &server));
    assert_eq!(sent(), 1, "one object has changed");
}

#[test]
fn another_root_than_the_agents_is_named_as_the_cause() {
    let mut mesh = Mesh::prepare(MeshSpec::default());
    mesh.start_controller();
    let kept = mesh.directory().join("kept-root.pem");
    std::fs::copy(mesh.directory().join("state/root-cert.pem"), &kept).expect("a copy");
    mesh.trust(&kept);
    (0..2).for_each(|node| mesh.start_agent(node));
    let (client, server) = app::pair(&mut mesh, PORT);
    mesh.kill_controller();
    for file in ["ca-key.pem", "root-cert.pem"] {
        std::fs::remove_file(mesh.directory().join("state").join(file)).expect("the controller kept it there");
    }
    mesh.start_controller();
    let cause = format!("does not verify against `{}`", kept.display());
    eventually("the cause is logged", || {
        mesh.log("agent-a")
            .lines()
            .any(|line| line.contains("WARN") && line.contains(&cause) && line.contains("is it the root of this controller?"))
    });
    assert!(reached(&client, &server), "what is known goes on");
    // The operator's way out: the new root beside the old one.
    let mut both = std::fs::read(&kept).expect("a root");
    both.extend(std::fs::read(mesh.directory().join("state/root-cert.pem")).expect("a root"));
    std::fs::write(&kept, both).expect("a file");
    eventually("both roots are trusted", || mesh.metrics(0).sum("culvert_xds_connected", &[]) == 1);
    let late = mesh.pod(PodSpec { name: "late", namespace: "shop", node: 0, enrolled: true });
    eventually("a certificate of the new root meets one of the old", || reached(&late, &server));
}

/// A step in the start of a mesh.
#[derive(Clone, Copy, Debug)]
enum Step {
    Controller,
    Agents,
    Pods,
}

fn started_in_this_order(steps: [Step; 3]) {
    let mut mesh = Mesh::prepare(MeshSpec::default());
    let mut pods = Vec::new();
    for step in steps {
        match step {
            Step::Controller => mesh.start_controller(),
            Step::Agents => (0..2).for_each(|node| mesh.start_agent(node)),
            Step::Pods => pods = vec![mesh.place(SERVER), mesh.place(CLIENT)],
        }
    }
    let [server, client] = pods.as_slice() else { panic!("two pods were made") };
    app::server(&server.netns, PORT, app::echo);
    eventually("the server's side is enrolled", || mesh.log("agent-b").contains("pod enrolled pod=server "));
    let mut capture = mesh.capture_between_nodes();
    eventually(&format!("{steps:?}: the server is reached"), || {
        app::converse(&client.netns, server.at(false, PORT), "marker-order").is_ok()
            && mesh.log("agent-a").contains("pod enrolled")
    });
    // An agent that starts after its pods cannot have closed them before: what counts is from its start on.
    if !matches!(steps, [.., Step::Agents]) {
        capture.finish();
        assert!(!capture.shows(b"marker-order"), "{steps:?}: a pod got out in plaintext");
    }
    let mut capture = mesh.capture_between_nodes();
    app::converse(&client.netns, server.at(false, PORT), "marker-last").expect("served");
    capture.finish();
    assert!(!capture.shows(b"marker-last"));
}

#[test]
fn first_the_agents_then_the_controller_then_the_pods() {
    started_in_this_order([Step::Agents, Step::Controller, Step::Pods]);
}

#[test]
fn first_the_agents_then_the_pods_then_the_controller() {
    started_in_this_order([Step::Agents, Step::Pods, Step::Controller]);
}

#[test]
fn first_the_controller_then_the_agents_then_the_pods() {
    started_in_this_order([Step::Controller, Step::Agents, Step::Pods]);
}

#[test]
fn first_the_controller_then_the_pods_then_the_agents() {
    started_in_this_order([Step::Controller, Step::Pods, Step::Agents]);
}

#[test]
fn first_the_pods_then_the_agents_then_the_controller() {
    started_in_this_order([Step::Pods, Step::Agents, Step::Controller]);
}

#[test]
fn first_the_pods_then_the_controller_then_the_agents() {
    started_in_this_order([Step::Pods, Step::Controller, Step::Agents]);
}
