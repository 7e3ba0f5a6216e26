//! `culvert ca`: the operator's steps on the mesh's authority.
//!
//! Enters: arguments, and the Secret in the API. Leaves: the Secret after the step, and what comes next in words.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use clap::Subcommand;

use crate::config::parse_duration;
use crate::controller::kubernetes::connect;
use crate::controller::kubernetes::rotate::{self, RotationStep};
use crate::model::TrustDomain;

/// The namespace that Culvert is installed in by default.
pub(super) const SYSTEM_NAMESPACE: &str = "culvert-system";
/// The default of `--sign-after`.
const SIGN_AFTER: &str = "10m";

/// The arguments of `culvert ca`.
#[derive(Clone, Debug, clap::Args)]
pub struct CaArgs {
    #[command(subcommand)]
    step: Step,
}

#[derive(Clone, Debug, Subcommand)]
enum Step {
    /// Exchanges the mesh's own root: a new one is published beside the old one, signs after a while, and replaces it in the end.
    Rotate(RotateArgs),
}

#[derive(Clone, Debug, clap::Args)]
struct RotateArgs {
    /// Finish the rotation that is under way: the old root is forgotten.
    #[arg(long)]
    finish: bool,

    /// Finish even though certificates of the old root may be valid: connections that rest on them fail until they are renewed.
    #[arg(long, requires = "finish")]
    danger_finish_now: bool,

    /// How long agents have for taking the new root before it signs.
    #[arg(long, value_name = "TIME", default_value = SIGN_AFTER, value_parser = parse_duration)]
    sign_after: Duration,

    /// The longest life of a workload's certificate, as the controller was told.
    #[arg(long, value_name = "TIME", default_value = "24h", value_parser = parse_duration)]
    cert_ttl: Duration,

    /// The mesh's trust domain, as the controller was told.
    #[arg(long, value_name = "NAME", default_value = "cluster.local")]
    trust_domain: TrustDomain,

    /// The namespace of the controller.
    #[arg(long, value_name = "NAME", default_value = SYSTEM_NAMESPACE)]
    namespace: String,

    /// File that names the API server, by its current context [default: $KUBECONFIG, ~/.kube/config, or the cluster that this runs
    /// in].
    #[arg(long, value_name = "FILE", env = "KUBECONFIG")]
    kubeconfig: Option<PathBuf>,
}

/// Takes the step, and prints what comes next.
///
/// # Errors
/// When the API server or the state of the rotation does not allow it.
#[expect(clippy::print_stdout, reason = "what comes next is the command's output")]
pub async fn run(args: CaArgs) -> anyhow::Result<()> {
    let Step::Rotate(args) = args.step;
    let kubeconfig = args.kubeconfig.clone().or_else(default_kubeconfig);
    let client = connect(kubeconfig.as_deref()).await?;
    let step = match (args.finish, args.danger_finish_now) {
        (false, _) => RotationStep::Start { trust_domain: args.trust_domain, overlap: args.sign_after, longest: args.cert_ttl },
        (true, danger_now) => RotationStep::Finish { danger_now },
    };
    println!("{}", rotate::take(&client, &args.namespace, &step, SystemTime::now()).await?);
    Ok(())
}

/// The file that kubectl would read, if there is one.
fn default_kubeconfig() -> Option<PathBuf> {
    let path = std::env::home_dir()?.join(".kube/config");
    path.is_file().then_some(path)
}
