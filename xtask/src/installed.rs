//! A cluster with Culvert on it, as this checkout builds it and as its users install it; and the demo on one.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::cluster::{Cluster, Up};
use crate::run::{cargo, root, run};
use crate::{image, launch};

/// The name of the cluster that the demo makes for itself.
const DEMO: &str = "demo";

/// Has a cluster of this name with this binary installed: made, if it is not up. What was installed of an earlier build is replaced.
///
/// # Errors
/// What could not be made or installed.
pub(crate) fn up(name: &str, binary: &Path, values: &[&str]) -> Result<Cluster> {
    let images = root().join("target/cluster-images");
    std::fs::create_dir_all(&images)?;
    image::make(&image::ImageArgs::of(binary, &images.join("culvert.tar")))?;
    let cluster = Cluster::named(name)?;
    cluster.up(&Up { images: vec![images], ..Up::two_nodes() })?;
    let mut agents = Command::new(cluster.kubectl_program()?);
    agents.arg("--kubeconfig").arg(cluster.kubeconfig()).args(["get", "daemonset", "--all-namespaces", "--output=name"]);
    if String::from_utf8_lossy(&agents.output()?.stdout).contains("culvert-agent") {
        run(Command::new(binary).args(["uninstall", "--kubeconfig"]).arg(cluster.kubeconfig()))?;
    }
    install(binary, &cluster.kubeconfig(), values)?;
    Ok(cluster)
}

/// Installs by the command that users have.
///
/// # Errors
/// What kept it from being installed.
pub(crate) fn install(binary: &Path, kubeconfig: &Path, values: &[&str]) -> Result<()> {
    let mut command = Command::new(binary);
    command.arg("install").arg("--kubeconfig").arg(kubeconfig);
    for value in values {
        command.args(["--set", value]);
    }
    run(&mut command)
}

/// Gives a program of the tests' the cluster, by the environment.
///
/// # Errors
/// When this program does not know its own path, or there is no kubectl.
pub(crate) fn hand_over(cluster: &Cluster, name: &str, command: &mut Command) -> Result<()> {
    command.env("KUBECONFIG", cluster.kubeconfig()).env("CULVERT_KUBECTL", cluster.kubectl_program()?);
    command.env("CULVERT_CLUSTER", name).env("CULVERT_XTASK", own_program()?);
    Ok(())
}

fn own_program() -> Result<PathBuf> {
    std::env::current_exe().context("looking for this program")
}

/// Shows the main job on a cluster of its own, with a program of the tests', and removes the cluster unless it is to be kept.
///
/// # Errors
/// What could not be made, shown or removed.
pub(crate) fn demo(keep: bool, remove: bool) -> Result<()> {
    let left = Cluster::named(DEMO)?;
    if remove {
        return left.down();
    }
    let binary = launch::build(false)?;
    // Of a run that was interrupted. One that was kept is begun anew as well: the demo begins with pods outside of the mesh.
    left.down().context("removing what an earlier run left")?;
    let shown = up(DEMO, &binary, &[]).and_then(|cluster| {
        let mut command = cargo();
        command
            .args(["run", "--quiet", "--package", "culvert-tests", "--bin", "demo", "--", "--cluster"])
            .env("CULVERT_BIN", &binary);
        if keep {
            command.arg("--keep");
        }
        hand_over(&cluster, DEMO, &mut command)?;
        run(&mut command)
    });
    if keep && shown.is_ok() {
        return Ok(());
    }
    shown.and(left.down())
}
