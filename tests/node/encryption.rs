//! Promise: between pods of the mesh nothing travels in plaintext, unless the mode says so; STRICT takes nothing else.

use std::io::ErrorKind;

use harness::{Mesh, Namespace, Pod, PodSpec, app, eventually};

const PORT: u16 = 8080;
const TUNNELS: u16 = 15008;

struct Server {
    pod: Pod,
    enrolled: bool,
    node: usize,
    mode: &'static str,
}

/// What must happen between a client and a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Encrypted,
    /// In plaintext, between pods of the mesh on one node, whose kernel says who is at either end.
    Attested,
    Plaintext,
    Refused,
}

fn expected(client_enrolled: bool, server: &Server, way: &str) -> Outcome {
    match (client_enrolled, server.enrolled, server.mode) {
        (_, false, _) | (_, true, "DISABLE") | (false, true, "PERMISSIVE") => Outcome::Plaintext,
        (true, true, _) if server.node == 0 && way == "kernel" => Outcome::Attested,
        (true, true, _) => Outcome::Encrypted,
        (false, true, _) => Outcome::Refused,
    }
}

fn outcome(mesh: &Mesh, client: &Namespace, server: &Server, v6: bool, marker: &str) -> Result<Outcome, String> {
    let mut capture = if server.node == 0 { mesh.capture_on_node(0) } else { mesh.capture_between_nodes() };
    let before = attested(mesh);
    let answer = app::converse(client, server.pod.at(v6, PORT), marker);
    capture.finish();
    let in_sight = capture.shows(marker.as_bytes());
    let segments = capture.segments();
    let passed = |port| segments.iter().any(|(_, to)| *to == server.pod.at(v6, port));
    match answer {
        Ok(_) if in_sight && attested(mesh) > before => Ok(Outcome::Attested),
        Ok(_) if in_sight => Ok(Outcome::Plaintext),
        Ok(_) if passed(TUNNELS) && !passed(PORT) => Ok(Outcome::Encrypted),
        Ok(_) => Err(format!("out of sight, by tunnel: {}, beside it: {}", passed(TUNNELS), passed(PORT))),
        // By the kernel, at once, and not by nobody's answer.
        Err(error) if !in_sight && error.kind() == ErrorKind::ConnectionRefused => Ok(Outcome::Refused),
        Err(error) => Err(format!("{error}, in sight: {in_sight}")),
    }
}

/// How many connections the first node's kernel has attested.
fn attested(mesh: &Mesh) -> u64 {
    mesh.metrics(0).sum("culvert_capture_outcomes_total", &["outcome=\"admitted_same_node\""])
}

#[test]
fn every_pair_of_pods_is_encrypted_plain_or_refused_as_enrolment_and_mode_say() {
    check_every_pair("tunnel");
}

#[test]
fn on_one_node_the_kernel_may_stand_in_for_encryption_and_nowhere_else() {
    check_every_pair("kernel");
}

fn check_every_pair(way: &str) {
    let mut mesh = Mesh::start_with(&["--same-node", way]);
    for (namespace, mode) in [("permissive", "PERMISSIVE"), ("strict", "STRICT"), ("disable", "DISABLE")] {
        mesh.mode(namespace, mode);
    }
    let mut servers = Vec::new();
    for node in 0..2 {
        for (mode, namespace) in [("PERMISSIVE", "permissive"), ("STRICT", "strict"), ("DISABLE", "disable")] {
            for enrolled in [true, false] {
                let name = format!("{namespace}-{node}-{enrolled}");
                let pod = mesh.pod(PodSpec { name: &name, namespace, node, enrolled });
                app::server(&pod.netns, PORT, app::echo);
                servers.push(Server { pod, enrolled, node, mode });
            }
        }
    }
    let clients = [true, false].map(|enrolled| {
        let name = format!("client-{enrolled}");
        (enrolled, mesh.pod(PodSpec { name: &name, namespace: "clients", node: 0, enrolled }))
    });
    for server in servers.iter().filter(|server| server.enrolled) {
        for v6 in [false, true] {
            eventually("the client's agent knows the servers", || {
                let before = attested(&mesh);
                let answer = app::converse(&clients[0].1.netns, server.pod.at(v6, PORT), "warm");
                let decided = expected(true, server, way) != Outcome::Attested || attested(&mesh) > before;
                decided && answer.is_ok_and(|seen| seen.client.ip() == clients[0].1.at(v6, 0).ip())
            });
        }
    }
    let mut wrong = Vec::new();
    for (client_enrolled, client) in &clients {
        for server in &servers {
            for v6 in [false, true] {
                let marker = format!("marker-{client_enrolled}-{}-{}-{}-{v6}", server.enrolled, server.node, server.mode);
                let wanted = expected(*client_enrolled, server, way);
                let found = outcome(&mesh, &client.netns, server, v6, &marker);
                if found != Ok(wanted) {
                    wrong.push(format!("{marker}: wanted {wanted:?}, found {found:?}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_narrowest_mode_wins() {
    let mut mesh = Mesh::start();
    let server = mesh.pod(PodSpec { name: "server", namespace: "shop", node: 1, enrolled: true });
    let outsider = mesh.pod(PodSpec { name: "outsider", namespace: "shop", node: 0, enrolled: false });
    app::server(&server.netns, PORT, app::echo);
    app::server(&server.netns, PORT + 1, app::echo);
    let takes_plaintext = |port| app::converse(&outsider.netns, server.at(false, port), "hello").is_ok();
    let workload = |mode: &str, port_mode: &str| {
        format!(
            "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: own, namespace: shop}}\n\
             spec: {{selector: {{matchLabels: {{app: server}}}}, mtls: {{mode: {mode}}}, portLevelMtls: {{8081: {{mode: {port_mode}}}}}}}\n"
        )
    };
    eventually("PERMISSIVE is the default", || takes_plaintext(PORT));
    mesh.mode("istio-system", "STRICT");
    eventually("the mesh's STRICT holds", || !takes_plaintext(PORT));
    mesh.mode("shop", "PERMISSIVE");
    eventually("the namespace's PERMISSIVE wins over the mesh", || takes_plaintext(PORT));
    mesh.apply("own", &workload("STRICT", "PERMISSIVE"));
    eventually("the workload's STRICT wins over the namespace", || !takes_plaintext(PORT));
    assert!(takes_plaintext(PORT + 1), "the port's PERMISSIVE wins over the workload");
    mesh.apply("own", &workload("PERMISSIVE", "STRICT"));
    eventually("the port's STRICT wins over the workload", || !takes_plaintext(PORT + 1));
    assert!(takes_plaintext(PORT));
    mesh.apply("own", &workload("UNSET", "UNSET"));
    eventually("UNSET inherits", || takes_plaintext(PORT + 1));
}

#[test]
fn a_manifest_that_cannot_be_read_leaves_the_last_good_state_in_force() {
    let mut mesh = Mesh::start();
    let server = mesh.pod(PodSpec { name: "server", namespace: "shop", node: 1, enrolled: true });
    let outsider = mesh.pod(PodSpec { name: "outsider", namespace: "shop", node: 0, enrolled: false });
    app::server(&server.netns, PORT, app::echo);
    let takes_plaintext = || app::converse(&outsider.netns, server.at(false, PORT), "hello").is_ok();
    eventually("PERMISSIVE holds", takes_plaintext);
    mesh.mode("shop", "STRICT");
    eventually("STRICT holds", || !takes_plaintext());
    mesh.mode("shop", "STRICTLY");
    eventually("the unknown mode is named", || mesh.log("controller").contains("STRICTLY"));
    assert!(!takes_plaintext(), "the last good mode is gone");
    mesh.mode("shop", "PERMISSIVE");
    eventually("a good manifest takes effect again", takes_plaintext);
}
