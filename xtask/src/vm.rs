//! `test vm`: the programs and a captured connection on the distribution's kernels, each in a virtual machine of its own, and what a
//! kernel below the floor is told.
//!
//! A guest has this machine's files, read-only, and runs what was built here: nothing is installed in it. Where the processor gives
//! no virtualisation it is emulated.

mod guest;
mod kernel;

use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context as _, Result, bail, ensure};

use self::guest::Guest;
use crate::launch;
use crate::run::cargo;
use crate::setup::{self, Scope};

/// What a kernel must do.
#[derive(Clone, Copy, Debug)]
enum Expected {
    /// Pass the tests.
    Passes,
    /// Be refused, by the agent and by `culvert check`, for want of this.
    Lacks(&'static str),
}

/// A kernel of the distribution's.
#[derive(Clone, Copy, Debug)]
struct Case {
    /// The first two numbers of its version.
    series: &'static str,
    /// Debian's suites that have it, the best first.
    suites: &'static [&'static str],
    expected: Expected,
}

const CASES: [Case; 3] = [
    Case {
        series: "5.10",
        suites: &["bullseye"],
        expected: Expected::Lacks("network namespaces' cookies of sockets (Linux 5.14 and newer can have them)"),
    },
    Case { series: "6.1", suites: &["bookworm"], expected: Expected::Passes },
    Case { series: "6.12", suites: &["trixie", "bookworm-backports"], expected: Expected::Passes },
];

/// Runs the tests of eBPF on each kernel, or those of them and of the nodes whose names contain `filter`.
pub(crate) fn test(filter: Option<&str>) -> Result<()> {
    ensure!(cfg!(target_arch = "x86_64"), "the virtual machines are made for x86-64, which this machine is not");
    ensure!(setup::is_root(), "the tests run as root in the virtual machines, with this machine's files: that needs root here");
    setup::ensure(Scope::Vm)?;
    let binary = launch::build(false)?;
    let tests = test_programs(if filter.is_some() { &["ebpf", "node"] } else { &["ebpf"] })?;
    let accelerated = guest::has_virtualisation();
    if !accelerated {
        eprintln!("this machine has no virtualisation: the kernels are emulated, which takes some minutes each");
    }
    let mut failed = Vec::new();
    for case in CASES {
        if let Err(error) = one(case, &binary, &tests, filter, accelerated) {
            eprintln!("Linux {}: {error:#}", case.series);
            failed.push(case.series);
        }
    }
    ensure!(failed.is_empty(), "failed on Linux {}", failed.join(", "));
    Ok(())
}

fn one(case: Case, binary: &Path, tests: &[PathBuf], filter: Option<&str>, accelerated: bool) -> Result<()> {
    let kernel = kernel::get(case.series, case.suites)?;
    let guest = Guest { kernel: &kernel, binary, accelerated };
    match case.expected {
        Expected::Passes => {
            let tests = tests.iter().map(|test| {
                let test = guest.path(test)?;
                Ok(format!("{test} --test-threads=1 {}", filter.map_or_else(String::new, quoted)))
            });
            let ended = guest.run(&tests.collect::<Result<Vec<_>>>()?.join(" && "))?;
            ensure!(ended.status == 0, "the tests failed; the guest said\n{}", ended.output);
            ensure!(passed(&ended.output) > 0, "no test has run; the guest said\n{}", ended.output);
            eprintln!("Linux {}:\n{}", kernel.release, ended.output.trim());
        }
        Expected::Lacks(feature) => {
            let ended = guest.run(REFUSED)?;
            let by_agent = format!("this kernel, Linux {}, has no {feature}", kernel.release);
            let name = feature.split(" (").next().unwrap_or(feature);
            for told in [&by_agent, &format!("the kernel has no {name}"), "check: 1", "agent: 1"] {
                if !ended.output.contains(told) {
                    bail!("a kernel below the floor is not told `{told}`; the guest said\n{}", ended.output);
                }
            }
            eprintln!("Linux {} is refused as it should be:\n{}", kernel.release, ended.output.trim());
        }
    }
    Ok(())
}

/// What an operator would see: the check of a node, and an agent that must end by itself before it needs a controller.
const REFUSED: &str = "$CULVERT_BIN check --node; echo check: $?\n\
    timeout 120 $CULVERT_BIN agent --node old --controller https://127.0.0.1:15012 --root-cert /run/none --token-file /run/none\n\
    echo agent: $?";

fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// How many tests have passed by what their programs print.
fn passed(output: &str) -> u32 {
    let words = output.lines().filter_map(|line| line.strip_prefix("test result: ok. ")?.split(' ').next());
    words.filter_map(|number| number.parse::<u32>().ok()).sum()
}

/// Builds test targets, and says where their programs are.
fn test_programs(targets: &[&str]) -> Result<Vec<PathBuf>> {
    let mut command = cargo();
    command.args(["test", "--package", "culvert-tests", "--no-run", "--message-format=json-render-diagnostics"]);
    command.args(targets.iter().flat_map(|target| ["--test", target])).stderr(Stdio::inherit());
    let output = command.output().context("building the tests")?;
    ensure!(output.status.success(), "building the tests: {}", output.status);
    let mut programs = Vec::new();
    for line in output.stdout.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        let message: serde_json::Value = serde_json::from_slice(line).context("reading what cargo says")?;
        let is_test = message["profile"]["test"].as_bool().unwrap_or(false);
        programs.extend(message["executable"].as_str().filter(|_| is_test).map(PathBuf::from));
    }
    ensure!(programs.len() == targets.len(), "cargo built {} programs of {} test targets", programs.len(), targets.len());
    Ok(programs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_without_a_test_that_the_filter_names_have_passed_nothing() {
        let result = |passed| format!("\nrunning {passed} tests\n\ntest result: ok. {passed} passed; 0 failed; 0 ignored\n");
        assert_eq!(passed(&(result(0) + &result(0))), 0);
        assert_eq!(passed(&(result(0) + &result(12))), 12);
        assert_eq!(passed("test result: FAILED. 3 passed; 1 failed\n"), 0);
    }

    #[test]
    fn a_filter_reaches_the_guests_shell_as_one_word() {
        assert_eq!(quoted("every; pro'gram"), r"'every; pro'\''gram'");
    }
}
