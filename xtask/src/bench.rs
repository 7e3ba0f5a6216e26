//! `bench`: what Culvert costs, measured with the optimised binary by a program of the tests' that is optimised, too.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};

use crate::launch;
use crate::run::{cargo, run};
use crate::setup::{self, Scope};

/// What is measured, and where it goes.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Where the results go, with every value of every round.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Fewer and shorter rounds: under 3 minutes instead of under 15.
    #[arg(long)]
    quick: bool,
    /// Only rows whose names begin so.
    #[arg(long, value_name = "ROW", num_args = 1..)]
    only: Vec<String>,
}

/// Builds both programs and measures.
pub(crate) fn bench(arguments: &Arguments) -> Result<()> {
    ensure!(setup::is_root(), "network namespaces and eBPF need root");
    setup::ensure(Scope::Bench)?;
    let binary = launch::build(true)?;
    let mut command = cargo();
    command.args(["run", "--quiet", "--release", "--package", "culvert-tests", "--bin", "bench", "--"]);
    command.env("CULVERT_BIN", binary);
    for (option, file) in [("--json", &arguments.json)] {
        if let Some(file) = file {
            command.arg(option).arg(from_here(file)?);
        }
    }
    if arguments.quick {
        command.arg("--quick");
    }
    if !arguments.only.is_empty() {
        command.arg("--only").args(&arguments.only);
    }
    run(&mut command)
}

/// The program runs elsewhere: in the workspace's directory.
fn from_here(file: &Path) -> Result<PathBuf> {
    Ok(std::path::absolute(file)?)
}
