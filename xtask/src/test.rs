//! `test`: the suites, in the order of what they rest on.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context as _, Result, bail, ensure};

use crate::cluster::{Cluster, Guard, Up};
use crate::run::{cargo, run as run_program};
use crate::setup::{self, Scope};
use crate::{installed, launch, tidy, vm};

/// The name of the cluster that the tests make for themselves, so that nobody's own is disturbed. What is removed with a cluster is found by its
/// name, and the other suites' control groups are named `culvert-test-` and a number: not `test`.
const CLUSTER: &str = "suite";
/// What they install with. An agent that is told to stop refuses new connections for as long as it drains: a short while says as much as a long
/// one.
const VALUES: &[&str] = &["agent.drainTimeout=2s"];

/// A suite.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Suite {
    /// What needs neither root nor a kernel.
    Unit,
    /// Every eBPF program loads, and the maps are laid out as the agent thinks.
    Ebpf,
    /// Nodes of network namespaces, with real programs and real mutual TLS.
    Node,
    /// Hostile bytes and operators' mistakes against a real agent and controller.
    Hostile,
    /// A real Kubernetes cluster, which is made for it unless one is named.
    Cluster,
    /// The eBPF suite on Debian's kernels 6.1 and 6.12 in virtual machines, and 5.10's refusal; by name only. Names of node tests work, too.
    Vm,
}

impl Suite {
    /// Its test target.
    fn target(self) -> &'static str {
        match self {
            Self::Unit => "unit",
            Self::Ebpf | Self::Vm => "ebpf",
            Self::Node => "node",
            Self::Hostile => "hostile",
            Self::Cluster => "cluster",
        }
    }
}

/// Where the cluster tests run.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct ClusterOptions {
    /// The cluster tests run on the cluster that this names, and make none. Its nodes must have the images.
    #[arg(long)]
    kubeconfig: Option<PathBuf>,
    /// The cluster that is made for the cluster tests has the Kubernetes of this directory, as with `cluster up`.
    #[arg(long, value_name = "DIR", conflicts_with = "kubeconfig")]
    kubernetes: Option<PathBuf>,
    /// The cluster that is made for the cluster tests is kind's, with nodes of this image, as with `cluster up`.
    #[arg(long, value_name = "IMAGE", conflicts_with_all = ["kubeconfig", "kubernetes"])]
    node_image: Option<String>,
    /// Leaves the cluster running that the cluster tests have made; they use it again the next time.
    #[arg(long)]
    keep: bool,
}

/// Runs one suite, or first the project's own rules and then all that are not run by name only.
pub(crate) fn run(suite: Option<Suite>, filter: Option<&str>, options: &ClusterOptions) -> Result<()> {
    let all = || vec![Suite::Unit, Suite::Ebpf, Suite::Node, Suite::Hostile, Suite::Cluster];
    let suites = suite.map_or_else(all, |suite| vec![suite]);
    if suite.is_none() {
        tidy::all()?;
        run_check_of_format()?;
    }
    let mut failed = Vec::new();
    for suite in suites {
        let started = Instant::now();
        let outcome = match suite {
            Suite::Cluster => cluster(filter, options),
            Suite::Vm => vm::test(filter),
            Suite::Unit | Suite::Ebpf | Suite::Node | Suite::Hostile => one(suite, filter),
        };
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
    run_program(cargo().args(["fmt", "--all", "--check"]))
}

fn one(suite: Suite, filter: Option<&str>) -> Result<()> {
    let mut command = cargo();
    command.arg("test");
    match suite {
        Suite::Unit => {
            setup::ensure(Scope::Build)?;
            // The tests' own crate is no default member; what its programs reckon with is tested, too.
            run_program(cargo().args(["test", "--package", "culvert-tests", "--lib", "--bins"]).args(filter))?;
            command.env("CULVERT_REQUIRE_EBPF", "1");
        }
        Suite::Ebpf | Suite::Node | Suite::Hostile | Suite::Cluster | Suite::Vm => {
            if !setup::is_root() {
                bail!("network namespaces and eBPF need root");
            }
            setup::ensure(Scope::Test)?;
            command.env("CULVERT_BIN", launch::build(false)?);
            command.args(["--package", "culvert-tests", "--test", suite.target()]);
        }
    }
    command.args(filter);
    if suite != Suite::Unit {
        // Each test has the machine to itself: they start agents, and some of them measure time.
        command.args(["--", "--test-threads=1"]);
    }
    run_program(&mut command)
}

/// Installs Culvert on the cluster that is named, or on one of the tests' own, and runs the cluster tests there.
fn cluster(filter: Option<&str>, options: &ClusterOptions) -> Result<()> {
    let binary = launch::build(false)?;
    let tests = ["test", "--package", "culvert-tests", "--test", Suite::Cluster.target()];
    // Before there is a cluster, which would run beside the compiler.
    run_program(cargo().args(tests).arg("--no-run"))?;
    let mut command = cargo();
    command.args(tests).args(filter).args(["--", "--test-threads=1"]).env("CULVERT_BIN", &binary);
    if let Some(kubeconfig) = &options.kubeconfig {
        let kubeconfig = std::fs::canonicalize(kubeconfig).with_context(|| format!("looking for {}", kubeconfig.display()))?;
        run_program(&mut installed::installation(&binary, &kubeconfig, VALUES))?;
        return run_program(command.env("KUBECONFIG", kubeconfig));
    }
    let guard = Guard::new(&Cluster::named(CLUSTER)?)?;
    let made = Up { kubernetes: options.kubernetes.clone(), node_image: options.node_image.clone(), ..Up::two_nodes() };
    let outcome = installed::up(CLUSTER, &binary, VALUES, made).and_then(|cluster| {
        installed::hand_over(&cluster, CLUSTER, &mut command)?;
        run_program(&mut command)
    });
    let left = if options.keep { guard.keep() } else { guard.remove() };
    outcome.and(left)
}
