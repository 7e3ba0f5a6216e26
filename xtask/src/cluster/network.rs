//! The cluster's network: the control plane and each node in a network namespace of its own, joined by a bridge in the control plane's,
//! with a route to each node's pods. Pods' addresses pass between nodes as they are; nothing of it is in this machine's own namespace.

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};

use super::Cluster;
use super::node::Node;

/// The namespace of etcd, the API server and what else runs once a cluster.
pub(super) const CONTROL_PLANE: &str = "control-plane";
/// A namespace that is neither the control plane nor a node: where clients from outside of the cluster come from.
const OUTSIDE: &str = "outside";
/// Where the API server listens, and the way between the nodes.
pub(super) const CONTROL_PLANE_ADDR: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 1);
const OUTSIDE_ADDR: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 200);
/// The range of all pods.
pub(super) const PODS: &str = "10.244.0.0/16";
/// The range of services, the API server's own address in it, and the name server's.
pub(super) const SERVICES: &str = "10.96.0.0/16";
pub(super) const API_SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);
pub(super) const DNS_SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);

/// Where `ip netns` keeps a namespace.
pub(super) fn path(name: &str) -> PathBuf {
    Path::new("/run/netns").join(name)
}

/// The cluster's namespaces, those that are there.
pub(super) fn namespaces(cluster: &Cluster) -> Vec<String> {
    let names = fs::read_dir("/run/netns").into_iter().flatten().flatten();
    let names = names.filter_map(|entry| entry.file_name().into_string().ok());
    names.filter(|name| name.starts_with(&cluster.prefix())).collect()
}

/// Makes the bridge, with nobody on it but the control plane and the outside.
pub(super) fn make(cluster: &Cluster) -> Result<()> {
    let fabric = cluster.netns(CONTROL_PLANE);
    ip(&format!("netns add {fabric}"))?;
    ip(&format!("-n {fabric} link set lo up"))?;
    ip(&format!("-n {fabric} link add fabric type bridge"))?;
    ip(&format!("-n {fabric} addr add {CONTROL_PLANE_ADDR}/24 dev fabric"))?;
    ip(&format!("-n {fabric} link set fabric up"))?;
    join(cluster, OUTSIDE, OUTSIDE_ADDR)
}

/// Makes a node's namespace, with a route to the pods of each node, which the other nodes and the control plane get, too.
pub(super) fn add_node(node: &Node<'_>, others: &[Node<'_>]) -> Result<()> {
    let (cluster, name) = (node.cluster(), node.netns());
    join(cluster, &node.name(), node.address())?;
    // kubelet asks the clouds' metadata address for credentials: refused at once, it starts at once.
    ip(&format!("-n {name} route add unreachable 169.254.0.0/16"))?;
    ip(&format!("-n {} route replace {} via {}", cluster.netns(CONTROL_PLANE), node.pods(), node.address()))?;
    for other in others.iter().filter(|other| other.name() != node.name()) {
        ip(&format!("-n {name} route add {} via {}", other.pods(), other.address()))?;
    }
    Ok(())
}

fn join(cluster: &Cluster, part: &str, address: Ipv4Addr) -> Result<()> {
    let (fabric, name) = (cluster.netns(CONTROL_PLANE), cluster.netns(part));
    ip(&format!("netns add {name}"))?;
    ip(&format!("-n {name} link set lo up"))?;
    ip(&format!("-n {fabric} link add {part} type veth peer name eth0 netns {name}"))?;
    ip(&format!("-n {fabric} link set {part} master fabric up"))?;
    ip(&format!("-n {name} addr add {address}/24 dev eth0"))?;
    ip(&format!("-n {name} link set eth0 up"))?;
    ip(&format!("-n {name} route add default via {CONTROL_PLANE_ADDR}"))
}

/// Cuts a node off, or joins it again; the node itself is not told more than that its carrier is gone.
pub(super) fn set_link(node: &Node<'_>, state: &str) -> Result<()> {
    ip(&format!("-n {} link set {} {state}", node.cluster().netns(CONTROL_PLANE), node.name()))
}

/// Removes a namespace and all interfaces in it.
pub(super) fn remove(name: &str) -> Result<()> {
    ip(&format!("netns del {name}"))
}

/// A program that will run in a network namespace, with this machine's own files.
pub(super) fn inside(namespace: &str, program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net={}", path(namespace).display())).arg("--").arg(program);
    command
}

fn ip(words: &str) -> Result<()> {
    let output = Command::new("ip").args(words.split(' ')).stdin(Stdio::null()).output().context("starting ip")?;
    ensure!(output.status.success(), "ip {words}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}
