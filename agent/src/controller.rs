//! The controller role: the certificate authority and the configuration server of a mesh.
//!
//! Enters: a directory of manifests and one of state, or a cluster's API server; and agents' requests. Leaves: delta xDS and
//! certificates on one port. The root certificate and the nodes' tokens are in the state directory before the port accepts; on
//! Kubernetes the root is published, and agents show tokens of their own.
//!
//! ```text
//! source ─ changes ─> index ─ updates ─> publish ─ states ─> serve <─ agents
//!                       ├──── nodes ───> node_auth ──────────┤
//!                       │                authority ──────────┘
//!                       └─ findings, namespaces ─> kubernetes (policy_status, roots)
//! ```

pub mod authority;
pub mod index;
pub mod kubernetes;
pub mod node_auth;
pub mod on_kubernetes;
pub mod publish;
mod serve;
pub mod source;
pub mod state_file;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use ipnet::IpNet;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use self::authority::Authority;
use self::index::{Finding, Index, MeshSettings};
use self::node_auth::{NodeAuth, NodeTokens};
use self::on_kubernetes::KubernetesConfig;
use self::publish::{MeshState, Publisher};
use self::serve::Shared;
use self::source::manifests::Manifests;
use self::source::{Batch, Feed, ObjectKey, Source};
use crate::limits;
use crate::model::{SameNode, TrustDomain};
use crate::observe::ControllerMetrics;

/// How long open requests may take to end when the controller stops.
const GRACE: Duration = Duration::from_secs(5);

/// All that a controller is told at its start.
#[derive(Clone, Debug)]
pub struct ControllerConfig {
    /// Where the mesh's objects come from, and where the authority is kept.
    pub source: SourceConfig,
    /// Where agents are served.
    pub listen: SocketAddr,
    /// The mesh's trust domain.
    pub trust_domain: TrustDomain,
    /// The longest life of a workload's certificate.
    pub cert_ttl: Duration,
    /// Deny what no ALLOW policy covers.
    pub default_deny: bool,
    /// How pods of one node speak to each other where no label says so.
    pub same_node: SameNode,
    /// Ranges of the cluster's addresses beside those that nodes declare.
    pub cluster_ranges: Vec<IpNet>,
    /// Policies of this namespace apply to the whole mesh.
    pub root_namespace: String,
    /// The domain that services' names end in.
    pub cluster_domain: String,
}

/// Where a mesh's objects come from, and where its authority is kept.
#[derive(Clone, Debug)]
pub enum SourceConfig {
    /// In directories.
    Manifests {
        /// The directory of manifests. It need not exist yet.
        manifests: PathBuf,
        /// Where the root and the nodes' tokens are kept.
        state_dir: PathBuf,
    },
    /// In a cluster's API.
    Kubernetes(KubernetesConfig),
}

/// A controller that serves. It stops when this is dropped.
#[derive(Debug)]
pub struct RunningController {
    address: SocketAddr,
    stop: CancellationToken,
    server: JoinHandle<Result<(), tonic::transport::Error>>,
}

/// What a source's index tells to others than agents.
struct Outlets {
    nodes: Arc<dyn NodeAuth>,
    metrics: ControllerMetrics,
    /// Who is told of policies that are not enforced in part.
    findings: Option<mpsc::UnboundedSender<Finding>>,
    /// The namespaces with enrolled pods.
    namespaces: watch::Sender<BTreeSet<Arc<str>>>,
}

/// A source that is followed, after its whole content was read.
struct Followed {
    states: watch::Receiver<Arc<MeshState>>,
    objects: usize,
}

/// Runs a controller until `shutdown` ends.
///
/// # Errors
/// When the controller cannot start or its server fails.
pub async fn run(config: ControllerConfig, shutdown: impl Future<Output = ()>) -> Result<()> {
    let descriptors = limits::raise_descriptors();
    debug!(descriptors, "the limit of open files is raised");
    let mut shutdown = std::pin::pin!(shutdown);
    let mut running = tokio::select! {
        running = start(config) => running?,
        () = &mut shutdown => return Ok(()),
    };
    tokio::select! {
        () = shutdown => {
            info!("stopping");
            running.stop().await
        }
        ended = &mut running.server => ended.context("the server's task failed")?.context("serving agents failed"),
    }
}

/// Starts a controller. It serves when this returns; on Kubernetes that waits for an API server that answers.
///
/// # Errors
/// When the state directory, the manifests, the client or a port cannot be used.
pub async fn start(config: ControllerConfig) -> Result<RunningController> {
    match config.source.clone() {
        SourceConfig::Manifests { manifests, state_dir } => start_on_manifests(config, manifests, state_dir).await,
        SourceConfig::Kubernetes(kubernetes) => {
            let client = kubernetes::connect(kubernetes.kubeconfig.as_deref()).await?;
            on_kubernetes::start(config, kubernetes, client, Arc::new(SystemTime::now)).await
        }
    }
}

async fn start_on_manifests(config: ControllerConfig, manifests: PathBuf, state_dir: PathBuf) -> Result<RunningController> {
    let authority = Authority::open(&state_dir, config.trust_domain.as_str(), config.cert_ttl, SystemTime::now())?;
    let authority = Arc::new(authority);
    let nodes: Arc<dyn NodeAuth> = Arc::new(NodeTokens::open(&state_dir)?);
    let settings = config.mesh_settings(BTreeSet::new());
    let stop = CancellationToken::new();
    let guard = stop.clone().drop_guard();
    let Feed { batches, barrier } = Manifests::new(manifests, settings.context()).start(stop.clone())?;
    let metrics = ControllerMetrics::new();
    let namespaces = watch::Sender::default();
    let outlets = Outlets { nodes: Arc::clone(&nodes), metrics: metrics.clone(), findings: None, namespaces };
    let Followed { states, objects } = follow(batches, settings, outlets).await.context("the manifests could not be read")?;
    let names = serving_names("culvert-controller", "culvert-system", &config.cluster_domain);
    let shared = Shared { states, nodes, authority, barrier, metrics, stop };
    let running = listen(&config, names, shared, objects).await?;
    guard.disarm();
    Ok(running)
}

impl ControllerConfig {
    fn mesh_settings(&self, excluded_namespaces: BTreeSet<String>) -> MeshSettings {
        MeshSettings {
            trust_domain: self.trust_domain.clone(),
            root_namespace: self.root_namespace.clone(),
            cluster_domain: self.cluster_domain.clone(),
            default_deny: self.default_deny,
            same_node: self.same_node,
            cluster_ranges: self.cluster_ranges.iter().map(IpNet::trunc).collect(),
            excluded_namespaces,
            namespaces_told: false,
        }
    }
}

/// Follows a source on a thread of its own, since the first batches of a large mesh take a while, which must hold no other task up.
/// Returns when the source's whole content is in the index; fails when the source ends before.
async fn follow(batches: mpsc::Receiver<Batch>, settings: MeshSettings, outlets: Outlets) -> Result<Followed> {
    let (publisher, states) = Publisher::new();
    let (loaded, first_load) = oneshot::channel();
    std::thread::Builder::new()
        .name("index".to_owned())
        .spawn(move || keep_up(batches, Index::new(settings), publisher, &outlets, loaded))
        .context("cannot start a thread for the index")?;
    let objects = first_load.await?;
    Ok(Followed { states, objects })
}

/// Listens, and serves agents.
async fn listen(config: &ControllerConfig, names: Vec<String>, shared: Shared, objects: usize) -> Result<RunningController> {
    let listener = TcpListener::bind(config.listen).await;
    let listener = listener.with_context(|| format!("cannot listen on {}: is another controller running?", config.listen))?;
    let address = listener.local_addr().context("the listener has no address")?;
    let (fingerprint, stop) = (shared.authority.fingerprint(), shared.stop.clone());
    let server = tokio::spawn(serve::serve(listener, names, shared));
    info!(%address, trust_domain = %config.trust_domain, root_sha256 = fingerprint, objects, "serving agents");
    Ok(RunningController { address, stop, server })
}

impl RunningController {
    /// Where agents are served.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Ends all streams and stops. Requests that take longer than five seconds to end are cut.
    ///
    /// # Errors
    /// When the server had failed.
    pub async fn stop(mut self) -> Result<()> {
        self.stop.cancel();
        match tokio::time::timeout(GRACE, &mut self.server).await {
            Ok(ended) => ended.context("the server's task failed")?.context("serving agents failed"),
            Err(_late) => {
                warn!("connections were still open after {GRACE:?}: they are cut");
                self.server.abort();
                Ok(())
            }
        }
    }
}

impl Drop for RunningController {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// Keeps the index, the nodes and the published state up with the source, until that ends.
fn keep_up(
    mut batches: mpsc::Receiver<Batch>,
    mut index: Index,
    mut publisher: Publisher,
    outlets: &Outlets,
    loaded: oneshot::Sender<usize>,
) {
    let mut loaded = Some(loaded);
    let mut not_enforced = BTreeSet::new();
    while let Some(batch) = batches.blocking_recv() {
        let mut update = index.apply(&batch.changes);
        for warning in update.warnings.drain(..) {
            warn!("{warning}");
        }
        for failure in update.nodes.take().into_iter().flat_map(|nodes| outlets.nodes.set_nodes(&nodes)) {
            error!("{:#}", anyhow::Error::from(failure));
        }
        outlets.tell(&mut not_enforced, update.findings.drain(..), update.namespaces.take());
        for (kind, count) in index.counts() {
            outlets.metrics.objects(kind.as_str(), count);
        }
        publisher.publish(update, batch.read_at);
        let complete = batch.complete;
        batch.passed();
        if complete && let Some(loaded) = loaded.take() {
            // Whoever started this may have given up meanwhile.
            let _gone = loaded.send(index.objects());
        }
    }
}

impl Outlets {
    fn tell(
        &self,
        not_enforced: &mut BTreeSet<ObjectKey>,
        findings: impl Iterator<Item = Finding>,
        namespaces: Option<BTreeSet<Arc<str>>>,
    ) {
        for finding in findings {
            match &finding.problems {
                Some(problems) if !problems.is_empty() => drop(not_enforced.insert(finding.policy.clone())),
                Some(_) | None => drop(not_enforced.remove(&finding.policy)),
            }
            if let Some(findings) = &self.findings {
                // Nobody takes them any more when the controller stops.
                drop(findings.send(finding));
            }
        }
        self.metrics.policy_problems(not_enforced.len());
        if let Some(namespaces) = namespaces {
            self.namespaces.send_replace(namespaces);
        }
    }
}

/// The names that agents may know the controller by, besides its address.
fn serving_names(service: &str, namespace: &str, cluster_domain: &str) -> Vec<String> {
    let service = format!("{service}.{namespace}");
    let full = [format!("{service}.svc"), format!("{service}.svc.{cluster_domain}")];
    let mut names: Vec<_> = ["localhost".to_owned(), service].into_iter().chain(full).collect();
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned();
    if rustls_pki_types::DnsName::try_from(host.as_str()).is_ok() && !names.contains(&host) {
        names.push(host);
    }
    names
}
