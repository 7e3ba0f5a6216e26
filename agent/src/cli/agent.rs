//! `culvert agent`: the arguments, and the runtime that the agent runs in.
//!
//! Enters: arguments. Leaves: a checked [`AgentConfig`] for [`crate::node::run`].

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{PossibleValuesParser, TypedValueParser as _};

use crate::config::{
    ADMIN_LISTEN, AgentConfig, ConfigError, ControllerAddress, METRICS_LISTEN, READY_LISTEN, parse_duration, parse_listen,
};
use crate::model::CloseReason;
use crate::observe::log::{self, LogFormat};
use crate::tunnel::TunnelForm;

/// The arguments of `culvert agent`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "The environment variable CULVERT_LOG sets what is logged: a level, or directives such as \
                        info,culvert::tunnel=debug,access=off [default: info].")]
#[command(after_long_help = close_reasons())]
pub struct AgentArgs {
    /// This node's name, as the cluster knows it.
    #[arg(long, value_name = "NAME", env = "CULVERT_NODE")]
    node: String,

    /// The controller: certificate authority and configuration server.
    #[arg(long, value_name = "https://HOST:PORT")]
    controller: ControllerAddress,

    /// PEM file of the roots that vouch for the controller. May appear later; the agent waits for it.
    #[arg(long, value_name = "FILE")]
    root_cert: PathBuf,

    /// File with the token that proves this node to the controller. May appear later; the agent waits for it.
    #[arg(long, value_name = "FILE")]
    token_file: PathBuf,

    /// Where the container runtime keeps the pods' network namespaces. Made if it is missing, in a directory that is there.
    #[arg(long, value_name = "DIR", default_value = "/run/netns")]
    netns_dir: PathBuf,

    /// The root of the cgroup v2 tree that holds the pods [default: found from the mounts].
    #[arg(long, value_name = "PATH")]
    cgroup_root: Option<PathBuf>,

    /// A Kubernetes namespace whose pods are never in the mesh, by the controller's word; may be given again. Such pods start without
    /// the controller, which may be one of them.
    #[arg(long = "exclude-namespace", value_name = "NAME")]
    excluded_namespaces: Vec<String>,

    /// By what names the kubelet runs. Where pods are below a kubelet's cgroup, such a process of root's outside of that reaches pods
    /// with its probes in every mode. The default is kubeadm's and most others', k3s' and MicroK8s'.
    #[arg(long, value_name = "NAMES", value_delimiter = ',', default_value = "kubelet,k3s-server,k3s-agent,kubelite")]
    kubelet_names: Vec<String>,

    /// Where eBPF programs and maps are pinned, on a BPF file system. Agents on one kernel need one each.
    #[arg(long, value_name = "PATH", default_value = "/sys/fs/bpf/culvert")]
    bpf_dir: PathBuf,

    /// Where what the controller tells is kept, so that the node's next agent fetches only what has changed meanwhile. Only root may be
    /// able to write there. The agent starts without it, too.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/culvert")]
    state_dir: PathBuf,

    /// Where Prometheus metrics are served, at /metrics.
    #[arg(long, value_name = "ADDR", default_value_t = METRICS_LISTEN, value_parser = parse_listen)]
    metrics_listen: SocketAddr,

    /// Where readiness is served, at /healthz/ready.
    #[arg(long, value_name = "ADDR", default_value_t = READY_LISTEN, value_parser = parse_listen)]
    ready_listen: SocketAddr,

    /// Where the admin interface is served. It has no authentication: keep it on a loopback address.
    #[arg(long, value_name = "ADDR", default_value_t = ADMIN_LISTEN, value_parser = parse_listen)]
    admin_listen: SocketAddr,

    /// How log lines are written.
    #[arg(long, value_name = "FORMAT", default_value_t = LogFormat::Text, value_parser = log_format())]
    log_format: LogFormat,

    /// How tunnels are made. auto: Culvert's own form with other Culvert agents, HBONE (HTTP/2) with every other peer. hbone: HBONE
    /// with all peers, for networks that inspect what passes, or to find a fault.
    #[arg(long, value_name = "FORM", default_value_t = TunnelForm::Auto, value_parser = tunnel_form())]
    tunnel_form: TunnelForm,

    /// Threads that move bytes [default: one for each processor].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    workers: Option<u16>,

    /// How long open connections may go on when the agent is told to stop.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_duration)]
    drain_timeout: Duration,
}

/// The words by which the access log and the metrics tell why a connection ended.
fn close_reasons() -> String {
    let mut text = "The environment variable CULVERT_LOG sets what is logged: a level, or directives such as \
                    info,culvert::tunnel=debug,access=off [default: info].\n\nWhy a connection ended (`reason` in the access log):\n"
        .to_owned();
    for reason in CloseReason::ALL {
        text += &format!("  {:<24} {}\n", reason.as_str(), reason.meaning());
    }
    text
}

/// Reads a log format; shared by the roles.
pub fn log_format() -> impl clap::builder::TypedValueParser<Value = LogFormat> {
    PossibleValuesParser::new(LogFormat::NAMES).try_map(|name| name.parse::<LogFormat>())
}

fn tunnel_form() -> impl clap::builder::TypedValueParser<Value = TunnelForm> {
    PossibleValuesParser::new(TunnelForm::NAMES).try_map(|name| name.parse::<TunnelForm>())
}

impl AgentArgs {
    /// The configuration that the arguments say.
    ///
    /// # Errors
    /// [`ConfigError`] when they contradict each other or can't be.
    pub fn into_config(self) -> Result<AgentConfig, ConfigError> {
        let processors = || std::thread::available_parallelism().map_or(1, usize::from);
        AgentConfig {
            node: self.node,
            controller: self.controller,
            root_cert: self.root_cert,
            token_file: self.token_file,
            netns_dir: self.netns_dir,
            cgroup_root: self.cgroup_root,
            excluded_namespaces: self.excluded_namespaces,
            kubelet_names: self.kubelet_names,
            bpf_dir: self.bpf_dir,
            state_dir: self.state_dir,
            metrics_listen: self.metrics_listen,
            ready_listen: self.ready_listen,
            admin_listen: self.admin_listen,
            log_format: self.log_format,
            tunnel_form: self.tunnel_form,
            workers: self.workers.map_or_else(processors, usize::from),
            drain_timeout: self.drain_timeout,
        }
        .validate()
    }
}

/// Runs the agent until it is told to stop.
///
/// # Errors
/// A configuration that can't be, or whatever kept the agent from running.
pub fn run(args: AgentArgs) -> anyhow::Result<()> {
    let config = args.into_config()?;
    // Dropped last: what the agent says while it stops still reaches the output.
    let _log = log::init(config.log_format);
    if !config.admin_listen.ip().is_loopback() {
        tracing::warn!(addr = %config.admin_listen, "the admin interface has no authentication and is not on a loopback address");
    }
    let runtime = super::runtime(Some(config.workers))?;
    runtime.block_on(crate::node::run(config))
}

#[cfg(test)]
mod tests;
