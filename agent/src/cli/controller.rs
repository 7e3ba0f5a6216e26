//! `culvert controller`: the arguments, and the signals that stop the role.
//!
//! Enters: arguments. Leaves: a [`ControllerConfig`] for [`crate::controller::run`].

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use clap::builder::{NonEmptyStringValueParser, PossibleValuesParser, TypedValueParser};
use ipnet::IpNet;
use tokio::signal::unix::{SignalKind, signal};

use super::agent::log_format;
use super::ca::SYSTEM_NAMESPACE;
use crate::config::{METRICS_LISTEN, READY_LISTEN, parse_lifetime, parse_listen};
use crate::controller::on_kubernetes::KubernetesConfig;
use crate::controller::{self, ControllerConfig, SourceConfig};
use crate::model::{SameNode, TrustDomain};
use crate::observe::log::{self, LogFormat};

/// Namespaces that are never in the mesh by default: what a cluster itself runs on must not wait for it.
const EXCLUDED_NAMESPACES: [&str; 3] = ["kube-system", "kube-public", "kube-node-lease"];

/// The arguments that `--kubernetes`, and what belongs to it, excludes.
const DIRECTORIES: [&str; 2] = ["manifests", "state_dir"];

/// The arguments of `culvert controller`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "The environment variable CULVERT_LOG sets what is logged: a level, or directives such as \
                        info,culvert::controller=debug [default: info].")]
pub struct ControllerArgs {
    /// Directory of manifests to read and follow. May appear later; the controller waits for it.
    #[arg(long, value_name = "DIR", required_unless_present = "kubernetes", conflicts_with = "kubernetes")]
    manifests: Option<PathBuf>,

    /// Where the root certificate (root-cert.pem), its key, and a token for each node (tokens/NODE) are kept.
    #[arg(long, value_name = "DIR", required_unless_present = "kubernetes", conflicts_with = "kubernetes")]
    state_dir: Option<PathBuf>,

    /// Read and follow the objects of a Kubernetes API server. Several controllers may do so at once.
    #[arg(long)]
    kubernetes: bool,

    #[command(flatten)]
    cluster: ClusterArgs,

    /// Where agents are served: certificates and configuration.
    #[arg(long, value_name = "ADDR", default_value = "0.0.0.0:15012", value_parser = parse_listen)]
    listen: SocketAddr,

    /// The mesh's trust domain: the first part of every identity in it.
    #[arg(long, value_name = "NAME", default_value = "cluster.local")]
    trust_domain: TrustDomain,

    /// The longest life of a workload's certificate, such as 24h, 90s or 500ms.
    #[arg(long, value_name = "TIME", default_value = "24h", value_parser = parse_lifetime)]
    cert_ttl: Duration,

    /// Deny connections that no ALLOW policy covers.
    #[arg(long)]
    default_deny: bool,

    /// How pods of the mesh on one node speak to each other: kernel, attested by the node's kernel and not encrypted once the agent has
    /// decided; or tunnel, encrypted as between nodes. The label culvert.dev/same-node of a namespace or a pod says otherwise for it.
    #[arg(long, value_name = "WAY", default_value_t = SameNode::Kernel, value_parser = same_node())]
    same_node: SameNode,

    /// A range of the cluster's pods or services that no node declares as its podCIDRs, such as 10.96.0.0/12; may be given again. A
    /// destination in such a range that an agent does not know is asked about, and never passes in plaintext for that.
    #[arg(long = "cluster-range", value_name = "CIDR")]
    cluster_ranges: Vec<IpNet>,

    /// The namespace whose policies apply to the whole mesh.
    #[arg(long, value_name = "NAME", default_value = "istio-system", value_parser = NonEmptyStringValueParser::new())]
    root_namespace: String,

    /// The domain that services' names end in.
    #[arg(long, value_name = "NAME", default_value = "cluster.local", value_parser = NonEmptyStringValueParser::new())]
    cluster_domain: String,

    /// How log lines are written.
    #[arg(long, value_name = "FORMAT", default_value_t = LogFormat::Text, value_parser = log_format())]
    log_format: LogFormat,
}

/// The arguments that belong to `--kubernetes`.
#[derive(Clone, Debug, clap::Args)]
struct ClusterArgs {
    /// File that names the API server, by its current context [default: the cluster that the controller runs in].
    #[arg(long, value_name = "FILE", conflicts_with_all = DIRECTORIES)]
    kubeconfig: Option<PathBuf>,

    /// The namespace of the controller, the agents and their Secrets.
    #[arg(long, value_name = "NAME", default_value = SYSTEM_NAMESPACE, conflicts_with_all = DIRECTORIES)]
    namespace: String,

    /// The Service that agents know the controller by.
    #[arg(long, value_name = "NAME", default_value = "culvert-controller", conflicts_with_all = DIRECTORIES)]
    service: String,

    /// A namespace whose pods are never in the mesh, whatever labels say; may be given again. The controller's own is another.
    #[arg(long = "exclude-namespace", value_name = "NAME", default_values = EXCLUDED_NAMESPACES, conflicts_with_all = DIRECTORIES)]
    excluded_namespaces: Vec<String>,

    /// Where metrics are served.
    #[arg(long, value_name = "ADDR", default_value_t = METRICS_LISTEN, value_parser = parse_listen, conflicts_with_all = DIRECTORIES)]
    metrics_listen: SocketAddr,

    /// Where readiness is served.
    #[arg(long, value_name = "ADDR", default_value_t = READY_LISTEN, value_parser = parse_listen, conflicts_with_all = DIRECTORIES)]
    ready_listen: SocketAddr,
}

impl From<ClusterArgs> for KubernetesConfig {
    fn from(args: ClusterArgs) -> Self {
        Self {
            kubeconfig: args.kubeconfig,
            namespace: args.namespace,
            service: args.service,
            excluded_namespaces: args.excluded_namespaces,
            metrics_listen: args.metrics_listen,
            ready_listen: args.ready_listen,
        }
    }
}

impl From<ControllerArgs> for ControllerConfig {
    fn from(args: ControllerArgs) -> Self {
        let source = match (args.manifests, args.state_dir) {
            (Some(manifests), Some(state_dir)) => SourceConfig::Manifests { manifests, state_dir },
            _ => SourceConfig::Kubernetes(args.cluster.into()),
        };
        Self {
            source,
            listen: args.listen,
            trust_domain: args.trust_domain,
            cert_ttl: args.cert_ttl,
            default_deny: args.default_deny,
            same_node: args.same_node,
            cluster_ranges: args.cluster_ranges,
            root_namespace: args.root_namespace,
            cluster_domain: args.cluster_domain,
        }
    }
}

/// Takes the words for the ways between pods of one node.
fn same_node() -> impl TypedValueParser<Value = SameNode> {
    PossibleValuesParser::new(SameNode::NAMES).try_map(|word| word.parse::<SameNode>())
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

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        controller: ControllerArgs,
    }

    fn source(arguments: &[&str]) -> Result<SourceConfig, clap::Error> {
        let line = Line::try_parse_from(["culvert"].iter().chain(arguments))?;
        Ok(ControllerConfig::from(line.controller).source)
    }

    #[test]
    fn manifests_and_kubernetes_exclude_each_other_and_one_is_needed() {
        let check = |arguments: &[&str], legal: bool| assert_eq!(source(arguments).is_ok(), legal, "{arguments:?}");
        check(&["--manifests", "a", "--state-dir", "b"], true);
        check(&["--kubernetes"], true);
        check(&["--kubernetes", "--kubeconfig", "f", "--namespace", "n", "--metrics-listen", ":1"], true);
        check(&[], false);
        check(&["--manifests", "a"], false);
        check(&["--kubernetes", "--manifests", "a", "--state-dir", "b"], false);
        check(&["--kubernetes", "--state-dir", "b"], false);
        check(&["--manifests", "a", "--state-dir", "b", "--kubeconfig", "f"], false);
        check(&["--manifests", "a", "--state-dir", "b", "--metrics-listen", ":1"], false);
    }

    #[test]
    fn the_cluster_s_own_namespaces_are_excluded_by_default() {
        let excluded = |arguments: &[&str]| match source(arguments) {
            Ok(SourceConfig::Kubernetes(config)) => config.excluded_namespaces,
            other => panic!("{other:?}"),
        };
        assert_eq!(excluded(&["--kubernetes"]), EXCLUDED_NAMESPACES);
        assert_eq!(excluded(&["--kubernetes", "--exclude-namespace", "a", "--exclude-namespace", "b"]), ["a", "b"]);
    }
}
