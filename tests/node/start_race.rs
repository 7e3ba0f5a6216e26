//! Promise: over 1,000 pod starts nothing leaves in plaintext that should not, and who tries again for a second is served.

use std::collections::HashMap;
use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use harness::crowd::{ATTEMPT, Attempts, Crowd, Member, Order, PAUSE, delete_objects};
use harness::{Capture, Mesh, MeshSpec, Pod, PodSpec, app, eventually, mesh};

const PORT: u16 = 8080;
const STARTS: usize = 1000;
/// So many start at the same moment.
const WAVE: usize = 10;
/// How long an application goes on trying.
const PATIENCE: Duration = Duration::from_secs(1);
/// The first number of a crowd's pods; the servers are below.
const FIRST: u16 = 1000;
/// In every tenth wave so many pods outside of the mesh start among the others: what must be in sight of the capture.
const OUTSIDERS: usize = 2;

struct Lab {
    mesh: Mesh,
    strict: Pod,
    permissive: Pod,
    /// Its namespace is the reason why plaintext may travel at all.
    watcher: Pod,
}

/// A little longer than agents keep tunnels that carry nothing.
const IDLE: Duration = Duration::from_secs(101);

fn lab(forms: [&str; 2]) -> Lab {
    let agents: [&[&str]; 2] = [&["--tunnel-form", forms[0]], &["--tunnel-form", forms[1]]];
    // Within a node, too, all that members say is to be out of sight.
    let mut mesh = Mesh::start_as(MeshSpec { controller: &["--same-node", "tunnel"], agents, ..MeshSpec::default() });
    mesh.mode("strict", "STRICT");
    mesh.mode("permissive", "PERMISSIVE");
    let [strict, permissive] = ["strict", "permissive"].map(|name| {
        let pod = mesh.pod(PodSpec { name, namespace: name, node: 1, enrolled: true });
        app::server(&pod.netns, PORT, app::echo);
        pod
    });
    let watcher = mesh.pod(PodSpec { name: "watcher", namespace: "crowd", node: 0, enrolled: true });
    for server in [&strict, &permissive] {
        eventually("the servers are served", || app::converse(&watcher.netns, server.at(false, PORT), "warm").is_ok());
    }
    Lab { mesh, strict, permissive, watcher }
}

fn wave(number: usize) -> Vec<Member> {
    let outsiders = if number.is_multiple_of(10) { OUTSIDERS } else { 0 };
    let member = |place: usize| {
        let enrolled = place >= outsiders;
        let kind = if enrolled { "member" } else { "outsider" };
        Member {
            name: format!("{kind}-{number}-{place}"),
            namespace: "crowd",
            // Each address is used again every other wave, by a pod of another name.
            number: FIRST + ((number % 2) * (WAVE + OUTSIDERS) + place) as u16,
            node: place % 2,
            enrolled,
        }
    };
    (0..WAVE + outsiders).map(member).collect()
}

/// What was on the wire in plaintext, to or from a member, with the port of the servers.
fn leaks(capture: &Capture, members: &[Member]) -> Vec<String> {
    let enrolled: HashMap<IpAddr, &Member> = members
        .iter()
        .filter(|member| member.enrolled)
        .flat_map(|member| {
            let (v4, v6) = mesh::addresses(member.number);
            [(v4.into(), member), (v6.into(), member)]
        })
        .collect();
    let segments = capture.segments();
    let plain = segments.iter().filter(|(source, destination)| source.port() == PORT || destination.port() == PORT);
    plain
        .filter_map(|(source, destination)| {
            let member = enrolled.get(&source.ip()).or(enrolled.get(&destination.ip()))?;
            Some(format!("{}: {source} to {destination}", member.name))
        })
        .collect()
}

struct Seen {
    wrong: Vec<String>,
    waits: Vec<Duration>,
}

fn judge(members: &[Member], attempts: &[Vec<Attempts>], seen: &mut Seen) {
    for (member, attempts) in members.iter().zip(attempts) {
        let [strict, permissive] = attempts.as_slice() else { panic!("two targets") };
        // A second is counted in attempts: a machine that is busy elsewhere holds up the clients, too. One without an answer counts in full.
        let served = |attempts: &Attempts| {
            let times = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
            let tried = PAUSE * times(attempts.failures) + ATTEMPT * times(attempts.unanswered);
            attempts.reached.is_some_and(|wait| wait <= 3 * PATIENCE) && tried <= PATIENCE
        };
        if served(strict) != member.enrolled {
            seen.wrong.push(format!("{} at STRICT: {strict:?}", member.name));
        }
        if !served(permissive) {
            seen.wrong.push(format!("{} at PERMISSIVE: {permissive:?}", member.name));
        }
        seen.waits.extend(attempts.iter().filter_map(|attempts| attempts.reached));
    }
}

fn race(lab: &Lab, order: Order) {
    let targets = [lab.strict.at(false, PORT), lab.permissive.at(false, PORT)];
    let mut seen = Seen { wrong: Vec::new(), waits: Vec::new() };
    for number in 0..STARTS / WAVE {
        let members = wave(number);
        let mut capture = lab.mesh.capture_on_node(1);
        let crowd = Crowd::start(&lab.mesh, &members, &targets, order);
        capture.finish();
        judge(&members, &crowd.attempts, &mut seen);
        seen.wrong.extend(leaks(&capture, &members));
        assert!(!capture.shows(b"member-"), "a member's words were in sight:\n{}", seen.wrong.join("\n"));
        let outsiders = members.iter().any(|member| !member.enrolled);
        assert_eq!(capture.shows(b"outsider-"), outsiders, "the capture sees what is in the clear");
        delete_objects(&lab.mesh, &members, order);
        drop(crowd);
        assert!(seen.wrong.len() < 20, "{}", seen.wrong.join("\n"));
    }
    seen.waits.sort();
    let at = |share: usize| seen.waits[(seen.waits.len() - 1) * share / 100];
    eprintln!("served after: median {:?}, 99 of 100 {:?}, all {:?}", at(50), at(99), at(100));
    assert!(seen.wrong.is_empty(), "{}", seen.wrong.join("\n"));
}

#[test]
fn a_thousand_pods_whose_objects_were_there_before_leak_nothing_and_are_served_within_a_second() {
    race(&lab(["auto", "auto"]), Order::ObjectFirst);
}

#[test]
fn a_thousand_pods_whose_namespaces_were_there_first_leak_nothing_and_are_served_while_idle_connections_live() {
    // Over HTTP/2 to the other node, in the single form within the first.
    let mut lab = lab(["auto", "hbone"]);
    let near = lab.mesh.pod(PodSpec { name: "near", namespace: "strict", node: 0, enrolled: true });
    app::server(&near.netns, PORT, app::echo);
    eventually("the near server is served", || app::converse(&lab.watcher.netns, near.at(false, PORT), "warm").is_ok());
    let idle = [&lab.strict, &near].map(|server| app::open(&lab.watcher.netns, server.at(false, PORT)).expect("served before"));
    let since = Instant::now();
    race(&lab, Order::NamespaceFirst);
    std::thread::sleep(IDLE.saturating_sub(since.elapsed()));
    idle.iter().for_each(|stream| app::ping(stream).expect("an idle connection lives"));
}

/// So many servers start, one after the other.
const SERVERS: usize = 60;
const INTRUDER: &str = "intruder";

/// Tries to be answered in plaintext until told to stop, and says whether it ever was.
fn intrude(target: SocketAddr, stop: &AtomicBool) -> bool {
    let answered = || {
        let mut stream = TcpStream::connect_timeout(&target, Duration::from_millis(100))?;
        stream.set_read_timeout(Some(Duration::from_millis(500)))?;
        stream.write_all(INTRUDER.as_bytes())?;
        stream.shutdown(Shutdown::Write)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        io::Result::Ok(answer.ends_with(INTRUDER))
    };
    while !stop.load(Ordering::Relaxed) {
        if answered().unwrap_or(false) {
            return true;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    false
}

#[test]
fn a_server_that_starts_under_strict_takes_no_plaintext_from_its_first_moment() {
    let mut mesh = Mesh::start();
    mesh.mode("strict", "STRICT");
    let member = mesh.pod(PodSpec { name: "member", namespace: "crowd", node: 0, enrolled: true });
    let outsider = mesh.pod(PodSpec { name: "outsider", namespace: "crowd", node: 0, enrolled: false });
    for number in 0..SERVERS {
        let strict = number % 3 > 0;
        let (name, place) = (format!("server-{number}"), FIRST + (number % 4) as u16);
        let spec =
            PodSpec { name: &name, namespace: if strict { "strict" } else { "open" }, node: number / 2 % 2, enrolled: true };
        let pod = mesh.place_unplugged(spec, place);
        app::server(&pod.netns, PORT, app::echo);
        let stop = Arc::new(AtomicBool::new(false));
        let (target, told) = (pod.at(false, PORT), Arc::clone(&stop));
        let intruder = outsider.netns.spawn(move || intrude(target, &told));
        let object_first = number.is_multiple_of(2);
        if object_first {
            mesh.apply(&format!("pod-{name}"), &mesh::manifest(spec, place));
        }
        mesh.plug(&pod, spec.node, place);
        if !object_first {
            mesh.apply(&format!("pod-{name}"), &mesh::manifest(spec, place));
        }
        eventually("a member is served", || app::converse(&member.netns, target, "member").is_ok());
        if strict {
            stop.store(true, Ordering::Relaxed);
        }
        assert_eq!(intruder.join().expect("no panic"), !strict, "{name} answers in plaintext");
        mesh.delete(&format!("pod-{name}"));
    }
}

#[test]
fn a_pod_whose_address_is_told_late_leaks_nothing() {
    let mut mesh = Mesh::start();
    let server = mesh.pod(PodSpec { name: "server", namespace: "shop", node: 1, enrolled: true });
    app::server(&server.netns, PORT, app::echo);
    let [late, stranger] =
        [("late", true), ("stranger", false)].map(|(name, enrolled)| PodSpec { name, namespace: "shop", node: 0, enrolled });
    let object = mesh::manifest(late, FIRST);
    let (without_status, _) = object.split_once("status:").expect("a pod has a status");
    mesh.apply("pod-late", without_status);
    eventually("its node knows of it", || mesh.admin(0, "/workloads").contains("\"late\""));
    let mut capture = mesh.capture_between_nodes();
    let late = mesh.place_only(late, FIRST);
    // A kubelet takes a second or two to tell a pod's address.
    let told = Instant::now() + Duration::from_millis(1500);
    while Instant::now() < told {
        let refused = app::converse(&late.netns, server.at(false, PORT), "marker-late").expect_err("it may be the pod");
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    }
    mesh.apply("pod-late", &object);
    eventually("it is served", || app::converse(&late.netns, server.at(false, PORT), "marker-late").is_ok());
    capture.finish();
    assert!(!capture.shows(b"marker-late"));
    // Nobody is awaited any more: who has no object at all waits no longer than before.
    let mut capture = mesh.capture_between_nodes();
    let begun = Instant::now();
    let stranger = mesh.place_only(stranger, FIRST + 1);
    eventually("a stranger is served", || app::converse(&stranger.netns, server.at(false, PORT), "marker-stranger").is_ok());
    assert!(begun.elapsed() < 5 * PATIENCE, "after {:?}", begun.elapsed());
    capture.finish();
    assert!(capture.shows(b"marker-stranger"));
}
