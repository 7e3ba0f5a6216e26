//! `build` and `demo`: the binary, and what is shown with it.

use std::path::PathBuf;

use anyhow::{Result, ensure};

use crate::run::{cargo, root, run};
use crate::setup::{self, Scope};

/// Builds the binary with its eBPF programs in it, and says where it is.
pub(crate) fn build(release: bool) -> Result<PathBuf> {
    setup::ensure(Scope::Build)?;
    let mut command = cargo();
    command.args(["build", "--package", "culvert"]).env("CULVERT_REQUIRE_EBPF", "1");
    if release {
        command.arg("--release");
    }
    run(&mut command)?;
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    Ok(target.join(if release { "release/culvert" } else { "debug/culvert" }))
}

/// Shows the main job, with a program of the tests' that drives the binary.
pub(crate) fn demo(keep: bool, remove: bool) -> Result<()> {
    ensure!(setup::is_root(), "network namespaces and eBPF need root");
    setup::ensure(Scope::Test)?;
    let binary = build(false)?;
    let mut command = cargo();
    command.args(["run", "--quiet", "--package", "culvert-tests", "--bin", "demo", "--"]).env("CULVERT_BIN", binary);
    if keep {
        command.arg("--keep");
    }
    if remove {
        command.arg("--remove");
    }
    run(&mut command)
}
