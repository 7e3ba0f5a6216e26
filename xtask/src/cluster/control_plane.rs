//! The control plane: etcd and Kubernetes' programs, each a process in one network namespace, and two programs of ours that give this
//! machine a way to the API server and the pods names of services.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::network::{CONTROL_PLANE, CONTROL_PLANE_ADDR, DNS_SERVICE, SERVICES};
use super::node::Node;
use super::processes::{self, Ready};
use super::{Cluster, network, options, pki};

const ETCD: &str = "http://127.0.0.1:2379";
const ISSUER: &str = "https://kubernetes.default.svc.cluster.local";

/// Starts everything; the nodes' objects are there when it returns.
pub(super) fn start(cluster: &Cluster, nodes: &[Node<'_>]) -> Result<()> {
    start_etcd(cluster)?;
    start_own(cluster, "forward", Ready::Notified)?;
    start_api_server(cluster)?;
    start_program(cluster, "kube-controller-manager", &controller_manager(cluster), Ready::Started)?;
    start_program(cluster, "kube-scheduler", &scheduler(cluster), Ready::Started)?;
    apply(cluster, &first_objects(nodes))?;
    start_own(cluster, "dns", Ready::Notified)
}

/// Starts the API server, and waits until it serves.
pub(super) fn start_api_server(cluster: &Cluster) -> Result<()> {
    let arguments = [api_server(cluster), options::api_server(cluster)?].concat();
    start_program(cluster, "kube-apiserver", &arguments, Ready::Notified)?;
    processes::retry(|| {
        let output = kubectl(cluster).args(["get", "--raw", "/readyz"]).output()?;
        ensure!(output.stdout == b"ok", "the API server is not ready: {}", String::from_utf8_lossy(&output.stderr).trim());
        Ok(())
    })
}

/// Ends the API server at once.
pub(super) fn stop_api_server(cluster: &Cluster) -> Result<()> {
    let namespace = [cluster.netns(CONTROL_PLANE)];
    processes::end("kube-apiserver", || {
        let running = processes::running(&namespace).into_iter();
        running.filter(|process| process.name == "kube-apiserver").collect()
    })
}

/// The administrator's kubeconfig for use from this machine, by the forwarder.
pub(super) fn local_kubeconfig(cluster: &Cluster) -> PathBuf {
    pki::file(cluster, "local", "kubeconfig")
}

/// kubectl on this machine, while the cluster is being made.
pub(super) fn kubectl(cluster: &Cluster) -> Command {
    kubectl_with(cluster, &local_kubeconfig(cluster))
}

/// kubectl in the control plane's network namespace.
pub(super) fn inner_kubectl(cluster: &Cluster) -> Command {
    kubectl_with(cluster, &pki::file(cluster, "admin", "kubeconfig"))
}

fn kubectl_with(cluster: &Cluster, kubeconfig: &Path) -> Command {
    let mut command = Command::new(cluster.path("bin/kubectl"));
    command.arg("--kubeconfig").arg(kubeconfig).stdin(Stdio::null());
    command
}

/// Makes objects, or makes them as they are told.
pub(super) fn apply(cluster: &Cluster, objects: &Value) -> Result<()> {
    let file = cluster.path("objects.json");
    fs::write(&file, objects.to_string())?;
    let output = kubectl(cluster).args(["apply", "--filename"]).arg(&file).output().context("starting kubectl")?;
    ensure!(output.status.success(), "applying objects: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}

fn start_program(cluster: &Cluster, program: &str, arguments: &[String], ready: Ready) -> Result<()> {
    let mut command = network::inside(&cluster.netns(CONTROL_PLANE), cluster.path("bin").join(program));
    processes::start(cluster, program, command.args(arguments), ready)
}

/// Starts a verb of our own. It enters the control plane's namespace itself, when it has what it needs of this machine's.
fn start_own(cluster: &Cluster, verb: &str, ready: Ready) -> Result<()> {
    let mut command = Command::new(cluster.own_program());
    processes::start(cluster, verb, command.args(["cluster", "--name", &cluster.name, verb]), ready)
}

fn start_etcd(cluster: &Cluster) -> Result<()> {
    let peer = "http://127.0.0.1:2380";
    let mut command = network::inside(&cluster.netns(CONTROL_PLANE), "etcd");
    command.env("PATH", cluster.search_path());
    command.arg("--data-dir").arg(cluster.path("etcd"));
    command.args(["--listen-client-urls", ETCD, "--advertise-client-urls", ETCD]);
    command.args(["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer]);
    command.args(["--initial-cluster", &format!("default={peer}"), "--unsafe-no-fsync"]);
    processes::start(cluster, "etcd", &mut command, Ready::Notified)
}

fn api_server(cluster: &Cluster) -> Vec<String> {
    let file = |name: &str, extension: &str| pki::file(cluster, name, extension).display().to_string();
    let ca = file("ca", "crt");
    vec![
        format!("--etcd-servers={ETCD}"),
        format!("--bind-address={CONTROL_PLANE_ADDR}"),
        format!("--advertise-address={CONTROL_PLANE_ADDR}"),
        format!("--tls-cert-file={}", file("apiserver", "crt")),
        format!("--tls-private-key-file={}", file("apiserver", "key")),
        format!("--client-ca-file={ca}"),
        format!("--kubelet-certificate-authority={ca}"),
        format!("--kubelet-client-certificate={}", file("apiserver-kubelet-client", "crt")),
        format!("--kubelet-client-key={}", file("apiserver-kubelet-client", "key")),
        "--kubelet-preferred-address-types=InternalIP".to_owned(),
        format!("--proxy-client-cert-file={}", file("front-proxy-client", "crt")),
        format!("--proxy-client-key-file={}", file("front-proxy-client", "key")),
        format!("--requestheader-client-ca-file={ca}"),
        "--requestheader-allowed-names=front-proxy-client".to_owned(),
        "--requestheader-extra-headers-prefix=X-Remote-Extra-".to_owned(),
        "--requestheader-group-headers=X-Remote-Group".to_owned(),
        "--requestheader-username-headers=X-Remote-User".to_owned(),
        format!("--service-account-key-file={}", file("service-accounts", "pub")),
        format!("--service-account-signing-key-file={}", file("service-accounts", "key")),
        format!("--service-account-issuer={ISSUER}"),
        format!("--service-cluster-ip-range={SERVICES}"),
        "--authorization-mode=Node,RBAC".to_owned(),
        "--enable-admission-plugins=NodeRestriction".to_owned(),
        "--enable-aggregator-routing=true".to_owned(),
        "--allow-privileged=true".to_owned(),
    ]
}

fn controller_manager(cluster: &Cluster) -> Vec<String> {
    let file = |name: &str, extension: &str| pki::file(cluster, name, extension).display().to_string();
    let mut arguments = client(cluster, "controller-manager");
    arguments.extend([
        "--use-service-account-credentials".to_owned(),
        format!("--root-ca-file={}", file("ca", "crt")),
        format!("--service-account-private-key-file={}", file("service-accounts", "key")),
        format!("--cluster-signing-cert-file={}", file("ca", "crt")),
        format!("--cluster-signing-key-file={}", file("ca", "key")),
        "--node-monitor-grace-period=20s".to_owned(),
    ]);
    arguments
}

fn scheduler(cluster: &Cluster) -> Vec<String> {
    client(cluster, "scheduler")
}

fn client(cluster: &Cluster, name: &str) -> Vec<String> {
    let kubeconfig = pki::file(cluster, name, "kubeconfig");
    let options = ["kubeconfig", "authentication-kubeconfig", "authorization-kubeconfig"];
    let mut arguments: Vec<String> = options.iter().map(|option| format!("--{option}={}", kubeconfig.display())).collect();
    arguments.extend(["--leader-elect=false".to_owned(), "--bind-address=127.0.0.1".to_owned()]);
    arguments
}

/// The nodes, which their kubelets take over when they start; what kube-proxy may do; and the name server's service, whose only endpoint is
/// the control plane.
fn first_objects(nodes: &[Node<'_>]) -> Value {
    let ports = json!([
        {"name": "dns", "port": 53, "protocol": "UDP"},
        {"name": "dns-tcp", "port": 53, "protocol": "TCP"},
    ]);
    let name_server = json!({"name": "kube-dns", "namespace": "kube-system", "labels": {"k8s-app": "kube-dns"}});
    let mut items: Vec<Value> = nodes
        .iter()
        .map(|node| {
            json!({
                "apiVersion": "v1",
                "kind": "Node",
                "metadata": {"name": node.name()},
                "spec": {"podCIDR": node.pods(), "podCIDRs": [node.pods()]},
            })
        })
        .collect();
    items.push(json!({
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": "kube-proxy"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "system:node-proxier"},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "system:kube-proxy"}],
    }));
    items.push(json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": name_server,
        "spec": {"clusterIP": DNS_SERVICE, "ports": ports},
    }));
    items.push(json!({
        "apiVersion": "v1",
        "kind": "Endpoints",
        "metadata": name_server,
        "subsets": [{"addresses": [{"ip": CONTROL_PLANE_ADDR}], "ports": ports}],
    }));
    json!({"apiVersion": "v1", "kind": "List", "items": items})
}
