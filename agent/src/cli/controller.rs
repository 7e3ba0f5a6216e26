//! `culvert controller`.

/// The arguments of `culvert controller`.
#[derive(Clone, Debug, clap::Args)]
pub struct ControllerArgs {}

/// Runs the controller until it is told to stop.
///
/// # Errors
/// Always, as yet.
#[expect(clippy::unused_async, reason = "the signature that the command line calls")]
pub async fn run(_args: ControllerArgs) -> anyhow::Result<()> {
    anyhow::bail!("the controller role is not built in")
}
