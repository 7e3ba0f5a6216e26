//! `gen`: files that are made from others, and the check that they are up to date.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};

use crate::run::{cargo, root};

/// The chart as plain manifests, for those who use no Helm.
const MANIFESTS: &str = "deploy/manifests/culvert.yaml";
const HEAD: &str = "\
# Culvert, as the chart in deploy/helm renders with its defaults: `kubectl apply -f` this.
# Made by `cargo xtask gen`; change the chart instead. The kinds that policies are written in, for clusters without Istio, are in
# deploy/helm/culvert/crds. Clusters before 1.21 have no policy/v1: `culvert install` finds out what they have.
";

/// Writes all files.
pub(crate) fn write() -> Result<()> {
    for (path, text) in files()? {
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

/// Fails when a file is not what would be written.
pub(crate) fn check() -> Result<()> {
    for (path, text) in files()? {
        let there = fs::read_to_string(&path).unwrap_or_default();
        ensure!(there == text, "{} is not what it is made from; run `cargo xtask gen`", path.display());
    }
    Ok(())
}

fn files() -> Result<Vec<(PathBuf, String)>> {
    let mut command = cargo();
    command.args(["run", "--quiet", "--package", "culvert", "--", "install", "--dry-run", "--skip-crds"]);
    let output = command.output().context("starting cargo")?;
    ensure!(output.status.success(), "rendering the chart: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).context("the chart renders to text")?;
    Ok(vec![(root().join(MANIFESTS), format!("{HEAD}{text}"))])
}
