//! `culvert check`: of a cluster, or of the node that this runs on.
//!
//! Enters: arguments. Leaves: findings, each with what mends it, and the exit code 1 when one is an error.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::SystemTime;

use anyhow::Context as _;

use super::cluster::{ClusterArgs, print};
use crate::diagnosis::node::Places;
use crate::diagnosis::{Severity, cluster, node, text, worst};

/// The arguments of `culvert check`.
#[derive(Clone, Debug, clap::Args)]
pub struct CheckArgs {
    #[command(flatten)]
    cluster: ClusterArgs,

    /// Look at this machine instead, which needs no cluster: kernel, cgroups, permissions, ports.
    #[arg(long)]
    node: bool,

    /// Where the container runtime of --node keeps the pods' network namespaces.
    #[arg(long, value_name = "DIR", default_value = "/run/netns", requires = "node")]
    netns_dir: PathBuf,

    /// The root of the cgroup v2 tree of --node [default: found from the mounts].
    #[arg(long, value_name = "PATH", requires = "node")]
    cgroup_root: Option<PathBuf>,

    /// Where the agent of --node pins its programs.
    #[arg(long, value_name = "PATH", default_value = "/sys/fs/bpf/culvert", requires = "node")]
    bpf_dir: PathBuf,

    /// For people, or for programs: a list of findings.
    #[arg(long, value_name = "FORM", default_value = "text")]
    output: Output,
}

/// How findings are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Output {
    /// A line each.
    Text,
    /// JSON.
    Json,
}

/// Checks, and prints what was found.
///
/// # Errors
/// When the cluster cannot be reached.
pub async fn run(args: CheckArgs) -> anyhow::Result<ExitCode> {
    let findings = if args.node {
        let places = Places { netns_dir: args.netns_dir, cgroup_root: args.cgroup_root, bpf_dir: args.bpf_dir };
        tokio::task::block_in_place(|| node::check(&places))
    } else {
        let cluster = args.cluster.connect().await?;
        cluster::check(&cluster, &args.cluster.namespace, SystemTime::now()).await
    };
    match args.output {
        Output::Text => print(&text(&findings))?,
        Output::Json => print(&format!("{}\n", serde_json::to_string_pretty(&findings).context("cannot write JSON")?))?,
    }
    Ok(if worst(&findings) == Severity::Error { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
