//! Promise: pods come and go, join and leave, without a trace in others or in what comes after them.

use std::io::Write as _;
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use harness::kernel::{Holdings, holdings};
use harness::{Mesh, Pod, PodSpec, app, eventually, eventually_equal, eventually_within, mesh};

const PORT: u16 = 8080;
/// The number of the address that is used again.
const SHARED: u16 = 200;

fn pair(mesh: &mut Mesh) -> (Pod, Pod) {
    // Who gets through has proved who it is.
    mesh.mode("shop", "STRICT");
    app::pair(mesh, PORT)
}

/// A connection to the echo server.
fn open(client: &Pod, server: &Pod) -> TcpStream {
    app::open(&client.netns, server.at(false, PORT)).expect("a connection")
}

fn ping(stream: &TcpStream) {
    app::ping(stream).expect("an open connection");
}

/// Pings on a thread until it is told to stop; gives how often.
struct Steady {
    stop: Arc<AtomicBool>,
    pings: Arc<AtomicUsize>,
    thread: std::thread::JoinHandle<()>,
}

impl Steady {
    fn start(stream: TcpStream) -> Self {
        let (stop, pings) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let (stopped, counted) = (Arc::clone(&stop), Arc::clone(&pings));
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                ping(&stream);
                counted.fetch_add(1, Ordering::Relaxed);
            }
        });
        Self { stop, pings, thread }
    }

    fn stop(self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the connection was open all the time");
        self.pings.load(Ordering::Relaxed)
    }
}

/// One round: a client and a server come, talk with those that stay, keep a connection open, and go.
fn round(mesh: &mut Mesh, number: usize, (client, server): (&Pod, &Pod)) {
    let names = [format!("guest-{number}"), format!("host-{number}")];
    let [guest, host] = [(&names[0], 0), (&names[1], 1)].map(|(name, node)| {
        let place = SHARED + node as u16;
        mesh.place_at(PodSpec { name, namespace: "shop", node, enrolled: true }, place)
    });
    app::server(&host.netns, PORT, app::echo);
    eventually("the guest reaches who stays", || app::converse(&guest.netns, server.at(false, PORT), "hello").is_ok());
    eventually("who stays reaches the host", || app::converse(&client.netns, host.at(false, PORT), "hello").is_ok());
    eventually("the guest reaches the host", || app::converse(&guest.netns, host.at(false, PORT), "hello").is_ok());
    eventually("the host reaches who stays on its node, in the kernel", || {
        let before = mesh.outcome(1, "admitted_same_node");
        app::converse(&host.netns, server.at(false, PORT), "hello").is_ok() && mesh.outcome(1, "admitted_same_node") > before
    });
    // They go with connections open.
    let _left = [open(&guest, server), open(client, &host), open(&host, server)];
    names.iter().for_each(|name| mesh.delete(&format!("pod-{name}")));
}

fn settle(mesh: &Mesh, wanted: &[Holdings; 2]) {
    let now = || [holdings(mesh, 0), holdings(mesh, 1)];
    let pods = |held: &[Holdings; 2]| held.clone().map(|held| (held.entries, held.links));
    eventually_equal("what the pods had is gone from the kernel", &pods(wanted), || pods(&now()));
    // The end of a tunnel whose far end vanished with its pod's link is found by keep-alive probes, in 30 s.
    eventually_within(Duration::from_secs(60), "the descriptors are as before", || {
        now().iter().zip(wanted).all(|(now, wanted)| now.descriptors <= wanted.descriptors + 8)
    });
}

#[test]
fn pods_that_come_and_go_leave_nothing_behind_and_break_nobody_elses_connection() {
    let mut mesh = Mesh::start();
    let (client, server) = pair(&mut mesh);
    let idle = open(&client, &server);
    let steady = Steady::start(open(&client, &server));
    let before = [holdings(&mesh, 0), holdings(&mesh, 1)];
    let mut memory = [Vec::new(), Vec::new()];
    for number in 0..32 {
        round(&mut mesh, number, (&client, &server));
        for (node, memory) in memory.iter_mut().enumerate() {
            memory.push(mesh.agent_memory(node));
        }
    }
    settle(&mesh, &before);
    for node in [0, 1] {
        // An agent gives memory back now and then, and takes it again: what piles up shows in the least that it ever has.
        let (early, late) = memory[node].split_at(8);
        let (early, late) = (early.iter().max(), late[16..].iter().min());
        assert!(late < early.map(|most| most + (4 << 20)).as_ref(), "node {node} holds {memory:?} bytes");
        let held = mesh.metrics(node).count("culvert_certificate_expiry_timestamp_seconds");
        assert_eq!(held, 1, "certificates of pods that are gone");
    }
    assert!(steady.stop() > 100);
    ping(&idle);
}

#[test]
fn an_address_that_is_used_again_has_nothing_of_its_former_pod() {
    let mut mesh = Mesh::start();
    let (client, server) = pair(&mut mesh);
    let allowed = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: rule, namespace: shop}\n\
                   spec: {selector: {matchLabels: {app: server}}, rules: [{from: [{source: {notPrincipals: \
                   [\"cluster.local/ns/shop/sa/bad*\"]}}]}]}\n";
    let closed = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: closed, namespace: shop}\n\
                  spec: {selector: {matchLabels: {app: bad-0}}, action: DENY, rules: [{}]}\n";
    mesh.apply("rule", allowed);
    mesh.apply("closed", closed);
    for number in 0..6 {
        // The same node or the other, by turns; the object goes before the namespace, or after it.
        let (node, good) = (number / 2 % 2, number % 2 == 1);
        let name = format!("{}-{}", if good { "good" } else { "bad" }, number / 2);
        let pod = mesh.place_at(PodSpec { name: &name, namespace: "shop", node, enrolled: true }, SHARED);
        app::server(&pod.netns, PORT, app::echo);
        let out = || app::converse(&pod.netns, server.at(false, PORT), "hello").is_ok();
        let back = || app::converse(&client.netns, pod.at(false, PORT), "hello").is_ok();
        let agent = ["agent-a", "agent-b"][node];
        eventually("it is enrolled", || mesh.log(agent).contains(&format!("pod enrolled pod={name} ")));
        if good {
            eventually(&format!("{name} is served"), out);
        } else {
            let denied = format!("ns/shop/sa/{name}");
            eventually(&format!("{name} is denied"), || {
                assert!(!out(), "{name} passed for another");
                mesh.log("agent-b").lines().any(|line| line.contains("policy_denied") && line.contains(&denied))
            });
        }
        if name == "bad-0" {
            assert!(!back(), "what is for {name} is not in force");
        } else {
            eventually(&format!("{name} is reached"), back);
            let peer = format!("dst.identity=spiffe://cluster.local/ns/shop/sa/{name}");
            eventually("under its own identity", || mesh.log("agent-a").contains(&peer));
        }
        if number % 3 == 0 {
            drop(pod);
            mesh.delete(&format!("pod-{name}"));
        } else {
            mesh.delete(&format!("pod-{name}"));
        }
    }
}

#[test]
fn pods_join_and_leave_by_label_and_their_open_connections_go_on() {
    let mut mesh = Mesh::start();
    let (client, server) = pair(&mut mesh);
    mesh.mode("shop", "PERMISSIVE");
    let rules = |pod: &Pod| {
        let shown = std::process::Command::new("ip").args(["-n", pod.netns.name(), "rule"]).output().expect("iproute2");
        String::from_utf8_lossy(&shown.stdout).contains("lookup 15008")
    };
    let label = |name, number, node, enrolled| {
        mesh.apply(&format!("pod-{name}"), &mesh::manifest(PodSpec { name, namespace: "shop", node, enrolled }, number));
    };
    let in_sight = |marker: &'static str| {
        let mut capture = mesh.capture_between_nodes();
        let answer = app::converse(&client.netns, server.at(false, PORT), marker);
        capture.finish();
        answer.is_ok().then(|| capture.shows(marker.as_bytes()))
    };
    let mut held = vec![open(&client, &server)];
    for _ in 0..3 {
        for (name, number, node, pod) in [("client", 2, 0, &client), ("server", 1, 1, &server)] {
            label(name, number, node, false);
            eventually(&format!("{name} has left"), || in_sight("marker-plain") == Some(true));
            held.push(open(&client, &server));
            held.iter().for_each(ping);
            label(name, number, node, true);
            eventually(&format!("{name} is back"), || in_sight("marker-secret") == Some(false));
            held.push(open(&client, &server));
            held.iter().for_each(ping);
            assert!(rules(pod));
        }
    }
    drop(held);
    label("client", 2, 0, false);
    eventually("nothing is left in the pod that has left", || !rules(&client));
}

#[test]
fn a_process_that_outlives_its_pod_does_not_get_out() {
    let mut mesh = Mesh::start();
    let (client, server) = pair(&mut mesh);
    mesh.mode("shop", "PERMISSIVE");
    let url = format!("http://{}/", server.at(false, PORT));
    let Pod { netns, .. } = &client;
    // A program of its own, whose namespace can be looked up by its process.
    let mut left = netns.command("sh");
    left.args(["-c", "read go; for i in 1 2 3 4 5 6 7 8; do curl -sm1 -d marker-left \"$0\"; sleep 0.1; done", &url]);
    let mut left = left.stdin(std::process::Stdio::piped()).spawn().expect("a shell");
    let carried = open(&client, &server);
    let mut capture = mesh.capture_between_nodes();
    mesh.unmount(&client);
    eventually("the pod is released", || mesh.log("agent-a").contains("pod released pod=client "));
    eventually("its open connection is ended", || mesh.log("agent-a").contains("reason=\"pod_gone\""));
    assert!(app::breaks(&carried, Duration::from_secs(5)), "by a reset");
    left.stdin.take().expect("a pipe").write_all(b"\n").expect("the shell reads");
    left.wait().expect("a child of ours");
    capture.finish();
    assert!(!capture.shows(b"marker-left"), "a pod's process got out in plaintext");
}
