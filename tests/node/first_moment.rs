//! Promise: on a kubelet's node a pod is itself, and served, before anybody has told its address; and nobody else is taken for it.

use std::io::{BufRead as _, BufReader, Lines, Write as _};
use std::process::{Child, ChildStdout, Stdio};
use std::time::{Duration, Instant};

use harness::mesh::{Sandbox, manifest};
use harness::{Attached, Mesh, MeshSpec, Pod, PodSpec, app, eventually};

const PORT: u16 = 8080;
/// The number of the first of the tests' own pods.
const FIRST: u16 = 1000;

/// For so long the namespace of a pod that nobody knows is closed while one of the mesh is expected.
const AWAITED: Duration = Duration::from_secs(10);

const EARLY: PodSpec<'_> = PodSpec { name: "early", namespace: "shop", node: 0, enrolled: true };

/// A mesh of kubelets' nodes, whose agents say what they find out.
fn mesh() -> Mesh {
    let mut mesh = Mesh::prepare(MeshSpec { attached: Attached::ToKubelet, ..MeshSpec::default() });
    mesh.agent_environment("CULVERT_LOG", "info,culvert::capture=debug");
    mesh.start_all();
    mesh
}

/// The same with a server of the second node that only `early` may ask.
fn lab() -> (Mesh, Pod) {
    let mut mesh = mesh();
    mesh.mode("shop", "STRICT");
    mesh.apply(
        "only-early",
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: only-early, namespace: shop}\n\
         spec: {selector: {matchLabels: {app: server}}, rules: [{from: [{source: {principals: [cluster.local/ns/shop/sa/early]}}]}]}\n",
    );
    let server = mesh.pod(PodSpec { name: "server", namespace: "shop", node: 1, enrolled: true });
    app::server(&server.netns, PORT, app::echo);
    (mesh, server)
}

/// The object of a pod at the addresses of this number, with a UID.
fn object(spec: PodSpec<'_>, uid: &str, number: u16) -> String {
    manifest(spec, number).replace("metadata: {", &format!("metadata: {{uid: {uid}, "))
}

/// Writes the object of a pod that has no address yet, and waits until its node has heard of it.
fn announce(mesh: &Mesh, spec: PodSpec<'_>, uid: &str) {
    let object = object(spec, uid, FIRST);
    let (without_status, _) = object.split_once("status:").expect("a pod has a status");
    mesh.apply(&format!("pod-{}", spec.name), without_status);
    let name = format!("\"{}\"", spec.name);
    eventually("its node knows of it", || mesh.admin(spec.node, "/workloads").contains(&name));
}

/// Starts a pod as a runtime does: the namespace, its network, the first process.
fn start(mesh: &Mesh, spec: PodSpec<'_>, uid: &str, number: u16) -> (Sandbox, Pod) {
    let pod = mesh.place_unplugged(spec, number);
    mesh.plug(&pod, spec.node, number);
    (mesh.sandbox(&pod, uid), pod)
}

/// A connection that stays.
struct Lasting {
    client: Child,
    answers: Lines<BufReader<ChildStdout>>,
}

impl Lasting {
    fn open(sandbox: &Sandbox, server: &Pod) -> Self {
        let mut command = sandbox.command("bash");
        let script = "exec 3<>/dev/tcp/$0/$1 && read -r client <&3 && echo $client && read -r word && echo $word >&3 && \
                      read -r answer <&3 && echo $answer";
        command.args(["-c", script, &server.v4.to_string(), &PORT.to_string()]);
        let mut client = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("bash is installed");
        let mut answers = BufReader::new(client.stdout.take().expect("a pipe")).lines();
        answers.next().expect("the server says who asks").expect("readable");
        Self { client, answers }
    }

    fn say(&mut self, word: &str) {
        writeln!(self.client.stdin.as_mut().expect("a pipe"), "{word}").expect("the client reads");
        assert_eq!(self.answers.next().expect("an answer").expect("readable"), word);
    }
}

impl Drop for Lasting {
    fn drop(&mut self) {
        // It ends when nothing more is to be said.
        drop(self.client.stdin.take());
        let _status = self.client.wait();
    }
}

fn enrolments(mesh: &Mesh, node: &str, pod: &str) -> usize {
    mesh.log(&format!("agent-{node}")).lines().filter(|line| line.contains(&format!("pod enrolled pod={pod} "))).count()
}

#[test]
fn a_pod_is_served_as_itself_before_its_address_is_told_and_goes_on_when_it_is() {
    let (mesh, server) = lab();
    announce(&mesh, EARLY, "uid-of-early");
    let mut capture = mesh.capture_between_nodes();
    let (sandbox, pod) = start(&mesh, EARLY, "uid-of-early", FIRST);
    eventually("it is served", || sandbox.converses(server.at(false, PORT), "marker-early"));
    assert!(sandbox.converses(server.at(true, PORT), "marker-early"), "over IPv6");
    assert!(!mesh.admin(1, "/workloads").contains("\"early\""), "no other node is told of it yet");
    let mut lasting = Lasting::open(&sandbox, &server);
    mesh.apply("pod-early", &object(EARLY, "uid-of-early", FIRST));
    let told = format!("{}", pod.v4);
    eventually("its address is told", || [0, 1].iter().all(|node| mesh.admin(*node, "/workloads").contains(&told)));
    assert!(sandbox.converses(server.at(false, PORT), "marker-early"));
    assert_eq!(enrolments(&mesh, "a", "early"), 1, "it was enrolled anew");
    lasting.say("marker-early");
    capture.finish();
    assert!(!capture.shows(b"marker-early"));
}

#[test]
fn nobody_passes_for_a_pod_by_its_name_or_on_another_node() {
    let (mesh, server) = lab();
    announce(&mesh, EARLY, "uid-of-early");
    let target = server.at(false, PORT);
    // A former pod of that name; one that the API server has on the other node; and one that nobody knows.
    let elsewhere = PodSpec { name: "elsewhere", node: 1, ..EARLY };
    announce(&mesh, elsewhere, "uid-of-elsewhere");
    let names = [("former", "former-uid-of-early"), ("strayed", "uid-of-elsewhere"), ("stranger", "uid-of-nobody")];
    let others: Vec<_> =
        names.iter().zip(FIRST + 1..).map(|((name, uid), number)| start(&mesh, PodSpec { name, ..EARLY }, uid, number)).collect();
    let (early, _pod) = start(&mesh, EARLY, "uid-of-early", FIRST);
    eventually("the pod itself is served", || early.converses(target, "marker-early"));
    let mut capture = mesh.capture_between_nodes();
    for ((name, _), (sandbox, _pod)) in names.iter().zip(&others) {
        assert!(!sandbox.converses(target, "marker-other"), "{name} is taken for another");
    }
    capture.finish();
    assert!(!capture.shows(b"marker-other"), "one that may be a pod of the mesh has spoken in the clear");
    assert_eq!(enrolments(&mesh, "a", "early"), 1);
    assert_eq!(enrolments(&mesh, "a", "elsewhere") + enrolments(&mesh, "b", "elsewhere"), 0);
}

/// An agent that is told nothing of an address takes it for nobody's after this long.
const NOBODYS: Duration = Duration::from_millis(800);

#[test]
fn a_pod_that_the_controller_is_late_to_know_stays_closed_until_then() {
    let (mut mesh, server) = lab();
    let open = mesh.pod(PodSpec { name: "open", namespace: "free", node: 1, enrolled: true });
    app::server(&open.netns, PORT, app::echo);
    let mut capture = mesh.capture_between_nodes();
    let (sandbox, _pod) = start(&mesh, EARLY, "uid-of-early", FIRST);
    let begun = Instant::now();
    while begun.elapsed() < 4 * NOBODYS {
        assert!(!sandbox.converses(open.at(false, PORT), "marker-late"), "it is let out after {:?}", begun.elapsed());
    }
    mesh.apply("pod-early", &object(EARLY, "uid-of-early", FIRST));
    eventually("it is served", || sandbox.converses(server.at(false, PORT), "marker-late"));
    assert!(sandbox.converses(open.at(false, PORT), "marker-late"));
    capture.finish();
    assert!(!capture.shows(b"marker-late"), "something left in the clear");
}

#[test]
fn a_namespace_that_was_let_out_as_nobodys_is_closed_when_it_turns_out_to_be_a_pods() {
    let mut mesh = mesh();
    let open = mesh.pod(PodSpec { name: "open", namespace: "free", node: 1, enrolled: true });
    app::server(&open.netns, PORT, app::echo);
    let said = |mesh: &Mesh, words: &str| mesh.log("agent-a").lines().filter(|line| line.contains(words)).count();
    let before = said(&mesh, "is none of the mesh's");
    let pod = mesh.place_unplugged(EARLY, FIRST);
    mesh.plug(&pod, EARLY.node, FIRST);
    eventually("it is taken for nobody's", || said(&mesh, "is none of the mesh's") > before);
    let sandbox = mesh.sandbox(&pod, "uid-of-early");
    eventually("it is known for a pod's", || said(&mesh, "was taken for nobody's, and is a pod's") > 0);
    assert!(!sandbox.converses(open.at(false, PORT), "marker-late"), "it is still let out");
    mesh.apply("pod-early", &object(EARLY, "uid-of-early", FIRST));
    eventually("it is served", || sandbox.converses(open.at(false, PORT), "marker-late"));
}

#[test]
fn a_pod_that_is_made_anew_under_its_name_has_its_own_identity() {
    let (mesh, server) = lab();
    let target = server.at(false, PORT);
    announce(&mesh, EARLY, "first-uid");
    let (sandbox, pod) = start(&mesh, EARLY, "first-uid", FIRST);
    eventually("the first is served", || sandbox.converses(target, "first"));
    drop((sandbox, pod));
    mesh.delete("pod-early");
    eventually("its node has heard of its end", || !mesh.admin(0, "/workloads").contains("\"early\""));
    let object = object(EARLY, "second-uid", FIRST).replace("serviceAccountName: early", "serviceAccountName: other");
    let (without_status, _) = object.split_once("status:").expect("a pod has a status");
    mesh.apply("pod-early", without_status);
    eventually("its node knows of it", || mesh.admin(0, "/workloads").contains("\"early\""));
    let (sandbox, _pod) = start(&mesh, EARLY, "second-uid", FIRST);
    let denied = |log: &str| log.lines().any(|line| line.contains("policy_denied") && line.contains("/ns/shop/sa/other"));
    eventually("the second is denied as itself", || {
        assert!(!sandbox.converses(target, "second"), "the second has the identity of the first");
        denied(&mesh.log("agent-b"))
    });
}

#[test]
fn a_sandbox_that_is_made_anew_at_an_address_that_was_anothers_is_not_taken_for_that_one() {
    let (mut mesh, server) = lab();
    let open = mesh.pod(PodSpec { name: "open", namespace: "free", node: 1, enrolled: true });
    app::server(&open.netns, PORT, app::echo);
    let other = PodSpec { name: "other", ..EARLY };
    mesh.apply("pod-early", &object(EARLY, "uid-of-early", FIRST));
    mesh.apply("pod-other", &object(other, "uid-of-other", FIRST + 1));
    eventually("their node knows of both", || {
        ["\"early\"", "\"other\""].iter().all(|name| mesh.admin(0, "/workloads").contains(name))
    });
    // The node has started again, and its network has given addresses anew; of that the API server has not heard.
    let (sandbox, _pod) = start(&mesh, EARLY, "uid-of-early", FIRST + 1);
    let found = |mesh: &Mesh| mesh.log("agent-a").contains("the pod of a network namespace");
    eventually("its node knows which pod it is", || found(&mesh));
    let mut capture = mesh.capture_between_nodes();
    assert!(!sandbox.converses(open.at(false, PORT), "marker-anew"), "it is taken for another");
    // An agent that finds the sandbox there takes it for that no more than one that saw it appear.
    mesh.kill_agent(0);
    mesh.start_agent(0);
    eventually("its node knows so again", || found(&mesh));
    assert!(!sandbox.converses(open.at(false, PORT), "marker-anew"), "it is taken for another after a restart");
    assert_eq!(enrolments(&mesh, "a", "other"), 0, "it was taken for another when the agent started");
    capture.finish();
    assert!(!capture.shows(b"marker-anew"), "it has spoken in the clear");
    mesh.delete("pod-other");
    mesh.apply("pod-early", &object(EARLY, "uid-of-early", FIRST + 1));
    eventually("it is served as itself", || sandbox.converses(server.at(false, PORT), "marker-anew"));
    assert!(!mesh.log("agent-b").contains("/ns/shop/sa/other"), "it has had another's identity");
}

#[test]
fn a_pod_outside_of_the_mesh_waits_for_nobody_to_tell_its_address_and_is_none_of_it() {
    let (mut mesh, strict) = lab();
    let open = mesh.pod(PodSpec { name: "open", namespace: "free", node: 1, enrolled: true });
    app::server(&open.netns, PORT, app::echo);
    let outsider = PodSpec { name: "outsider", enrolled: false, ..EARLY };
    announce(&mesh, outsider, "uid-of-outsider");
    // One of the mesh that is awaited is no reason to wait for longer.
    announce(&mesh, EARLY, "uid-of-early");
    let (sandbox, _pod) = start(&mesh, outsider, "uid-of-outsider", FIRST);
    let begun = Instant::now();
    eventually("it is served in the clear", || sandbox.converses(open.at(false, PORT), "marker-outsider"));
    assert!(begun.elapsed() < AWAITED, "after {:?}", begun.elapsed());
    assert!(!sandbox.converses(strict.at(false, PORT), "marker-outsider"), "plaintext is served under STRICT");
    assert_eq!(enrolments(&mesh, "a", "outsider"), 0);
}
