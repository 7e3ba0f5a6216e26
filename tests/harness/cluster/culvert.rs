//! Culvert as it is installed on the cluster: its agents, what they count and what they tell, and the user's policies.

use std::process::Command;

use serde_json::{Value, json};

use super::{Cluster, TestNamespace, text};

/// Where Culvert is installed.
pub const CULVERT: &str = "culvert-system";
/// The label of a namespace whose pods are to be encrypted within a node as between nodes.
pub const TUNNEL: (&str, &str) = ("culvert.dev/same-node", "tunnel");
/// The values that the suite installs with: an agent that is told to stop refuses new connections for as long as it drains, and a short while
/// says as much as a long one.
const VALUES: &[&str] = &["agent.drainTimeout=2s"];
/// The label of a namespace whose pods are in the mesh.
pub const ENROLLED: (&str, &str) = ("culvert.dev/mesh", "enabled");

/// Istio's plainest manifest, as its users write it:
/// <https://istio.io/latest/docs/tasks/security/authentication/mtls-migration/>.
const STRICT: &str = "\
apiVersion: security.istio.io/v1beta1
kind: PeerAuthentication
metadata:
  name: \"default\"
  namespace: \"istio-system\"
spec:
  mtls:
    mode: STRICT
";

/// A mesh all of whose pods take mutual TLS only, unless something narrower says otherwise; until this is dropped.
#[derive(Debug)]
pub struct StrictMesh {
    root: TestNamespace,
}

impl Drop for StrictMesh {
    fn drop(&mut self) {
        // At once: what is in a namespace goes when the namespace does, which may take longer than the next test.
        let words = ["--namespace", self.root.name(), "delete", "peerauthentication", "default"];
        if let Err(error) = Cluster.try_kubectl(&words) {
            eprintln!("opening the mesh again: {error}");
        }
    }
}

impl Cluster {
    /// Closes the mesh, by Istio's plainest manifest.
    #[must_use]
    pub fn strict_mesh(&self) -> StrictMesh {
        let root = self.namespace("istio-system", &[]);
        self.apply_text(STRICT);
        StrictMesh { root }
    }

    /// The name of the pod of a node's agent.
    ///
    /// # Panics
    /// When the node has none.
    #[must_use]
    pub fn agent(&self, node: &str) -> String {
        let pods = self.list(CULVERT, "pods");
        let is_agent = |pod: &&Value| {
            pod["metadata"]["labels"]["app.kubernetes.io/name"] == "culvert-agent"
                && pod["spec"]["nodeName"] == node
                && pod["metadata"]["deletionTimestamp"].is_null()
        };
        let agent = pods.iter().find(is_agent).unwrap_or_else(|| panic!("{node} has no agent"));
        agent["metadata"]["name"].as_str().expect("a pod has a name").to_owned()
    }

    /// Installs Culvert anew with these values over the suite's own, as an upgrade does, and gives what the command says.
    ///
    /// # Panics
    /// When it fails.
    #[must_use]
    pub fn install(&self, values: &[&str]) -> String {
        let mut command = Command::new(std::env::var_os("CULVERT_BIN").expect("CULVERT_BIN names the binary under test"));
        command.arg("install").arg("--kubeconfig").arg(std::env::var_os("KUBECONFIG").expect("KUBECONFIG names the cluster"));
        for value in [VALUES, values].concat() {
            command.args(["--set", value]);
        }
        text(&command.output().expect("culvert starts")).expect("the installation succeeds")
    }

    /// What the agent of a node counts for a series, which is 0 until there is something to count.
    ///
    /// # Panics
    /// When it does not tell.
    #[must_use]
    pub fn agent_count(&self, node: &str, series: &str) -> u64 {
        let path = format!("/api/v1/namespaces/{CULVERT}/pods/{}:15020/proxy/metrics", self.agent(node));
        let page = self.kubectl(&["get", "--raw", &path]);
        let value = page.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        value.map_or(0, |value| value.parse().unwrap_or_else(|_| panic!("{series} is {value}")))
    }

    /// How often the programs of a node's agent ended so.
    #[must_use]
    pub fn outcomes(&self, node: &str, outcome: &str) -> u64 {
        self.agent_count(node, &format!("culvert_capture_outcomes_total{{outcome=\"{outcome}\"}}"))
    }

    /// What the agent of a node has logged.
    #[must_use]
    pub fn agent_log(&self, node: &str) -> Vec<Value> {
        let log = self.kubectl(&["--namespace", CULVERT, "logs", &self.agent(node)]);
        log.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Sets what the pods of a namespace accept.
    pub fn mode(&self, namespace: &str, mode: &str) {
        self.apply(&json!({
            "apiVersion": "security.istio.io/v1",
            "kind": "PeerAuthentication",
            "metadata": {"name": "default", "namespace": namespace},
            "spec": {"mtls": {"mode": mode}},
        }));
    }

    /// Makes a service of that name for the pod of this label `app`, with an address or, headless, without.
    pub fn service(&self, namespace: &str, name: &str, app: &str, headless: bool) {
        let mut spec = json!({"selector": {"app": app}, "ports": [{"port": 8080}]});
        if headless {
            spec["clusterIP"] = json!("None");
        }
        let metadata = json!({"name": name, "namespace": namespace});
        self.apply(&json!({"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec}));
    }
}
