//! `build`, `demo` and `bench`: the binary, and what is run with it.

use std::path::{Path, PathBuf};
use std::process::Command;

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

/// Shows the main job.
pub(crate) fn demo(keep: bool) -> Result<()> {
    let mut command = with_harness("demo")?;
    if keep {
        command.arg("--keep");
    }
    run(&mut command)
}

/// Measures.
pub(crate) fn bench(json: Option<PathBuf>, quick: bool) -> Result<()> {
    let mut command = with_harness("bench")?;
    if let Some(json) = json {
        command.arg("--json").arg(std::path::absolute(json)?);
    }
    if quick {
        command.arg("--quick");
    }
    run(&mut command)
}

/// A program of the tests' that drives the optimised binary.
fn with_harness(program: &str) -> Result<Command> {
    ensure!(setup::is_root(), "network namespaces and eBPF need root");
    setup::ensure(Scope::Test)?;
    let binary = build(true)?;
    let mut command = cargo();
    command.args(["run", "--quiet", "--release", "--package", "culvert-tests", "--bin", program, "--"]);
    command.env("CULVERT_BIN", Path::new(&binary));
    Ok(command)
}
