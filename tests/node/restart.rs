//! Promise: an agent that starts again is sent only what has changed meanwhile, and acts on nothing that the controller has not confirmed.

use harness::{Mesh, Pod, PodSpec, app, eventually, mesh};
use nix::sys::signal::Signal;

const PORT: u16 = 8080;
/// The node whose agent starts again: the server's, which decides.
const NODE: usize = 1;
/// Pods that are only known.
const OTHERS: u16 = 40;

/// A client on node a and a server on node b, in a mesh with some more pods.
struct Scene {
    mesh: Mesh,
    client: Pod,
    server: Pod,
}

impl Scene {
    fn new() -> Self {
        let mut mesh = Mesh::start();
        (0..OTHERS).for_each(|number| apply_other(&mesh, number, true));
        let (client, server) = app::pair(&mut mesh, PORT);
        let scene = Self { mesh, client, server };
        eventually("all is kept", || (0..OTHERS).all(|number| scene.kept(&other(number))) && scene.kept("//Pod/shop/client"));
        scene
    }

    /// Whether the agent's file names this.
    fn kept(&self, name: &str) -> bool {
        let file = self.mesh.agent_state_dir(NODE).join("b.mesh");
        std::fs::read(file).is_ok_and(|bytes| bytes.windows(name.len()).any(|part| part == name.as_bytes()))
    }

    fn reached(&self) -> bool {
        app::converse(&self.client.netns, self.server.at(false, PORT), "hello").is_ok()
    }

    fn deny(&self) {
        let text = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: deny, namespace: shop}\n\
                    spec: {action: DENY, rules: [{}]}\n";
        self.mesh.apply("deny", text);
    }

    /// Waits until the controller has told the other node's agent of something that was written after all that is tested.
    fn controller_knows(&self) {
        let last = PodSpec { name: "last", namespace: "shop", node: 0, enrolled: false };
        self.mesh.apply("pod-last", &mesh::manifest(last, 200));
        eventually("the controller knows", || self.mesh.admin(0, "/workloads").contains("\"last\""));
    }

    /// What has come from the controller since the agent's start: resources, and names of those that are no more.
    fn sent(&self) -> [u64; 2] {
        let metrics = self.mesh.metrics(NODE);
        ["culvert_xds_resources_received_total", "culvert_xds_resources_removed_total"].map(|name| metrics.sum(name, &[]))
    }

    fn await_sync(&self) {
        eventually("the mesh is known", || self.mesh.admin(NODE, "/config_dump").contains("\"synced\": true"));
    }

    /// Whether the first connection that is decided upon is let through, while the agent comes back. Until then all break.
    fn first_is_let_through(&self) -> bool {
        let mut decided = None;
        eventually("somebody decides", || {
            let reached = self.reached();
            let denied = self.mesh.log("agent-b").contains("policy_denied");
            decided = (reached || denied).then_some(reached);
            decided.is_some()
        });
        decided.expect("just now")
    }

    fn warnings(&self) -> Vec<String> {
        let log = self.mesh.log("agent-b");
        log.lines().filter(|line| line.contains("WARN")).map(str::to_owned).collect()
    }
}

fn other(number: u16) -> String {
    format!("//Pod/elsewhere/other-{number}")
}

fn apply_other(mesh: &Mesh, number: u16, ready: bool) {
    let name = format!("other-{number}");
    let text = mesh::manifest(PodSpec { name: &name, namespace: "elsewhere", node: 0, enrolled: true }, 100 + number);
    let text = if ready { text } else { text.replace("status: \"True\"", "status: \"False\"") };
    mesh.apply(&format!("pod-{name}"), &text);
}

#[test]
fn a_killed_agents_successor_is_sent_only_what_has_changed() {
    let mut scene = Scene::new();
    let [all, _] = scene.sent();
    assert!(all >= u64::from(OTHERS) + 3, "{all} resources at the first start");
    scene.mesh.kill_agent(NODE);
    apply_other(&scene.mesh, 3, false);
    scene.mesh.delete("pod-other-5");
    scene.controller_knows();
    scene.mesh.start_agent(NODE);
    scene.await_sync();
    // The pod that has changed, and the one that was written last.
    assert_eq!(scene.sent(), [2, 1]);
    let workloads = scene.mesh.admin(NODE, "/workloads");
    assert!(workloads.contains("\"other-4\"") && !workloads.contains("\"other-5\""), "what was deleted is gone");
    eventually("the server is reached", || scene.reached());
    assert_eq!(scene.warnings(), Vec::<String>::new());
}

#[test]
fn an_agent_that_was_told_to_stop_leaves_as_much_to_its_successor() {
    let mut scene = Scene::new();
    scene.mesh.signal_agent(NODE, Signal::SIGTERM);
    assert!(scene.mesh.await_agent(NODE));
    scene.mesh.start_agent(NODE);
    scene.await_sync();
    assert_eq!(scene.sent(), [0, 0]);
    eventually("the server is reached", || scene.reached());
}

#[test]
fn a_policy_that_came_while_there_was_no_agent_holds_from_the_first_connection_on() {
    let mut scene = Scene::new();
    assert!(scene.reached());
    scene.mesh.kill_agent(NODE);
    scene.deny();
    scene.controller_knows();
    scene.mesh.start_agent(NODE);
    assert!(!scene.first_is_let_through());
    assert!(!scene.reached());
}

#[test]
fn a_policy_that_went_while_there_was_no_agent_denies_nobody() {
    let mut scene = Scene::new();
    scene.deny();
    eventually("it is in force", || !scene.reached());
    eventually("it is kept", || scene.kept("shop/deny"));
    scene.mesh.kill_agent(NODE);
    scene.mesh.delete("deny");
    scene.controller_knows();
    scene.mesh.start_agent(NODE);
    assert!(scene.first_is_let_through());
    assert!(!scene.mesh.log("agent-b").contains("policy_denied"));
}

#[test]
fn plaintext_that_is_open_goes_on_past_a_restart_unless_what_changed_meanwhile_denies_it() {
    let mut scene = Scene::new();
    let outsider = scene.mesh.pod(PodSpec { name: "outsider", namespace: "shop", node: 0, enrolled: false });
    let open = app::open(&outsider.netns, scene.server.at(false, PORT)).expect("a connection");
    scene.mesh.kill_agent(NODE);
    scene.mesh.start_agent(NODE);
    eventually("the server is reached", || scene.reached());
    app::ping(&open).expect("an answer");

    scene.mesh.kill_agent(NODE);
    scene.mesh.mode("shop", "STRICT");
    scene.controller_knows();
    scene.mesh.start_agent(NODE);
    eventually("it is cut", || app::ping(&open).is_err());
    eventually("the server is reached", || scene.reached());
}

#[test]
fn while_the_controller_has_not_answered_nothing_that_was_kept_is_in_force() {
    let mut scene = Scene::new();
    scene.mesh.kill_agent(NODE);
    scene.deny();
    scene.controller_knows();
    // The agent reaches its controller, and has nothing to show there.
    let token = scene.mesh.state_dir().join("tokens/b");
    let hidden = scene.mesh.directory().join("hidden-token");
    std::fs::rename(&token, &hidden).expect("moved");
    scene.mesh.start_agent(NODE);
    eventually("what was kept is known", || scene.mesh.log("agent-b").contains("the mesh is known from before"));
    (0..20).for_each(|_| assert!(!scene.reached(), "nobody has said that it still holds"));
    assert!(!scene.mesh.admin(NODE, "/workloads").contains("\"other-4\""));
    std::fs::rename(&hidden, &token).expect("moved");
    assert!(!scene.first_is_let_through());
    scene.await_sync();
    // The policy, and the pod that was written last.
    assert_eq!(scene.sent(), [2, 0]);
}

#[test]
fn an_agent_that_starts_before_its_controller_is_sent_no_more_for_that() {
    let mut scene = Scene::new();
    scene.mesh.kill_agent(NODE);
    scene.mesh.kill_controller();
    scene.mesh.start_agent(NODE);
    (0..20).for_each(|_| assert!(!scene.reached(), "nobody has said that it still holds"));
    scene.mesh.start_controller();
    scene.await_sync();
    assert_eq!(scene.sent(), [0, 0]);
    eventually("the server is reached", || scene.reached());
}

#[test]
fn a_broken_file_is_named_once_and_all_is_fetched_again() {
    let mut scene = Scene::new();
    scene.mesh.kill_agent(NODE);
    let file = scene.mesh.agent_state_dir(NODE).join("b.mesh");
    let mut bytes = std::fs::read(&file).expect("kept");
    let name = other(1).into_bytes();
    let place = bytes.windows(name.len()).position(|part| part == name).expect("it is named");
    bytes[place] ^= 1;
    std::fs::write(&file, bytes).expect("written");
    scene.mesh.start_agent(NODE);
    scene.await_sync();
    let [sent, removed] = scene.sent();
    assert!(sent >= u64::from(OTHERS) + 3 && removed == 0, "{sent} resources, {removed} removed");
    let warnings = scene.warnings();
    let [warning] = &warnings[..] else { panic!("{warnings:#?}") };
    for part in [&*file.display().to_string(), "is damaged", "all is fetched again", "b.mesh.aside"] {
        assert!(warning.contains(part), "no {part} in {warning}");
    }
    eventually("the server is reached", || scene.reached());
    eventually("it is kept again", || scene.kept(&other(1)));
    scene.mesh.kill_agent(NODE);
    scene.mesh.start_agent(NODE);
    scene.await_sync();
    assert_eq!(scene.sent(), [0, 0]);
}
