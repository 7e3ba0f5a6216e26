//! Promise: a pod of the mesh says nothing in the clear from its first moment on, and is served as soon as it is enrolled; pods that only run
//! to their end do.

use std::sync::mpsc::{Sender, channel};

use harness::Cluster;
use harness::cluster::{ENROLLED, IMAGE, PodSpec, TestNamespace, not_run};
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// How many conversations a pod has before it is ready.
const CONVERSATIONS: u32 = 20;
/// How many pods start at once on each node.
const PODS: usize = 4;

/// A pod whose first container talks to a server from its first moment until it has been answered so many times.
fn eager<'a>(namespace: &'a str, name: &'a str, node: &'a str, server: &str, say: &str) -> PodSpec<'a> {
    let mut pod = PodSpec::new(namespace, name, node);
    let talk = format!(
        "echo first; n=0; while [ $n -lt {CONVERSATIONS} ]; do /app connect {server} --say {say} && n=$((n+1)); done 2>/dev/null"
    );
    pod.more = json!({"initContainers": [{"name": "first", "image": IMAGE, "command": ["sh", "-c", talk]}]});
    pod
}

/// Within how many seconds of its first moment a pod is served, when many start on a machine that has little to spare.
const SOON: f64 = 15.0;

/// When something was logged.
fn at(stamp: &str) -> OffsetDateTime {
    OffsetDateTime::parse(stamp, &Rfc3339).unwrap_or_else(|error| panic!("{stamp}: {error}"))
}

/// When a node's agent enrolled a pod, at last.
fn enrolled(cluster: Cluster, node: &str, pod: &str) -> OffsetDateTime {
    let is_enrolment = |line: &&Value| line["message"] == "pod enrolled" && line["pod"] == pod;
    let log = cluster.agent_log(node);
    at(log.iter().rfind(is_enrolment).and_then(|line| line["timestamp"].as_str()).expect("enrolled"))
}

#[test]
fn what_connects_from_its_first_moment_leaks_nothing_and_is_served_soon() {
    let cluster = Cluster;
    let nodes = cluster.nodes();
    let mesh = cluster.namespace("first", &[ENROLLED]);
    let plain = cluster.namespace("first-plain", &[]);
    let servers = [PodSpec::new(mesh.name(), "server0", &nodes[0]), PodSpec::new(mesh.name(), "server1", &nodes[1])];
    let addresses = cluster.pods(&servers);
    let mut captures = [cluster.capture(&nodes[0]), cluster.capture(&nodes[1])];
    let names: Vec<(String, usize)> = (0..2 * PODS).map(|number| (format!("eager{number}"), number % 2)).collect();
    let server = |node: usize| format!("{}:8080", addresses[1 - node]);
    let pods = names.iter().map(|(name, node)| eager(mesh.name(), name, &nodes[*node], &server(*node), "in-the-mesh"));
    let outsider = eager(plain.name(), "outsider", &nodes[0], &server(0), "in-the-clear");
    cluster.pods(&pods.chain([outsider]).collect::<Vec<_>>());
    for capture in &mut captures {
        assert!(capture.shows("in-the-clear"), "the capture does not see what others say");
        assert!(!capture.shows("in-the-mesh"), "a pod of the mesh talked in the clear");
    }
    for (name, node) in &names {
        let log = cluster.kubectl(&["--namespace", mesh.name(), "logs", name, "--container=first", "--timestamps"]);
        let stamp = |line: &str| line.split_once(' ').map(|(stamp, _)| at(stamp));
        let first = log.lines().find_map(stamp).expect("the first moment");
        let served = log.lines().find(|line| line.contains("answer")).and_then(stamp).expect("an answer");
        let enrolled = enrolled(cluster, &nodes[*node], name);
        let after = |then: OffsetDateTime| (then - first).as_seconds_f64();
        eprintln!("{name}: enrolled {:.3} s after its first moment, served after {:.3} s", after(enrolled), after(served));
        assert!(after(served) < SOON, "{name} was served late");
    }
}

/// A pod that asks a server from its first instruction on, until it is answered once, and says how often it was not.
fn prompt<'a>(namespace: &'a str, name: &'a str, node: &'a str, server: &str) -> PodSpec<'a> {
    let mut pod = PodSpec::new(namespace, name, node);
    let ask = format!(
        "echo first; n=0; until /app connect {server} --say in-the-mesh; do n=$((n+1)); done 2>/dev/null; echo failures $n; exec /app serve"
    );
    pod.more = json!({"containers": [{"name": "app", "image": IMAGE, "command": ["sh", "-c", ask]}]});
    pod
}

/// Waits until the API server tells a pod's address, and gives that moment. Says when it has begun to watch.
fn told_address(cluster: Cluster, namespace: &str, name: &str, watching: &Sender<()>) -> OffsetDateTime {
    cluster.wait_for("the pod's address is told", namespace, "pods", |pods| {
        let _once_is_enough = watching.send(());
        pods.iter().any(|pod| pod["metadata"]["name"] == name && pod["status"]["podIP"].is_string())
    });
    OffsetDateTime::now_utc()
}

#[test]
fn a_pod_is_served_under_strict_before_the_api_server_knows_its_address() {
    let cluster = Cluster;
    let nodes = cluster.nodes();
    let mesh = cluster.namespace("prompt", &[ENROLLED]);
    let plain = cluster.namespace("prompt-plain", &[]);
    cluster.mode(mesh.name(), "STRICT");
    let servers = [PodSpec::new(mesh.name(), "server0", &nodes[0]), PodSpec::new(mesh.name(), "server1", &nodes[1])];
    let addresses = cluster.pods(&servers);
    cluster.pods(&[PodSpec::new(plain.name(), "outsider", &nodes[0])]);
    let mut captures = [cluster.capture(&nodes[0]), cluster.capture(&nodes[1])];
    let mut ahead = 0;
    for number in 0..2 * PODS {
        let (name, node) = (format!("prompt{number}"), number % 2);
        let pod = prompt(mesh.name(), &name, &nodes[node], &format!("{}:8080", addresses[1 - node]));
        let (watching, watches) = channel();
        let told = std::thread::scope(|scope| {
            let told = scope.spawn(|| told_address(cluster, mesh.name(), &name, &watching));
            watches.recv().expect("the servers are seen at once");
            cluster.apply(&pod.object());
            told.join().expect("it is told")
        });
        cluster.wait_condition(mesh.name(), &format!("pod/{name}"), "Ready");
        let log = cluster.kubectl(&["--namespace", mesh.name(), "logs", &name, "--timestamps"]);
        let line = |word: &str| log.lines().find(|line| line.contains(word)).and_then(|line| line.split_once(' ')).expect(word);
        let (first, served, (_, failures)) = (at(line("first").0), at(line("answer").0), line("failures"));
        let enrolled = enrolled(cluster, &nodes[node], &name);
        let before = |then: OffsetDateTime| (told - then).as_seconds_f64();
        let [e, f, s] = [enrolled, first, served].map(before);
        eprintln!("{name}: before its address was told, enrolled {e:.3} s, begun {f:.3} s and served {s:.3} s, {failures}");
        assert!(enrolled < told, "{name} was enrolled only when its address was known");
        // One that a machine with little to spare has started late finds its way at once all the same.
        assert!(first < enrolled || failures == "failures 0", "{name} was refused although it was enrolled");
        ahead += usize::from(served < told);
    }
    assert!(ahead > 0, "all were served only when their addresses were known");
    let refused = cluster.converse(plain.name(), "outsider", &format!("{}:8080", addresses[1]), "in-the-clear");
    assert_eq!(refused.expect_err("plaintext is let in").0, "ConnectionRefused");
    for capture in &mut captures {
        assert!(!capture.shows("in-the-mesh"), "a pod of the mesh talked in the clear");
        assert!(capture.flows().iter().any(|flow| flow.tls), "the capture sees nothing");
    }
}

/// A namespace of the mesh that takes nothing else, with a server in it, and one outside; for what runs in each alike.
struct Both {
    nodes: Vec<String>,
    mesh: TestNamespace,
    plain: TestNamespace,
    server: String,
}

impl Both {
    fn new(name: &str) -> Self {
        let cluster = Cluster;
        let nodes = cluster.nodes();
        let mesh = cluster.namespace(name, &[ENROLLED]);
        let plain = cluster.namespace(&format!("{name}-plain"), &[]);
        cluster.mode(name, "STRICT");
        let server = format!("{}:8080", cluster.pods(&[PodSpec::new(name, "server", &nodes[1])])[0]);
        Self { nodes, mesh, plain, server }
    }

    /// Has a job of that name in each, and waits until the one has finished and the other has failed. What makes it is told its
    /// namespace, the server, and for how many seconds to try to reach that.
    fn run_job(&self, name: &str, job: impl Fn(&str, &str, &str) -> Value) {
        let [mesh, plain] = [&self.mesh, &self.plain].map(TestNamespace::name);
        Cluster.apply(&job(mesh, &self.server, "20"));
        Cluster.apply(&job(plain, &self.server, "2"));
        Cluster.wait_condition(mesh, &format!("job/{name}"), "Complete");
        Cluster.wait_condition(plain, &format!("job/{name}"), "Failed");
    }
}

#[test]
fn jobs_of_the_mesh_finish_and_others_are_refused() {
    let both = Both::new("jobs");
    both.run_job("caller", |namespace, server, patience| {
        json!({
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": "caller", "namespace": namespace},
            "spec": {
                "completions": 4,
                "parallelism": 2,
                "backoffLimit": 0,
                "template": {"spec": {
                    "restartPolicy": "Never",
                    "containers": [{"name": "app", "image": IMAGE, "args": ["connect", server, "--retry-for", patience]}],
                }},
            },
        })
    });
    assert_eq!(Cluster.get(both.mesh.name(), "job", "caller")["status"]["succeeded"], 4);
    assert!(Cluster.get(both.plain.name(), "job", "caller")["status"]["succeeded"].is_null());
}

/// A job one of whose containers is a sidecar of the kubelet's own: it starts first, goes on beside the others, and ends with them. It talks
/// to a server from its first moment, for so many seconds at most, and serves then; the job's program talks to it, and to the server.
fn accompanied(namespace: &str, server: &str, patience: &str) -> Value {
    let talk = format!("/app connect {server} --say from-the-sidecar --retry-for {patience}; exec /app serve");
    let work = format!("/app connect 127.0.0.1:8080 && /app connect {server} --retry-for {patience}");
    json!({
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "accompanied", "namespace": namespace},
        "spec": {
            "backoffLimit": 0,
            "template": {"spec": {
                "restartPolicy": "Never",
                "initContainers": [{
                    "name": "sidecar",
                    "image": IMAGE,
                    "command": ["sh", "-c", talk],
                    "restartPolicy": "Always",
                    "startupProbe": {"tcpSocket": {"port": 8080}, "periodSeconds": 1, "failureThreshold": 60},
                }],
                "containers": [{"name": "app", "image": IMAGE, "command": ["sh", "-c", work]}],
            }},
        },
    })
}

#[test]
fn a_job_with_a_sidecar_of_the_kubelets_own_finishes_in_the_mesh_and_is_refused_outside() {
    let both = Both::new("sidecars");
    let mut sidecar = PodSpec::new(both.mesh.name(), "sidecar", &both.nodes[0]);
    sidecar.more = json!({"initContainers": [{"name": "sidecar", "image": IMAGE, "restartPolicy": "Always"}]});
    if !Cluster.keeps(&sidecar.object(), "/spec/initContainers/0/restartPolicy") {
        return not_run("this API server offers no sidecars among the init containers");
    }
    let mut capture = Cluster.capture(&both.nodes[1]);
    both.run_job("accompanied", accompanied);
    assert!(!capture.shows("from-the-sidecar"), "a sidecar of the mesh talked in the clear");
    let log = Cluster.kubectl(&["--namespace", both.mesh.name(), "logs", "job/accompanied", "--container=sidecar"]);
    assert!(log.contains("from-the-sidecar"), "the sidecar was not answered: {log}");
}
