//! The controller, the agents and the manifests: what is told to them, and what they tell.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::lab::{BATCH, CART, Lab, NODE_A, NODE_B, NODES, Node, PODS, Pod, WEB, namespace};
use crate::netns;

/// How long certificates live here: short, so that one is rotated while we look.
pub(crate) const CERTIFICATE_LIFE: &str = "24s";
/// The service that the pod `web` is behind.
pub(crate) const SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
/// The port that its nginx listens on; the service's is 80.
pub(crate) const WEB_PORT: u16 = 8080;

const DEADLINE: Duration = Duration::from_secs(10);
const LONG_DEADLINE: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(20);

/// A running mesh.
#[derive(Debug)]
pub(crate) struct Mesh<'a> {
    lab: &'a Lab,
    /// Where each node's agent writes its log, in the order of [`NODES`].
    logs: Vec<PathBuf>,
}

/// A certificate that an agent holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Certificate {
    pub(crate) serial: String,
    pub(crate) not_after: String,
}

impl<'a> Mesh<'a> {
    /// Starts controller and agents, and waits until each pod in the mesh is enrolled and has its certificate.
    pub(crate) fn start(lab: &'a Lab, culvert: &Path) -> Result<Self> {
        write_objects(lab)?;
        let culvert = std::path::absolute(culvert)?;
        let culvert = culvert.to_str().context("the path of the culvert binary is no text")?;
        let listen = SocketAddr::from((NODE_A.address, 15012));
        let mut controller = netns::command(&namespace(NODE_A.name), culvert);
        controller.arg("controller").arg("--manifests").arg(lab.path("manifests")).arg("--state-dir").arg(lab.path("state"));
        controller.args(["--listen", &listen.to_string(), "--cert-ttl", CERTIFICATE_LIFE]);
        lab.start("controller.log", controller)?;
        let mut logs = Vec::new();
        for node in NODES {
            let mut agent = netns::command(&namespace(node.name), culvert);
            agent.args(["agent", "--node", node.name, "--controller", &format!("https://{listen}"), "--log-format", "json"]);
            agent.arg("--root-cert").arg(lab.path("state/root-cert.pem"));
            agent.arg("--token-file").arg(lab.path("state/tokens").join(node.name));
            agent.arg("--netns-dir").arg(lab.netns_dir(node)).arg("--bpf-dir").arg(lab.path(node.name).join("bpf"));
            agent.arg("--state-dir").arg(lab.path(node.name).join("state")).args(["--drain-timeout", "1s"]);
            logs.push(lab.start(&format!("agent-{}.log", node.name), agent)?);
        }
        let mesh = Self { lab, logs };
        for pod in PODS.into_iter().filter(|pod| pod.in_mesh) {
            let node = NODES.into_iter().find(|node| node.name == pod.node).context("a pod without a node")?;
            mesh.wait(&format!("{} to be enrolled", pod.name), || Ok(mesh.pod(node, pod)?.map(drop)))?;
            mesh.wait(&format!("the certificate of {}", pod.name), || mesh.certificate(node, pod).map(Option::Some))?;
        }
        Ok(mesh)
    }

    /// Writes a manifest, or writes it anew.
    pub(crate) fn apply(&self, file: &str, text: &str) -> Result<()> {
        write_manifest(self.lab, file, text)
    }

    /// Removes a manifest.
    pub(crate) fn withdraw(&self, file: &str) -> Result<()> {
        fs::remove_file(self.lab.path("manifests").join(file)).with_context(|| format!("removing {file}"))
    }

    /// Waits until web's agent applies this mode to it.
    pub(crate) fn wait_for_mode(&self, mode: &str) -> Result<()> {
        let applied = || Ok(self.pod(&NODE_B, &WEB)?.filter(|pod| pod["mode"] == mode).map(drop));
        self.wait(&format!("mode {mode}"), applied)
    }

    /// Waits until web's agent knows just these authorization policies.
    pub(crate) fn wait_for_policies(&self, names: &[&str]) -> Result<()> {
        self.wait(&format!("policies {names:?}"), || {
            let known = self.admin(&NODE_B, "/policies")?;
            let known: Vec<&str> = known.as_array().into_iter().flatten().filter_map(|policy| policy["name"].as_str()).collect();
            Ok((known == names).then_some(()))
        })
    }

    /// The certificate that a node's agent holds for a pod.
    pub(crate) fn certificate(&self, node: &Node, pod: &Pod) -> Result<Certificate> {
        let held = self.admin(node, "/certificates")?;
        let held = held.as_array().into_iter().flatten().find(|certificate| certificate["identity"] == pod.spiffe_id());
        let field = |name: &str| held.and_then(|held| held[name].as_str()).map(str::to_owned);
        let found = field("serial").zip(field("not_after")).map(|(serial, not_after)| Certificate { serial, not_after });
        found.with_context(|| format!("{} has no certificate for {}", node.name, pod.spiffe_id()))
    }

    /// The sum of a metric's series whose labels contain these.
    pub(crate) fn metric(&self, node: &Node, name: &str, labels: &[&str]) -> Result<u64> {
        let page = netns::http_get(&namespace(node.name), SocketAddr::from(([127, 0, 0, 1], 15020)), "/metrics")?;
        let of_series = |line: &str| {
            let rest = line.strip_prefix(name)?.strip_prefix('{')?;
            let (found, value) = rest.rsplit_once("} ")?;
            labels.iter().all(|label| found.contains(label)).then(|| value.parse::<f64>().ok())?
        };
        // Counters are whole numbers.
        Ok(page.lines().filter_map(of_series).sum::<f64>() as u64)
    }

    /// The lines that a node's agent has written to its access log since, after waiting for at least one that fits.
    pub(crate) fn access_log(&self, node: &Node, since: usize, fits: impl Fn(&Value) -> bool) -> Result<Vec<Value>> {
        self.wait(&format!("the access log of {}", node.name), || {
            let lines = self.access_log_now(node, since)?;
            Ok(Some(lines.into_iter().filter(|line| fits(line)).collect::<Vec<_>>()).filter(|lines| !lines.is_empty()))
        })
    }

    /// The lines that a node's agent has written to its access log since.
    pub(crate) fn access_log_now(&self, node: &Node, since: usize) -> Result<Vec<Value>> {
        let index = NODES.into_iter().position(|other| other.name == node.name).context("no such node")?;
        let log = fs::read_to_string(&self.logs[index]).with_context(|| format!("reading {}", self.logs[index].display()))?;
        let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        Ok(lines.filter(|line| line["target"] == "access").skip(since).collect())
    }

    /// How many lines are in a node's access log.
    pub(crate) fn access_log_length(&self, node: &Node) -> Result<usize> {
        Ok(self.access_log_now(node, 0)?.len())
    }

    /// Waits until `look` finds something.
    pub(crate) fn wait<T>(&self, what: &str, look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
        wait_until(DEADLINE, what, look)
    }

    /// The same, for what takes as long as a certificate lives.
    pub(crate) fn wait_longer<T>(&self, what: &str, look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
        wait_until(LONG_DEADLINE, what, look)
    }

    fn pod(&self, node: &Node, pod: &Pod) -> Result<Option<Value>> {
        let pods = self.admin(node, "/pods")?;
        Ok(pods.as_array().into_iter().flatten().find(|seen| seen["name"] == pod.name).cloned())
    }

    fn admin(&self, node: &Node, path: &str) -> Result<Value> {
        let page = netns::http_get(&namespace(node.name), SocketAddr::from(([127, 0, 0, 1], 15000)), path)?;
        serde_json::from_str(&page).with_context(|| format!("{} of {} is no JSON", path, node.name))
    }
}

fn wait_until<T>(patience: Duration, what: &str, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + patience;
    loop {
        match look() {
            Ok(Some(found)) => return Ok(found),
            Ok(None) if Instant::now() > deadline => bail!("waited {patience:?} in vain for {what}"),
            Err(error) if Instant::now() > deadline => return Err(error.context(format!("waited {patience:?} for {what}"))),
            Ok(None) | Err(_) => sleep(LOOK),
        }
    }
}

/// As `kubectl get --output yaml` would show them, and no more than matters.
fn write_objects(lab: &Lab) -> Result<()> {
    for node in NODES {
        let object = format!(
            "apiVersion: v1\nkind: Node\nmetadata: {{name: {0}}}\nspec: {{podCIDR: {1}, podCIDRs: [{1}]}}\n",
            node.name, node.pods
        );
        write_manifest(lab, &format!("node-{}.yaml", node.name), &object)?;
    }
    for (namespace, label) in [(CART.namespace, "enabled"), (BATCH.namespace, "enabled"), ("old", "disabled")] {
        let object =
            format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: {namespace}, labels: {{culvert.dev/mesh: {label}}}}}\n");
        write_manifest(lab, &format!("namespace-{namespace}.yaml"), &object)?;
    }
    for pod in PODS {
        write_manifest(lab, &format!("pod-{}.yaml", pod.name), &pod_object(pod))?;
    }
    write_manifest(lab, "service-web.yaml", &service_object())
}

fn pod_object(Pod { name, namespace, account, node, address, .. }: &Pod) -> String {
    format!(
        "apiVersion: v1
kind: ServiceAccount
metadata: {{name: {account}, namespace: {namespace}}}
---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: {namespace}, uid: demo-{name}, labels: {{app: {name}}}}}
spec: {{nodeName: {node}, serviceAccountName: {account}, containers: [{{name: main, image: none}}]}}
status:
  phase: Running
  podIP: {address}
  podIPs: [{{ip: {address}}}]
  conditions: [{{type: Ready, status: \"True\"}}]
"
    )
}

fn service_object() -> String {
    let Pod { name, namespace, address, node, .. } = &WEB;
    format!(
        "apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: {namespace}}}
spec:
  clusterIP: {SERVICE}
  clusterIPs: [{SERVICE}]
  selector: {{app: {name}}}
  ports: [{{name: http, port: 80, targetPort: {WEB_PORT}, protocol: TCP}}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: {name}-1, namespace: {namespace}, labels: {{kubernetes.io/service-name: {name}}}}}
addressType: IPv4
ports: [{{name: http, port: {WEB_PORT}, protocol: TCP}}]
endpoints:
- addresses: [{address}]
  conditions: {{ready: true}}
  nodeName: {node}
  targetRef: {{kind: Pod, name: {name}, namespace: {namespace}}}
"
    )
}

/// A file appears whole: it is written beside the directory and moved.
fn write_manifest(lab: &Lab, file: &str, text: &str) -> Result<()> {
    let draft = lab.path("draft");
    fs::write(&draft, text)?;
    fs::rename(&draft, lab.path("manifests").join(file)).with_context(|| format!("writing {file}"))
}
