//! `culvert controller`: the arguments, and the signals that stop the role.
//!
//! Enters: arguments. Leaves: a [`ControllerConfig`] for [`crate::controller::run`].

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use tokio::signal::unix::{SignalKind, signal};

use super::agent::log_format;
use crate::config::{parse_duration, parse_listen};
use crate::controller::{self, ControllerConfig};
use crate::model::TrustDomain;
use crate::observe::log::{self, LogFormat};

/// The arguments of `culvert controller`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "The environment variable CULVERT_LOG sets what is logged: a level, or directives such as \
                        info,culvert::controller=debug [default: info].")]
pub struct ControllerArgs {
    /// Directory of manifests to read and follow. May appear later; the controller waits for it.
    #[arg(long, value_name = "DIR")]
    manifests: PathBuf,

    /// Where the root certificate (root-cert.pem), its key, and a token for each node (tokens/NODE) are kept.
    #[arg(long, value_name = "DIR")]
    state_dir: PathBuf,

    /// Where agents are served: certificates and configuration.
    #[arg(long, value_name = "ADDR", default_value = "0.0.0.0:15012", value_parser = parse_listen)]
    listen: SocketAddr,

    /// The mesh's trust domain: the first part of every identity in it.
    #[arg(long, value_name = "NAME", default_value = "cluster.local")]
    trust_domain: TrustDomain,

    /// The longest life of a workload's certificate, such as 24h, 90s or 500ms.
    #[arg(long, value_name = "TIME", default_value = "24h", value_parser = parse_duration)]
    cert_ttl: Duration,

    /// Deny connections that no ALLOW policy covers.
    #[arg(long)]
    default_deny: bool,

    /// The namespace whose policies apply to the whole mesh.
    #[arg(long, value_name = "NAME", default_value = "istio-system")]
    root_namespace: String,

    /// The domain that services' names end in.
    #[arg(long, value_name = "NAME", default_value = "cluster.local")]
    cluster_domain: String,

    /// How log lines are written.
    #[arg(long, value_name = "FORMAT", default_value_t = LogFormat::Text, value_parser = log_format())]
    log_format: LogFormat,
}

impl From<ControllerArgs> for ControllerConfig {
    fn from(args: ControllerArgs) -> Self {
        Self {
            manifests: args.manifests,
            state_dir: args.state_dir,
            listen: args.listen,
            trust_domain: args.trust_domain,
            cert_ttl: args.cert_ttl,
            default_deny: args.default_deny,
            root_namespace: args.root_namespace,
            cluster_domain: args.cluster_domain,
        }
    }
}

/// Runs the controller until SIGTERM or SIGINT.
///
/// # Errors
/// Whatever kept the controller from running.
pub async fn run(args: ControllerArgs) -> anyhow::Result<()> {
    // Dropped last: what the controller says while it stops still reaches the output.
    let _log = log::init(args.log_format);
    let mut terminate = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?;
    let shutdown = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    controller::run(args.into(), shutdown).await
}
