//! A Kubernetes cluster that is up, as a test sees it: objects that are applied and waited for, pods that connect, what passes their nodes'
//! links, and parts of it that are stopped. Which cluster: `KUBECONFIG`, as `cargo xtask test cluster` sets it.

mod account;
mod capture;
mod culvert;
mod disturb;
mod offer;
mod pod;
mod traffic;
mod trouble;
mod watch;
mod way_in;

use std::io::Write as _;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

pub use account::user;
pub use capture::{Flow, NodeCapture};
pub use culvert::{CULVERT, ENROLLED, StrictMesh, TUNNEL};
pub use disturb::Stopped;
pub use offer::not_run;
pub use pod::{IMAGE, PodSpec, Refusal, Seen, seen};
pub use traffic::Second;

/// How long anything may take: pods are scheduled, started and made ready beside others.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// The cluster under test.
#[derive(Clone, Copy, Debug)]
pub struct Cluster;

/// A namespace of one test's, with all that is in it; gone when dropped.
#[derive(Debug)]
pub struct TestNamespace {
    name: String,
    made: Instant,
}

impl TestNamespace {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl Drop for TestNamespace {
    fn drop(&mut self) {
        if std::thread::panicking() {
            trouble::tell(&self.name, self.made.elapsed());
        }
        let _gone_already = kubectl().args(["delete", "namespace", &self.name, "--wait=false"]).output();
    }
}

impl Cluster {
    /// Runs kubectl, and gives what it printed.
    ///
    /// # Panics
    /// When it fails.
    pub fn kubectl(&self, words: &[&str]) -> String {
        match self.try_kubectl(words) {
            Ok(output) => output,
            Err(error) => panic!("kubectl {}: {error}", words.join(" ")),
        }
    }

    /// Runs kubectl.
    ///
    /// # Errors
    /// What it says of its failure.
    ///
    /// # Panics
    /// When there is no kubectl.
    pub fn try_kubectl(&self, words: &[&str]) -> Result<String, String> {
        let mut command = kubectl();
        run(command.args(words), "")
    }

    /// Makes objects, or makes them as they are told.
    ///
    /// # Panics
    /// When the API server does not take them.
    pub fn apply(&self, object: &Value) {
        self.apply_text(&object.to_string());
    }

    /// The same, from a manifest as people write them.
    ///
    /// # Panics
    /// When the API server does not take it.
    pub fn apply_text(&self, manifest: &str) {
        if let Err(error) = self.try_apply(manifest) {
            panic!("applying {manifest}: {error}");
        }
    }

    /// The same, where the API server may have something against it.
    ///
    /// # Errors
    /// What the API server has against it.
    pub fn try_apply(&self, manifest: &str) -> Result<String, String> {
        run(kubectl().args(["apply", "--filename=-"]), manifest)
    }

    /// An object as it is.
    ///
    /// # Panics
    /// When it is not there.
    #[must_use]
    pub fn get(&self, namespace: &str, kind: &str, name: &str) -> Value {
        let object = self.kubectl(&["--namespace", namespace, "get", kind, name, "--output=json"]);
        serde_json::from_str(&object).expect("kubectl prints JSON")
    }

    /// All objects of a kind in a namespace.
    ///
    /// # Panics
    /// When the API server does not list them.
    #[must_use]
    pub fn list(&self, namespace: &str, kind: &str) -> Vec<Value> {
        let list = self.kubectl(&["--namespace", namespace, "get", kind, "--output=json"]);
        let list: Value = serde_json::from_str(&list).expect("kubectl prints JSON");
        list["items"].as_array().cloned().unwrap_or_default()
    }

    /// All objects of a kind in all namespaces.
    ///
    /// # Panics
    /// When the API server does not list them.
    #[must_use]
    pub fn list_everywhere(&self, kind: &str) -> Vec<Value> {
        let list = self.kubectl(&["get", kind, "--all-namespaces", "--output=json"]);
        let list: Value = serde_json::from_str(&list).expect("kubectl prints JSON");
        list["items"].as_array().cloned().unwrap_or_default()
    }

    /// Makes a namespace with these labels, in which pods can be made at once.
    #[must_use]
    pub fn namespace(&self, name: &str, labels: &[(&str, &str)]) -> TestNamespace {
        // One that a killed run has left is on its way out, or is removed first.
        let _not_there = self.try_kubectl(&["delete", "namespace", name, "--ignore-not-found"]);
        let labels: serde_json::Map<String, Value> =
            labels.iter().map(|(key, value)| ((*key).to_owned(), json!(value))).collect();
        self.apply(&json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}));
        let namespace = TestNamespace { name: name.to_owned(), made: Instant::now() };
        self.wait_for("the namespace's service account", name, "serviceaccounts", |accounts| !accounts.is_empty());
        namespace
    }

    /// The names of the nodes that run pods, in order.
    ///
    /// # Panics
    /// When they cannot be listed.
    #[must_use]
    pub fn nodes(&self) -> Vec<String> {
        let nodes = self.list("", "nodes");
        let takes_pods = |node: &&Value| {
            let taints = node["spec"]["taints"].as_array().cloned().unwrap_or_default();
            taints.iter().all(|taint| taint["effect"] != "NoSchedule")
        };
        let names = nodes.iter().filter(takes_pods).filter_map(|node| node["metadata"]["name"].as_str());
        names.map(str::to_owned).collect()
    }

    /// Makes a service of a namespace's pod `server`, on 8080, and gives the port of each node that leads there.
    ///
    /// # Panics
    /// When the API server does not take it.
    #[must_use]
    pub fn node_port(&self, namespace: &str) -> u16 {
        self.apply(&json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "server", "namespace": namespace},
            "spec": {"type": "NodePort", "selector": {"app": "server"}, "ports": [{"port": 8080}]},
        }));
        let port = self.get(namespace, "service", "server")["spec"]["ports"][0]["nodePort"].as_u64().expect("a port");
        u16::try_from(port).expect("a port")
    }

    /// A node's own address.
    ///
    /// # Panics
    /// When it has none.
    #[must_use]
    pub fn node_address(&self, node: &str) -> String {
        let node = self.get("", "node", node);
        let addresses = node["status"]["addresses"].as_array().cloned().unwrap_or_default();
        let address = addresses.iter().find(|address| address["type"] == "InternalIP").expect("a node has an address");
        address["address"].as_str().expect("an address is a string").to_owned()
    }

    /// Waits until a condition of an object holds, as `kubectl wait` has it.
    ///
    /// # Panics
    /// When it does not in time.
    pub fn wait_condition(&self, namespace: &str, object: &str, condition: &str) {
        let patience = format!("--timeout={}s", PATIENCE.as_secs());
        self.kubectl(&["--namespace", namespace, "wait", object, &format!("--for=condition={condition}"), &patience]);
    }

    /// Waits until a Deployment or DaemonSet has rolled out.
    ///
    /// # Panics
    /// When it does not in time.
    pub fn wait_rollout(&self, namespace: &str, workload: &str) {
        let patience = format!("--timeout={}s", PATIENCE.as_secs());
        self.kubectl(&["--namespace", namespace, "rollout", "status", workload, &patience]);
    }
}

/// kubectl for the cluster under test.
fn kubectl() -> Command {
    let mut command = Command::new(std::env::var_os("CULVERT_KUBECTL").unwrap_or_else(|| "kubectl".into()));
    let kubeconfig = std::env::var_os("KUBECONFIG").expect("KUBECONFIG names the cluster: run `cargo xtask test cluster`");
    command.arg("--kubeconfig").arg(kubeconfig);
    command
}

/// Runs a program of the API server's client with this input. One that has not reached the API server is run again: the server may be
/// starting, and the client has done nothing yet.
fn run(command: &mut Command, input: &str) -> Result<String, String> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("kubectl starts");
        // One that does not read has failed, and says why.
        let _read = child.stdin.take().expect("a piped input").write_all(input.as_bytes());
        match text(&child.wait_with_output().expect("kubectl ends")) {
            Err(error) if error.contains("was refused - did you specify") && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(100));
            }
            done => return done,
        }
    }
}

/// What a program printed, or what it said of its failure.
fn text(output: &Output) -> Result<String, String> {
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() { Ok(printed) } else { Err(printed + String::from_utf8_lossy(&output.stderr).trim()) }
}
