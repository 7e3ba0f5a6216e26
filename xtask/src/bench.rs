//! `bench`: what Culvert costs, measured with the optimised binary by a program of the tests' that is optimised, too.

use std::path::PathBuf;

use anyhow::{Result, ensure};

use crate::run::{cargo, run};
use crate::setup::{self, Scope};
use crate::{cluster, launch};

/// The row that runs a real API server.
const API_ROW: &str = "api-scale";

/// What is measured, and where it goes.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Where the results go, with every value of every round.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Where a picture of the ratios goes.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Another proxy to be measured beside: a program that starts and stops it (`FILE start`, `FILE stop`) for the pods that its
    /// environment names.
    #[arg(long, value_name = "FILE")]
    other: Option<PathBuf>,
    /// Fewer and shorter rounds: under 3 minutes instead of under 15.
    #[arg(long)]
    quick: bool,
    /// Only rows whose names begin so. `api-scale` is measured only if it is asked for: it builds Kubernetes first, once a machine.
    #[arg(long, value_name = "ROW", num_args = 1..)]
    only: Vec<String>,
}

/// Builds both programs and measures.
pub(crate) fn bench(arguments: &Arguments) -> Result<()> {
    ensure!(setup::is_root(), "network namespaces and eBPF need root");
    setup::ensure(Scope::Bench)?;
    let kubernetes = arguments.only.iter().any(|row| API_ROW.starts_with(row.as_str())).then(cluster::programs).transpose()?;
    let binary = launch::build(true)?;
    let mut command = cargo();
    command.args(["run", "--quiet", "--release", "--package", "culvert-tests", "--bin", "bench", "--"]);
    command.env("CULVERT_BIN", binary);
    if let Some(programs) = kubernetes {
        command.env("CULVERT_KUBERNETES", programs);
    }
    for (option, file) in [("--json", &arguments.json), ("--svg", &arguments.svg), ("--other", &arguments.other)] {
        if let Some(file) = file {
            // The program runs elsewhere: in the workspace's directory.
            command.arg(option).arg(std::path::absolute(file)?);
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
