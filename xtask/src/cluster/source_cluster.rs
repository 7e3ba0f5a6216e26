//! A cluster of namespaces, as a whole: made, removed, and disturbed in parts.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use nix::mount::{MntFlags, umount2};

use super::node::{self, Node};
use super::runtime::Runtime;
use super::{Cluster, Maker, Part, Up, control_plane, images, kubernetes, network, pki, processes};
use crate::setup::{self, Scope};

/// Makes the cluster, and waits until each node is ready.
pub(super) fn up(cluster: &Cluster, up: &Up) -> Result<()> {
    setup::ensure(Scope::Cluster)?;
    let given = up.given_programs()?;
    let programs = match &given {
        Some(directory) => {
            if Runtime::among(directory) == Runtime::CriO {
                setup::ensure(Scope::CriO)?;
            }
            kubernetes::given(directory)?.to_owned()
        }
        None => kubernetes::programs(cluster)?,
    };
    let nodes = Node::first(cluster, up.nodes);
    let names: Vec<String> = nodes.iter().map(Node::name).collect();
    fs::write(cluster.path("nodes"), names.join("\n"))?;
    fs::write(cluster.path("maker"), Maker::Source.word())?;
    if let Some(directory) = given {
        fs::write(cluster.path("kubernetes"), directory.as_os_str().as_encoded_bytes())?;
    }
    copy_programs(&programs, &cluster.path("bin"))?;
    let mut archives = images::own(&cluster.path("images"))?;
    for directory in &up.images {
        archives.extend(images::archives(directory)?);
    }
    pki::make(cluster)?;
    network::make(cluster)?;
    for node in &nodes {
        pki::make_node(node)?;
        network::add_node(node, &nodes)?;
    }
    // The nodes start while the control plane does: most of the time goes into programs that read themselves from the disk.
    thread::scope(|scope| {
        let starting: Vec<_> = nodes.iter().map(|node| (node.name(), scope.spawn(|| node.start(&archives)))).collect();
        control_plane::start(cluster, &nodes)?;
        for (name, thread) in starting {
            thread.join().map_err(|_panic| anyhow!("starting {name} panicked"))?.with_context(|| format!("starting {name}"))?;
        }
        anyhow::Ok(())
    })?;
    wait_until_ready(cluster)?;
    fs::copy(control_plane::local_kubeconfig(cluster), cluster.kubeconfig())?;
    Ok(())
}

/// Removes the cluster, or what is left of one. All steps are tried; the failures are in the error.
pub(super) fn down(cluster: &Cluster) -> Result<()> {
    let mut failures = Vec::new();
    let mut attempt = |result: Result<()>| failures.extend(result.err().map(|error| format!("{error:#}")));
    let namespaces = network::namespaces(cluster);
    attempt(processes::end(&format!("cluster {}", cluster.name), || processes::running(&namespaces)));
    for namespace in &namespaces {
        attempt(network::remove(namespace));
    }
    attempt(node::remove_cgroups(&cluster.prefix()));
    for point in mounts_below(&cluster.dir()) {
        attempt(umount2(&point, MntFlags::MNT_DETACH).with_context(|| format!("unmounting {}", point.display())));
    }
    if cluster.dir().exists() {
        attempt(fs::remove_dir_all(cluster.dir()).with_context(|| format!("removing {}", cluster.dir().display())));
    }
    ensure!(failures.is_empty(), "{}", failures.join("; "));
    Ok(())
}

/// Stops a part.
pub(super) fn stop(cluster: &Cluster, part: &Part) -> Result<()> {
    match part {
        Part::ApiServer => control_plane::stop_api_server(cluster),
        Part::Node(name) => Node::named(cluster, name)?.cut_power(),
        Part::Kubelet(name) => Node::named(cluster, name)?.stop_program("kubelet"),
        Part::Link(name) => network::set_link(&Node::named(cluster, name)?, "down"),
    }
}

/// Starts a part that was stopped.
pub(super) fn start(cluster: &Cluster, part: &Part) -> Result<()> {
    match part {
        Part::ApiServer => control_plane::start_api_server(cluster),
        Part::Node(name) => {
            let nodes = cluster.nodes()?;
            let nodes: Vec<Node<'_>> = nodes.iter().map(|name| Node::named(cluster, name)).collect::<Result<_>>()?;
            let node = Node::named(cluster, name)?;
            if node.init().is_some() {
                bail!("{name} runs");
            }
            network::add_node(&node, &nodes)?;
            node.start(&[])
        }
        Part::Kubelet(name) => Node::named(cluster, name)?.start_program("kubelet", processes::Ready::Started),
        Part::Link(name) => network::set_link(&Node::named(cluster, name)?, "up"),
    }
}

/// Says which programs run, and what memory they have.
pub(super) fn status(cluster: &Cluster) {
    let namespaces = network::namespaces(cluster);
    for namespace in &namespaces {
        let mut running = processes::running(std::slice::from_ref(namespace));
        running.retain(|process| process.memory() > 1 << 20);
        running.sort_by_key(|process| std::cmp::Reverse(process.memory()));
        let programs: Vec<_> = running.iter().map(|process| format!("{} {} MiB", process.name, process.memory() >> 20)).collect();
        println!("  {}: {}", namespace.trim_start_matches(&cluster.prefix()), programs.join(", "));
    }
}

/// The programs go into the cluster's directory, which each node sees, whatever is mounted where on this machine.
fn copy_programs(from: &Path, to: &Path) -> Result<()> {
    let status = Command::new("cp").arg("--archive").arg(from.join(".")).arg(to).status().context("starting cp")?;
    ensure!(status.success(), "copying {} failed", from.display());
    Ok(())
}

fn wait_until_ready(cluster: &Cluster) -> Result<()> {
    let mut command = control_plane::kubectl(cluster);
    command.args(["wait", "--for=condition=Ready", "node", "--all", "--timeout=120s"]);
    ensure!(command.stdout(Stdio::null()).status()?.success(), "not all nodes get ready");
    // Pods cannot be made before their namespace has its account, which a controller makes.
    let mut command = control_plane::kubectl(cluster);
    command.args(["--namespace", "default", "get", "serviceaccounts", "--watch", "--output", "name"]);
    let mut watch = command.stdout(Stdio::piped()).spawn()?;
    let mut line = String::new();
    BufReader::new(watch.stdout.take().context("a piped output")?).read_line(&mut line)?;
    watch.kill()?;
    watch.wait()?;
    ensure!(!line.is_empty(), "the namespace `default` gets no service account");
    Ok(())
}

/// The deepest first.
fn mounts_below(directory: &Path) -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let points = table.lines().filter_map(|line| line.split(' ').nth(1)).map(PathBuf::from);
    let mut below: Vec<PathBuf> = points.filter(|point| point.starts_with(directory)).collect();
    below.sort();
    below.reverse();
    below
}
