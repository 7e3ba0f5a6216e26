//! A cluster made by kind, where a Docker engine works and kind is installed.

use std::ffi::OsString;
use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use super::{Cluster, Maker, Part, Up, images};
use crate::run::{run, succeeds};
use crate::setup;

/// Why kind does not work here; nothing if it does.
pub(super) fn missing() -> Option<&'static str> {
    if setup::find("docker").is_none() || !succeeds(Command::new("docker").arg("info")) {
        Some("no Docker engine answers")
    } else if !succeeds(Command::new("kind").arg("version")) {
        Some("kind is not installed")
    } else if setup::find("kubectl").is_none() {
        Some("kubectl is not installed")
    } else {
        None
    }
}

/// Makes the cluster: a control plane and the nodes.
pub(super) fn up(cluster: &Cluster, up: &Up) -> Result<()> {
    fs::write(cluster.path("maker"), Maker::Kind.word())?;
    let mut config = "kind: Cluster\napiVersion: kind.x-k8s.io/v1alpha4\nnodes:\n- role: control-plane\n".to_owned();
    config.push_str(&"- role: worker\n".repeat(up.nodes.into()));
    let file = cluster.path("kind.yaml");
    fs::write(&file, config)?;
    let mut create = kind(cluster, "create");
    run(create.arg("--config").arg(file).arg("--kubeconfig").arg(cluster.kubeconfig()).args(["--wait", "120s"]))?;
    let names = Command::new("kind").args(["get", "nodes", "--name", &kind_name(cluster)]).output()?;
    let names = String::from_utf8(names.stdout)?;
    let mut names: Vec<&str> = names.lines().filter(|name| !name.ends_with("control-plane")).collect();
    names.sort_unstable();
    fs::write(cluster.path("nodes"), names.join("\n"))?;
    let mut archives = images::own(&cluster.path("images"))?;
    for directory in &up.images {
        archives.extend(images::archives(directory)?);
    }
    import(cluster, &archives)
}

/// Removes the cluster.
pub(super) fn down(cluster: &Cluster) -> Result<()> {
    // Without a word: who wanted the cluster may have gone, and the place where it would be said with him.
    let output = kind(cluster, "delete").output().context("starting kind")?;
    ensure!(output.status.success(), "kind: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}

/// Imports docker-archive tars on each node.
pub(super) fn import(cluster: &Cluster, archives: &[PathBuf]) -> Result<()> {
    for archive in archives {
        run(Command::new("kind").args(["load", "image-archive", "--name", &kind_name(cluster)]).arg(archive))?;
    }
    Ok(())
}

/// Becomes a program on a node.
pub(super) fn exec(cluster: &Cluster, node: &str, words: &[OsString]) -> Result<()> {
    check_node(cluster, node)?;
    Err(Command::new("docker").args(["exec", "--interactive", node]).args(words).exec()).context("starting docker")
}

/// The file of a node's network namespace.
pub(super) fn netns(cluster: &Cluster, node: &str) -> Result<PathBuf> {
    let container = if node == super::network::CONTROL_PLANE {
        format!("{}-control-plane", kind_name(cluster))
    } else {
        check_node(cluster, node)?;
        node.to_owned()
    };
    let output = Command::new("docker").args(["inspect", "--format", "{{.State.Pid}}", &container]).output()?;
    let pid = String::from_utf8(output.stdout)?;
    Ok(format!("/proc/{}/ns/net", pid.trim()).into())
}

/// Stops a part. The API server is a static pod, which kubelet ends when its manifest is gone.
pub(super) fn stop(cluster: &Cluster, part: &Part) -> Result<()> {
    match part {
        Part::ApiServer => move_api_server(cluster, "manifests", "stopped"),
        Part::Node(node) => run(Command::new("docker").args(["kill", node])),
        Part::Kubelet(node) => on_node(node, &["systemctl", "stop", "kubelet"]),
        Part::Link(node) => run(Command::new("docker").args(["network", "disconnect", "kind", node])),
    }
}

/// Starts a part that was stopped.
pub(super) fn start(cluster: &Cluster, part: &Part) -> Result<()> {
    match part {
        Part::ApiServer => move_api_server(cluster, "stopped", "manifests"),
        Part::Node(node) => run(Command::new("docker").args(["start", node])),
        Part::Kubelet(node) => on_node(node, &["systemctl", "start", "kubelet"]),
        Part::Link(node) => run(Command::new("docker").args(["network", "connect", "kind", node])),
    }
}

fn move_api_server(cluster: &Cluster, from: &str, to: &str) -> Result<()> {
    let node = format!("{}-control-plane", kind_name(cluster));
    on_node(&node, &["mkdir", "-p", "/etc/kubernetes/stopped"])?;
    let file = |directory: &str| format!("/etc/kubernetes/{directory}/kube-apiserver.yaml");
    on_node(&node, &["mv", &file(from), &file(to)])
}

fn on_node(node: &str, words: &[&str]) -> Result<()> {
    run(Command::new("docker").args(["exec", node]).args(words))
}

fn kind(cluster: &Cluster, verb: &str) -> Command {
    let mut command = Command::new("kind");
    command.args([verb, "cluster", "--name", &kind_name(cluster)]);
    command
}

fn kind_name(cluster: &Cluster) -> String {
    format!("culvert-{}", cluster.name)
}

fn check_node(cluster: &Cluster, node: &str) -> Result<()> {
    let nodes = cluster.nodes()?;
    ensure!(nodes.iter().any(|name| name == node), "no node {node}; there are {}", nodes.join(", "));
    Ok(())
}
