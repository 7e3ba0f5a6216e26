//! A cluster made by kind, where a Docker engine works and kind is installed. Its nodes are the engine's containers, on this machine.

use std::ffi::OsString;
use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::{Cluster, Maker, Part, Up, images, processes};
use crate::run::{run, succeeds};
use crate::setup::{self, Scope};

/// How long nodes, and the name server on them, may take until they are ready, as kind and kubectl are told it.
const PATIENCE: &str = "120s";
/// kind uses no other engine, whichever it could: what we ask of the engine ourselves, we ask Docker.
const PROVIDER: (&str, &str) = ("KIND_EXPERIMENTAL_PROVIDER", "docker");

/// Why kind does not work here; nothing if it does.
pub(super) fn missing() -> Option<&'static str> {
    if setup::find("docker").is_none() || !succeeds(Command::new("docker").arg("info")) {
        Some("no Docker engine answers")
    } else if !succeeds(Command::new("kind").arg("version")) {
        Some("kind is not on the PATH")
    } else {
        None
    }
}

/// Makes the cluster: a control plane and the nodes; and waits until they are ready, and names are answered.
pub(super) fn up(cluster: &Cluster, up: &Up) -> Result<()> {
    setup::ensure(Scope::Images)?;
    fs::write(cluster.path("maker"), Maker::Kind.word())?;
    let mut config = "kind: Cluster\napiVersion: kind.x-k8s.io/v1alpha4\nnodes:\n- role: control-plane\n".to_owned();
    config.push_str(&"- role: worker\n".repeat(up.nodes.into()));
    let file = cluster.path("kind.yaml");
    fs::write(&file, config)?;
    let mut create = kind(cluster, &["create", "cluster"]);
    create.arg("--config").arg(file).arg("--kubeconfig").arg(cluster.kubeconfig()).args(["--wait", PATIENCE]);
    if let Some(image) = &up.node_image {
        fs::write(cluster.path("kubernetes"), image)?;
        create.args(["--image", image]);
    }
    run(&mut create)?;
    let names = output(&mut kind(cluster, &["get", "nodes"]))?;
    let mut names: Vec<&str> = names.lines().filter(|name| *name != control_plane(cluster)).collect();
    names.sort_unstable();
    fs::write(cluster.path("nodes"), names.join("\n"))?;
    // The nodes' own: of the cluster's version, and there on a machine that has none.
    let kubectl = format!("{}:/usr/bin/kubectl", control_plane(cluster));
    output(Command::new("docker").args(["cp", &kubectl]).arg(cluster.kubectl_program()))?;
    std::iter::once(control_plane(cluster).as_str()).chain(names).try_for_each(mount_bpffs)?;
    wait_until_ready(cluster)?;
    let mut archives = images::own(&cluster.path("images"))?;
    for directory in &up.images {
        archives.extend(images::archives(directory)?);
    }
    import(cluster, &archives)
}

/// Has a node a file system for eBPF programs, as systemd mounts it on machines: it does not in a container.
fn mount_bpffs(node: &str) -> Result<()> {
    output(Command::new("docker").args(["exec", node, "mount", "-t", "bpf", "-o", "mode=0700", "bpf", "/sys/fs/bpf"])).map(drop)
}

/// kind itself waits for the control plane.
fn wait_until_ready(cluster: &Cluster) -> Result<()> {
    let timeout = format!("--timeout={PATIENCE}");
    run(cluster.kubectl().args(["wait", "--for=condition=Ready", "node", "--all", &timeout]))?;
    run(cluster.kubectl().args(["--namespace", "kube-system", "rollout", "status", "deployment/coredns", &timeout]))
}

/// Whether kind has the cluster, whatever we know of it.
pub(super) fn has(cluster: &Cluster) -> bool {
    let clusters = || output(Command::new("kind").args(["get", "clusters", "--quiet"]).env(PROVIDER.0, PROVIDER.1)).ok();
    missing().is_none() && clusters().is_some_and(|names| names.lines().any(|name| name == kind_name(cluster)))
}

/// Removes the cluster.
pub(super) fn down(cluster: &Cluster) -> Result<()> {
    // Without a word: who wanted the cluster may have gone, and the place where it would be said with him.
    output(kind(cluster, &["delete", "cluster"]).arg("--kubeconfig").arg(cluster.kubeconfig())).map(drop)
}

/// Imports docker-archive tars on each node.
pub(super) fn import(cluster: &Cluster, archives: &[PathBuf]) -> Result<()> {
    archives.iter().try_for_each(|archive| run(kind(cluster, &["load", "image-archive"]).arg(archive)))
}

/// Becomes a program on a node.
pub(super) fn exec(cluster: &Cluster, node: &str, words: &[OsString]) -> Result<()> {
    check_node(cluster, node)?;
    Err(Command::new("docker").args(["exec", "--interactive", node]).args(words).exec()).context("starting docker")
}

/// The file of a node's network namespace.
pub(super) fn netns(cluster: &Cluster, node: &str) -> Result<PathBuf> {
    let container = if node == super::network::CONTROL_PLANE {
        control_plane(cluster)
    } else {
        check_node(cluster, node)?;
        node.to_owned()
    };
    let pid = output(Command::new("docker").args(["inspect", "--format", "{{.State.Pid}}", &container]))?;
    ensure!(pid != "0", "{node} does not run");
    Ok(format!("/proc/{pid}/ns/net").into())
}

/// Stops a part.
pub(super) fn stop(cluster: &Cluster, part: &Part) -> Result<()> {
    match part {
        Part::ApiServer => stop_api_server(cluster),
        Part::Node(node) => docker(cluster, node, &["kill"], &[]),
        Part::Kubelet(node) => docker(cluster, node, &["exec"], &["systemctl", "stop", "kubelet"]),
        Part::Link(node) => set_link(cluster, node, "down"),
    }
}

/// Starts a part that was stopped.
pub(super) fn start(cluster: &Cluster, part: &Part) -> Result<()> {
    match part {
        Part::ApiServer => start_api_server(cluster),
        Part::Node(node) => {
            docker(cluster, node, &["start"], &[])?;
            mount_bpffs(node)
        }
        Part::Kubelet(node) => docker(cluster, node, &["exec"], &["systemctl", "start", "kubelet"]),
        Part::Link(node) => set_link(cluster, node, "up"),
    }
}

/// Ends the API server, a static pod, which the kubelet ends when its manifest is gone.
fn stop_api_server(cluster: &Cluster) -> Result<()> {
    move_api_server(cluster, "manifests", "stopped")?;
    let mut look = on_control_plane(cluster, &["pgrep", "--exact", "kube-apiserver"]);
    processes::retry(|| {
        // 1 is what it ends with that has found none.
        ensure!(look.output()?.status.code() == Some(1), "the kubelet does not end the API server");
        Ok(())
    })
}

fn start_api_server(cluster: &Cluster) -> Result<()> {
    move_api_server(cluster, "stopped", "manifests")?;
    processes::retry(|| {
        let said = output(cluster.kubectl().args(["get", "--raw", "/readyz"]))?;
        ensure!(said == "ok", "the API server is not ready: {said}");
        Ok(())
    })
}

fn move_api_server(cluster: &Cluster, from: &str, to: &str) -> Result<()> {
    output(&mut on_control_plane(cluster, &["mkdir", "-p", "/etc/kubernetes/stopped"]))?;
    let file = |directory: &str| format!("/etc/kubernetes/{directory}/kube-apiserver.yaml");
    output(&mut on_control_plane(cluster, &["mv", &file(from), &file(to)])).map(drop)
}

/// Cuts a node off, or joins it again, at the engine's end of its link: the node keeps its address and its routes, and is not told more than
/// that its carrier is gone.
fn set_link(cluster: &Cluster, node: &str, state: &str) -> Result<()> {
    check_node(cluster, node)?;
    let other_end = output(Command::new("docker").args(["exec", node, "cat", "/sys/class/net/eth0/iflink"]))?;
    let other_end: u64 =
        other_end.parse().with_context(|| format!("the number of the other end of {node}'s link: {other_end}"))?;
    let links: Vec<Value> = serde_json::from_str(&output(Command::new("ip").args(["-json", "link", "show"]))?)?;
    let link = links.iter().find(|link| link["ifindex"] == other_end).and_then(|link| link["ifname"].as_str());
    let link =
        link.with_context(|| format!("the other end of {node}'s link, interface {other_end}, is not in this network namespace"))?;
    output(Command::new("ip").args(["link", "set", link, state])).map(drop)
}

/// Has the engine do something with a node's container.
fn docker(cluster: &Cluster, node: &str, verb: &[&str], words: &[&str]) -> Result<()> {
    check_node(cluster, node)?;
    output(Command::new("docker").args(verb).arg(node).args(words)).map(drop)
}

fn on_control_plane(cluster: &Cluster, words: &[&str]) -> Command {
    let mut command = Command::new("docker");
    command.args(["exec", &control_plane(cluster)]).args(words);
    command
}

/// kind, with Docker.
fn kind(cluster: &Cluster, verb: &[&str]) -> Command {
    let mut command = Command::new("kind");
    command.args(verb).args(["--name", &kind_name(cluster)]).env(PROVIDER.0, PROVIDER.1);
    command
}

fn kind_name(cluster: &Cluster) -> String {
    format!("culvert-{}", cluster.name)
}

fn control_plane(cluster: &Cluster) -> String {
    format!("{}-control-plane", kind_name(cluster))
}

/// What a program prints that succeeds.
fn output(command: &mut Command) -> Result<String> {
    let program = command.get_program().display().to_string();
    let output = command.output().with_context(|| format!("starting {program}"))?;
    ensure!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn check_node(cluster: &Cluster, node: &str) -> Result<()> {
    let nodes = cluster.nodes()?;
    ensure!(nodes.iter().any(|name| name == node), "no node {node}; there are {}", nodes.join(", "));
    Ok(())
}
