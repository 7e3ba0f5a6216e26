//! The agent role's composition root.

use crate::config::AgentConfig;

/// Runs the agent until it is told to stop.
///
/// # Errors
/// Always, as yet.
#[expect(clippy::unused_async, reason = "the signature that the command line calls")]
pub async fn run(_config: AgentConfig) -> anyhow::Result<()> {
    anyhow::bail!("the agent role is not built in")
}
