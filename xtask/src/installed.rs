//! A cluster with Culvert on it, as this checkout builds it and as its users install it; and the demo on one.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::cluster::{self, Cluster, Guard, Up};
use crate::run::{cargo, root, run};
use crate::{image, launch};

/// The name of the cluster that the demo makes for itself.
const DEMO: &str = "demo";

/// Has a cluster of this name with this binary installed: made as `made` tells, if it is not up. What was installed of an earlier build is
/// replaced.
///
/// # Errors
/// What could not be made or installed.
pub(crate) fn up(name: &str, binary: &Path, values: &[&str], made: Up) -> Result<Cluster> {
    let images = root().join("target/cluster-images");
    std::fs::create_dir_all(&images)?;
    image::make(&image::ImageArgs::of(binary, &images.join("culvert.tar")))?;
    let cluster = Cluster::named(name)?;
    cluster.up(&Up { images: vec![images], ..made })?;
    let mut agents = cluster.kubectl();
    agents.args(["get", "daemonset", "--all-namespaces", "--output=name"]);
    if String::from_utf8_lossy(&agents.output()?.stdout).contains("culvert-agent") {
        run(Command::new(binary).args(["uninstall", "--kubeconfig"]).arg(cluster.kubeconfig()))?;
    }
    run(installation(binary, &cluster.kubeconfig(), values).env(cluster::VARIABLE, name))?;
    Ok(cluster)
}

/// Installs by the command that users have.
pub(crate) fn installation(binary: &Path, kubeconfig: &Path, values: &[&str]) -> Command {
    let mut command = Command::new(binary);
    command.arg("install").arg("--kubeconfig").arg(kubeconfig);
    for value in values {
        command.args(["--set", value]);
    }
    command
}

/// Gives a program of the tests' the cluster, by the environment.
///
/// # Errors
/// When this program does not know its own path.
pub(crate) fn hand_over(cluster: &Cluster, name: &str, command: &mut Command) -> Result<()> {
    command.env("KUBECONFIG", cluster.kubeconfig()).env("CULVERT_KUBECTL", cluster.kubectl_program());
    command.env(cluster::VARIABLE, name).env("CULVERT_XTASK", cluster.xtask_program()?);
    Ok(())
}

/// Shows the main job on a cluster of its own, with a program of the tests', and removes the cluster unless it is to be kept.
///
/// # Errors
/// What could not be made, shown or removed.
pub(crate) fn demo(keep: bool, remove: bool, node_image: Option<String>) -> Result<()> {
    let left = Cluster::named(DEMO)?;
    if remove {
        return left.down();
    }
    let binary = launch::build(false)?;
    let guard = Guard::new(&left)?;
    // One that was kept is begun anew as well: the demo begins with pods outside of the mesh.
    left.down().context("removing what an earlier run left")?;
    let shown = up(DEMO, &binary, &[], Up { node_image, ..Up::two_nodes() }).and_then(|cluster| {
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
        return guard.keep();
    }
    shown.and(guard.remove())
}
