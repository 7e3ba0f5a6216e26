//! `culvert uninstall`: from a cluster, or from the node that this runs on.
//!
//! Enters: arguments. Leaves: nothing of Culvert's, or a list of what is left and why.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;

use super::cluster::{ClusterArgs, print};
use crate::capture;
use crate::config::parse_duration;
use crate::discovery;
use crate::installation::install::Step;
use crate::installation::uninstall::{Removal, uninstall};

/// The arguments of `culvert uninstall`.
#[derive(Clone, Debug, clap::Args)]
pub struct UninstallArgs {
    #[command(flatten)]
    cluster: ClusterArgs,

    /// Clean the kernel and the disk of this machine, the node of that name, and ask no cluster. Its agent must have ended.
    #[arg(long, value_name = "NAME")]
    node: Option<String>,

    /// Where the agent of --node pinned its programs.
    #[arg(long, value_name = "PATH", default_value = "/sys/fs/bpf/culvert", requires = "node")]
    bpf_dir: PathBuf,

    /// Where the container runtime of --node keeps the pods' network namespaces.
    #[arg(long, value_name = "DIR", default_value = "/run/netns", requires = "node")]
    netns_dir: PathBuf,

    /// Where the agent of --node kept what its controller told.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/culvert", requires = "node")]
    state_dir: PathBuf,

    /// How long pods may take to end, and nodes to be cleaned.
    #[arg(long, value_name = "TIME", default_value = "2m", value_parser = parse_duration)]
    timeout: Duration,
}

/// Uninstalls. The exit code is 1 when something is left.
///
/// # Errors
/// When the cluster cannot be reached, or the node not be cleaned.
pub async fn run(args: &UninstallArgs) -> anyhow::Result<ExitCode> {
    if let Some(node) = &args.node {
        capture::remove(&args.bpf_dir, node)?;
        let kept = || format!("removing what was kept in {}", args.state_dir.display());
        discovery::forget(&args.state_dir, node).with_context(kept)?;
        print(&format!("nothing of Culvert's is left in the kernel of {node}, and nothing of what its agent kept\n"))?;
        return Ok(ExitCode::SUCCESS);
    }
    let cluster = args.cluster.connect().await?;
    let removal = Removal { namespace: args.cluster.namespace.clone(), limit: args.timeout };
    let outcome = uninstall(&cluster, &removal, |step| {
        if let Step::Object(object, _) = step {
            // Whoever no longer reads still wants the work done.
            let _reader_is_gone = print(&format!("removed {object}\n"));
        }
    })
    .await?;
    for kept in &outcome.kept {
        print(&format!("kept {kept}\n"))?;
    }
    if outcome.failures.is_empty() {
        print("Culvert is uninstalled: nothing of it is left on the nodes or in the API but what is named above.\n")?;
        return Ok(ExitCode::SUCCESS);
    }
    for failure in &outcome.failures {
        eprintln!("culvert: {failure}");
    }
    Ok(ExitCode::FAILURE)
}
