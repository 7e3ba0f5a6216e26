//! What the operator's commands share: which cluster, and how they print.

use std::io::Write as _;
use std::path::PathBuf;

use anyhow::Context as _;

use crate::installation::Cluster;
use crate::installation::chart::NAMESPACE;

/// Which cluster, and where Culvert is on it.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct ClusterArgs {
    /// The file that says how to reach the cluster [default: KUBECONFIG, then ~/.kube/config, then the pod that this runs in].
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,

    /// The context of that file [default: the current one].
    #[arg(long, value_name = "NAME")]
    context: Option<String>,

    /// The namespace that Culvert itself runs in.
    #[arg(long, value_name = "NAME", default_value = NAMESPACE)]
    pub(super) namespace: String,
}

impl ClusterArgs {
    /// Connects to it.
    ///
    /// # Errors
    /// When there is none, or it does not answer.
    pub(super) async fn connect(&self) -> anyhow::Result<Cluster> {
        Ok(Cluster::connect(self.kubeconfig.as_deref(), self.context.as_deref()).await?)
    }
}

/// Prints a text that ends its own lines.
///
/// # Errors
/// When nobody reads.
pub(super) fn print(text: &str) -> anyhow::Result<()> {
    let mut output = std::io::stdout().lock();
    output.write_all(text.as_bytes()).and_then(|()| output.flush()).context("cannot print")
}
