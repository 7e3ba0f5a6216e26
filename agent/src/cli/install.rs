//! `culvert install`: the arguments, and what the operator reads.
//!
//! Enters: arguments. Leaves: an installation on a cluster, or its objects on the standard output.

use std::fs;
use std::io::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;

use super::cluster::{ClusterArgs, print};
use crate::config::parse_duration;
use crate::installation::chart::{self, Target};
use crate::installation::install::{Change, Installation, Step, install};
use crate::installation::values::Values;

/// The arguments of `culvert install`.
#[derive(Clone, Debug, clap::Args)]
pub struct InstallArgs {
    #[command(flatten)]
    cluster: ClusterArgs,

    /// A file of values, as of the Helm chart; later ones win.
    #[arg(long, value_name = "FILE")]
    values: Vec<PathBuf>,

    /// One value, such as controller.replicas=3. The value is read as YAML; wins over files.
    #[arg(long, value_name = "PATH=VALUE")]
    set: Vec<String>,

    /// Leave the kinds PeerAuthentication and AuthorizationPolicy alone, even if the cluster has none.
    #[arg(long)]
    skip_crds: bool,

    /// Print what would be applied, for a cluster of a current release, and ask no cluster.
    #[arg(long)]
    dry_run: bool,

    /// How long the controller, and then the agents, may take to be ready.
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = parse_duration)]
    timeout: Duration,
}

/// Installs, or prints.
///
/// # Errors
/// Values that can't be, and what kept the installation from coming about.
pub async fn run(args: &InstallArgs) -> anyhow::Result<()> {
    let values = values(&args.values, &args.set)?;
    if args.dry_run {
        let rendered = chart::render(&values, &Target::unasked(&args.cluster.namespace))?;
        let definitions = if args.skip_crds { Vec::new() } else { chart::definitions()? };
        let text = chart::manifest(definitions.iter().chain(&rendered));
        return std::io::stdout().write_all(text.as_bytes()).context("cannot print");
    }
    let cluster = args.cluster.connect().await?;
    let installation =
        Installation { values, namespace: args.cluster.namespace.clone(), definitions: !args.skip_crds, limit: args.timeout };
    let mut tell = Told::default();
    install(&cluster, &installation, |step| tell.step(&step)).await?;
    print(&format!(
        "\nCulvert {} runs in {}: {} objects made, {} changed, {} as they were.\n\
         No pod has joined the mesh by this. A namespace joins, its running pods included, with\n\n\
         \x20   kubectl label namespace NAMESPACE culvert.dev/mesh=enabled\n\n\
         and `culvert check` says whether all is well.\n",
        env!("CARGO_PKG_VERSION"),
        args.cluster.namespace,
        tell.made,
        tell.changed,
        tell.unchanged
    ))
}

/// The values of files and `--set`. The namespace is made unless they say otherwise.
fn values(files: &[PathBuf], sets: &[String]) -> anyhow::Result<Values> {
    let mut texts = vec!["namespace: {create: true}".to_owned()];
    for file in files {
        texts.push(fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?);
    }
    Ok(Values::merge(&texts, sets)?)
}

/// What the operator was told.
#[derive(Debug, Default)]
struct Told {
    made: usize,
    changed: usize,
    unchanged: usize,
}

impl Told {
    fn step(&mut self, step: &Step) {
        let line = match step {
            Step::Object(object, change) => {
                let word = match change {
                    Change::Made => {
                        self.made += 1;
                        "made"
                    }
                    Change::Changed => {
                        self.changed += 1;
                        "changed"
                    }
                    Change::Unchanged | Change::Kept => {
                        self.unchanged += 1;
                        return;
                    }
                    Change::Removed => "removed",
                };
                format!("{word} {object}")
            }
            Step::Rollout(workload, progress) => {
                let wanted = progress.wanted.map_or_else(|| "?".to_owned(), |wanted| wanted.to_string());
                format!("{workload}: {} of {wanted} ready", progress.available)
            }
        };
        // Whoever no longer reads still wants the work done.
        let _reader_is_gone = print(&format!("{line}\n"));
    }
}
