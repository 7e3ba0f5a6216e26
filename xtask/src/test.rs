//! `test`: the suites, in the order of what they rest on.

use std::time::Instant;

use anyhow::{Result, bail, ensure};

use crate::run::cargo;
use crate::setup::{self, Scope};
use crate::{launch, tidy};

/// A suite.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Suite {
    /// What needs neither root nor a kernel.
    Unit,
    /// Every eBPF program loads, and the maps are laid out as the agent thinks.
    Ebpf,
    /// Nodes of network namespaces, with real programs and real mutual TLS.
    Node,
}

/// Runs one suite, or first the project's own rules and then all of them.
pub(crate) fn run(suite: Option<Suite>, filter: Option<&str>) -> Result<()> {
    let suites = suite.map_or_else(|| vec![Suite::Unit, Suite::Ebpf, Suite::Node], |suite| vec![suite]);
    if suite.is_none() {
        tidy::all()?;
        run_check_of_format()?;
    }
    let mut failed = Vec::new();
    for suite in suites {
        let started = Instant::now();
        let outcome = one(suite, filter);
        let seconds = started.elapsed().as_secs();
        match outcome {
            Ok(()) => eprintln!("{suite:?} tests passed in {seconds} s"),
            Err(error) => {
                eprintln!("{suite:?} tests failed after {seconds} s: {error:#}");
                failed.push(format!("{suite:?}"));
            }
        }
    }
    ensure!(failed.is_empty(), "failed: {}", failed.join(", "));
    Ok(())
}

fn run_check_of_format() -> Result<()> {
    crate::run::run(cargo().args(["fmt", "--all", "--check"]))
}

fn one(suite: Suite, filter: Option<&str>) -> Result<()> {
    let mut command = cargo();
    command.arg("test");
    match suite {
        Suite::Unit => {
            setup::ensure(Scope::Build)?;
            // The tests' own crate is no default member; what its programs reckon with is tested, too.
            crate::run::run(cargo().args(["test", "--package", "culvert-tests", "--lib", "--bins"]).args(filter))?;
            command.env("CULVERT_REQUIRE_EBPF", "1");
        }
        Suite::Ebpf | Suite::Node => {
            if !setup::is_root() {
                bail!("network namespaces and eBPF need root");
            }
            setup::ensure(Scope::Test)?;
            command.env("CULVERT_BIN", launch::build(false)?);
            command.args(["--package", "culvert-tests", "--test", if suite == Suite::Ebpf { "ebpf" } else { "node" }]);
        }
    }
    command.args(filter);
    if suite != Suite::Unit {
        // Each test has the machine to itself: they start agents, and some of them measure time.
        command.args(["--", "--test-threads=1"]);
    }
    crate::run::run(&mut command)
}
