//! Promise: of the modes of mesh, namespace, workload and port the narrowest that is set wins, for those who tunnel and for those
//! who do not.
//!
//! Every combination of modes at the four scopes is there at once or in turn: the mesh's mode changes, one namespace has each mode,
//! one workload in it has each mode, and one of its ports has each.

use std::collections::HashSet;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};

use harness::kernel::Rulings;
use harness::{Capture, Mesh, Pod, PodSpec, app, eventually};
use serde_json::Value;

/// As users write it: what stands in the manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Written {
    Unset,
    Permissive,
    Strict,
    Disable,
}

use Written::{Disable, Permissive, Strict, Unset};

const WRITTEN: [Written; 4] = [Unset, Permissive, Strict, Disable];
/// The port of tunnels.
const TUNNELS: u16 = 15008;
/// The port whose own mode is the first, and so on.
const FIRST_PORT: u16 = 8080;

/// What becomes of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Encrypted,
    Plaintext,
    Refused,
}

struct Server {
    pod: Pod,
    name: String,
    namespace: Written,
    workload: Written,
}

/// One connection to be tried: from whom, to which port, with everything that bears on its mode.
struct Trial<'a> {
    client: &'a Pod,
    enrolled: bool,
    server: &'a Server,
    mesh: Written,
    port: Written,
    v6: bool,
}

impl Written {
    fn word(self) -> &'static str {
        match self {
            Unset => "UNSET",
            Permissive => "PERMISSIVE",
            Strict => "STRICT",
            Disable => "DISABLE",
        }
    }
}

impl Trial<'_> {
    fn mode(&self) -> Written {
        self.server.mode(self.port, self.mesh)
    }

    fn expected(&self) -> Fate {
        match (self.mode(), self.enrolled) {
            (Disable, _) | (Permissive | Unset, false) => Fate::Plaintext,
            (Permissive | Strict | Unset, true) => Fate::Encrypted,
            (Strict, false) => Fate::Refused,
        }
    }

    fn name(&self) -> String {
        let words = [self.mesh, self.server.namespace, self.server.workload, self.port].map(Written::word);
        format!("mark-{}-{}-v6:{}", words.join("-"), if self.enrolled { "member" } else { "plain" }, self.v6)
    }

    fn run(&self, marker: &str) -> io::Result<app::Seen> {
        app::converse(&self.client.netns, self.server.at(self.port, self.v6), marker)
    }
}

impl Server {
    /// The rule in its plainest form, with nothing of the agent's: the first word that is not UNSET, from the narrowest on.
    fn mode(&self, port: Written, of_mesh: Written) -> Written {
        let scopes = [port, self.workload, self.namespace, of_mesh];
        scopes.into_iter().find(|written| *written != Unset).unwrap_or(Permissive)
    }

    fn at(&self, port: Written, v6: bool) -> SocketAddr {
        let place = WRITTEN.iter().position(|written| *written == port).expect("one of them");
        self.pod.at(v6, FIRST_PORT + place as u16)
    }
}

fn peer_authentication(name: &str, namespace: &str, spec: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: {name}, namespace: {namespace}}}\n\
         spec: {{{spec}}}\n---\n"
    )
}

/// A namespace for each mode, in each a server for each mode, and in each a port for each mode.
fn servers(mesh: &mut Mesh) -> Vec<Server> {
    let mut all = Vec::new();
    for of_namespace in WRITTEN {
        let namespace = of_namespace.word().to_lowercase();
        let mut policies = peer_authentication("default", &namespace, &format!("mtls: {{mode: {}}}", of_namespace.word()));
        for of_workload in WRITTEN {
            let name = format!("{namespace}-{}", of_workload.word().to_lowercase());
            let port = |place: usize, mode: Written| format!("{}: {{mode: {}}}", usize::from(FIRST_PORT) + place, mode.word());
            let ports: Vec<_> = WRITTEN.iter().enumerate().map(|(place, mode)| port(place, *mode)).collect();
            let spec = format!(
                "selector: {{matchLabels: {{app: {name}}}}}, mtls: {{mode: {}}}, portLevelMtls: {{{}}}",
                of_workload.word(),
                ports.join(", ")
            );
            policies += &peer_authentication(&name, &namespace, &spec);
            let pod = mesh.pod(PodSpec { name: &name, namespace: &namespace, node: 1, enrolled: true });
            (0..4).for_each(|place| app::server(&pod.netns, FIRST_PORT + place, app::echo));
            all.push(Server { pod, name, namespace: of_namespace, workload: of_workload });
        }
        mesh.apply(&format!("modes-{namespace}"), &policies);
    }
    all
}

/// Waits until both agents know the modes that all servers have now.
fn await_modes(mesh: &Mesh, servers: &[Server], of_mesh: Written) {
    for node in 0..2 {
        eventually(&format!("node {node} knows the mesh's mode {}", of_mesh.word()), || {
            let known = mesh.view(node, "/workloads");
            let mode = |server: &Server| {
                let find = |workload: &&Value| workload["name"] == server.name.as_str();
                known.as_array().and_then(|all| all.iter().find(find)).map(|workload| workload["mode"].clone())
            };
            servers.iter().all(|server| mode(server).is_some_and(|mode| mode == server.mode(Unset, of_mesh).word()))
        });
    }
    // What the agents know is in the kernel's tables within moments; from then on nothing may go another way even once.
    eventually(&format!("the kernel knows the mesh's mode {}", of_mesh.word()), || {
        let (dialled, plaintext) = (Rulings::read(mesh, 0, "DESTINATIONS"), Rulings::read(mesh, 1, "ADMISSIONS"));
        let ports = servers.iter().flat_map(|server| WRITTEN.map(|port| (server, port)));
        let mut places =
            ports.flat_map(|(server, port)| [false, true].map(|v6| (server.at(port, v6), server.mode(port, of_mesh))));
        places.all(|(place, mode)| {
            let (captured, admitted) = (u32::from(mode != Disable), u32::from(mode != Strict));
            dialled.of(place) == Some(captured) && plaintext.of(place) == Some(admitted)
        })
    });
}

/// What was on the wire in one round.
struct Wire {
    words: std::collections::BTreeSet<String>,
    /// From which address to where.
    ways: HashSet<(IpAddr, SocketAddr)>,
}

impl Wire {
    fn of(capture: &Capture) -> Self {
        let ways = capture.segments().into_iter().map(|(from, to)| (from.ip(), to)).collect();
        Self { words: capture.words("mark-", '.'), ways }
    }

    /// What became of a connection. Nobody is in between who could refuse one but the kernel, which does so at once.
    fn fate(&self, trial: &Trial<'_>, marker: &str, answer: &io::Result<app::Seen>) -> Result<Fate, String> {
        let (from, to) = (trial.client.at(trial.v6, 0).ip(), trial.server.at(trial.port, trial.v6));
        let (direct, tunnel) = (self.ways.contains(&(from, to)), self.ways.contains(&(from, SocketAddr::new(to.ip(), TUNNELS))));
        match (answer, self.words.contains(marker)) {
            (Ok(_), true) => Ok(Fate::Plaintext),
            (Ok(_), false) if tunnel && !direct => Ok(Fate::Encrypted),
            (Err(error), false) if error.kind() == ErrorKind::ConnectionRefused => Ok(Fate::Refused),
            (Ok(_), false) => Err(format!("answered out of sight, by tunnel: {tunnel}, beside it: {direct}")),
            (Err(error), in_sight) => Err(format!("{error}, in sight: {in_sight}")),
        }
    }
}

#[test]
fn every_combination_of_modes_is_ruled_by_the_narrowest_that_is_set() {
    let mut mesh = Mesh::start();
    let servers = servers(&mut mesh);
    let member = mesh.pod(PodSpec { name: "member", namespace: "clients", node: 0, enrolled: true });
    let plain = mesh.pod(PodSpec { name: "plain", namespace: "clients", node: 0, enrolled: false });
    let mut wrong = Vec::new();
    for of_mesh in WRITTEN {
        mesh.mode("istio-system", of_mesh.word());
        await_modes(&mesh, &servers, of_mesh);
        let mut trials: Vec<_> = servers
            .iter()
            .flat_map(|server| WRITTEN.map(|port| (server, port)))
            .flat_map(|(server, port)| [(server, port, &member, true), (server, port, &plain, false)])
            .enumerate()
            .map(|(number, (server, port, client, enrolled))| {
                // Every other pair over IPv6, and in the next round of the mesh's mode the others.
                let v6 = (number / 2 + of_mesh as usize).is_multiple_of(2);
                Trial { client, enrolled, server, mesh: of_mesh, port, v6 }
            })
            .collect();
        // On a busy machine a connection may fail for want of time, and gets a second look; plaintext gets none.
        for round in 0..3 {
            let mut capture = mesh.capture_between_nodes();
            let marker = |trial: &Trial<'_>| format!("{}-{round}.", trial.name());
            let answers: Vec<_> = trials.iter().map(|trial| trial.run(&marker(trial))).collect();
            capture.finish();
            let wire = Wire::of(&capture);
            let mut answers = answers.into_iter();
            wrong.clear();
            trials.retain(|trial| {
                let answer = answers.next().expect("one for each trial");
                let found = wire.fate(trial, &marker(trial), &answer);
                let differs = found.as_ref() != Ok(&trial.expected());
                let leaked = trial.expected() != Fate::Plaintext && wire.words.contains(&marker(trial));
                assert!(!leaked, "{}: {:?} expected, in plaintext on the wire", marker(trial), trial.expected());
                if differs {
                    wrong.push(format!("{}: {:?} expected, {found:?} found", trial.name(), trial.expected()));
                }
                differs
            });
            if trials.is_empty() {
                break;
            }
        }
        assert!(wrong.is_empty(), "{} of 128 are wrong:\n{}", wrong.len(), wrong.join("\n"));
    }
}

#[test]
fn of_two_policies_of_one_scope_the_oldest_counts_and_the_other_is_reported() {
    let mut mesh = Mesh::start();
    let server = mesh.pod(PodSpec { name: "server", namespace: "shop", node: 1, enrolled: true });
    app::server(&server.netns, FIRST_PORT, app::echo);
    let plain = mesh.pod(PodSpec { name: "plain", namespace: "shop", node: 0, enrolled: false });
    let takes_plaintext = || app::converse(&plain.netns, server.at(false, FIRST_PORT), "hello").is_ok();
    eventually("PERMISSIVE is the default", takes_plaintext);
    for (scope, selector) in [("namespace", ""), ("workload", "selector: {matchLabels: {app: server}}, ")] {
        let policy = |name: &str, year: u16, mode: &str| {
            format!(
                "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
                 metadata: {{name: {scope}-{name}, namespace: shop, creationTimestamp: \"{year}-01-01T00:00:00Z\"}}\n\
                 spec: {{{selector}mtls: {{mode: {mode}}}}}\n---\n"
            )
        };
        mesh.apply("pair", &(policy("a", 2026, "PERMISSIVE") + &policy("b", 2020, "STRICT")));
        eventually("the older STRICT holds", || !takes_plaintext());
        let report = format!("shop/{scope}-a has no effect: shop/{scope}-b is older");
        eventually("the younger one is reported", || mesh.log("controller").contains(&report));
        mesh.apply("pair", &(policy("a", 2010, "PERMISSIVE") + &policy("b", 2020, "STRICT")));
        eventually("the order turned, the older PERMISSIVE holds", takes_plaintext);
        mesh.delete("pair");
    }
}
