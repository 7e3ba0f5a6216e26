//! Promise: of the modes of mesh, namespace, workload and port the narrowest that is set wins, for those who tunnel and for those
//! who do not.
//!
//! Every combination of modes at the four scopes is there at once or in turn: the mesh's mode changes, one namespace has each mode,
//! one workload in it has each mode, and one of its ports has each.

use harness::{Mesh, Pod, PodSpec, app, eventually};
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
    /// The rule in its plainest form, with nothing of the agent's: the first word that is not UNSET, from the narrowest on.
    fn mode(&self) -> Written {
        let scopes = [self.port, self.server.workload, self.server.namespace, self.mesh];
        scopes.into_iter().find(|written| *written != Unset).unwrap_or(Permissive)
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

    /// What becomes of the connection now, but for what the wire shows: that is in the capture, by the marker.
    fn run(&self, marker: &str) -> bool {
        let port = FIRST_PORT + WRITTEN.iter().position(|written| *written == self.port).map_or(0, |place| place as u16);
        app::converse(&self.client.netns, self.server.pod.at(self.v6, port), marker).is_ok()
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
            servers.iter().all(|server| {
                let set = [server.workload, server.namespace, of_mesh].into_iter().find(|written| *written != Unset);
                mode(server).is_some_and(|mode| mode == set.unwrap_or(Permissive).word())
            })
        });
    }
}

fn fate(answered: bool, in_sight: bool) -> Option<Fate> {
    match (answered, in_sight) {
        (true, true) => Some(Fate::Plaintext),
        (true, false) => Some(Fate::Encrypted),
        (false, false) => Some(Fate::Refused),
        (false, true) => None,
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
        // The kernel's tables follow what the agents know within moments: what is not as it should be gets a second look.
        for round in 0..3 {
            let mut capture = mesh.capture_between_nodes();
            let marker = |trial: &Trial<'_>| format!("{}-{round}.", trial.name());
            let answers: Vec<_> = trials.iter().map(|trial| trial.run(&marker(trial))).collect();
            capture.finish();
            let in_sight = capture.words("mark-", '.');
            let mut answers = answers.into_iter();
            wrong.clear();
            trials.retain(|trial| {
                let found = fate(answers.next().unwrap_or(false), in_sight.contains(&marker(trial)));
                let differs = found != Some(trial.expected());
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
