//! The controller role: the certificate authority and the configuration server of a mesh.
//!
//! Enters: a directory of manifests, a state directory, and agents' requests. Leaves: delta xDS and certificates on one port, and in
//! the state directory the root certificate and a token for each node, which are there before the port accepts.
//!
//! ```text
//! source ─ changes ─> index ─ updates ─> publish ─ states ─> serve <─ agents
//!                       └──── nodes ───> node_auth ──────────┤
//!                                        authority ──────────┘
//! ```

pub mod authority;
pub mod index;
pub mod node_auth;
pub mod publish;
mod serve;
pub mod source;
pub mod state_file;
#[cfg(test)]
mod tests;

use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use self::authority::Authority;
use self::index::{Index, MeshSettings};
use self::node_auth::NodeTokens;
use self::publish::Publisher;
use self::serve::Shared;
use self::source::manifests::Manifests;
use self::source::{Batch, Feed, Source};
use crate::model::TrustDomain;

/// How long open requests may take to end when the controller stops.
const GRACE: Duration = Duration::from_secs(5);

/// All that a controller is told at its start.
#[derive(Clone, Debug)]
pub struct ControllerConfig {
    /// The directory of manifests. It need not exist yet.
    pub manifests: PathBuf,
    /// Where the root and the nodes' tokens are kept.
    pub state_dir: PathBuf,
    /// Where agents are served.
    pub listen: SocketAddr,
    /// The mesh's trust domain.
    pub trust_domain: TrustDomain,
    /// The longest life of a workload's certificate.
    pub cert_ttl: Duration,
    /// Deny what no ALLOW policy covers.
    pub default_deny: bool,
    /// Policies of this namespace apply to the whole mesh.
    pub root_namespace: String,
    /// The domain that services' names end in.
    pub cluster_domain: String,
}

/// A controller that serves. It stops when this is dropped.
#[derive(Debug)]
pub struct RunningController {
    address: SocketAddr,
    stop: CancellationToken,
    server: JoinHandle<Result<(), tonic::transport::Error>>,
}

/// Runs a controller until `shutdown` ends.
///
/// # Errors
/// When the controller cannot start or its server fails.
pub async fn run(config: ControllerConfig, shutdown: impl Future<Output = ()>) -> Result<()> {
    let mut running = start(config).await?;
    tokio::select! {
        () = shutdown => {
            info!("stopping");
            running.stop().await
        }
        ended = &mut running.server => ended.context("the server's task failed")?.context("serving agents failed"),
    }
}

/// Starts a controller. It serves when this returns.
///
/// # Errors
/// When the state directory, the manifests or the port cannot be used.
pub async fn start(config: ControllerConfig) -> Result<RunningController> {
    let authority = Authority::open(&config.state_dir, config.trust_domain.as_str(), config.cert_ttl, SystemTime::now())?;
    let authority = Arc::new(authority);
    let tokens = Arc::new(NodeTokens::open(&config.state_dir)?);
    let settings = MeshSettings {
        trust_domain: config.trust_domain.clone(),
        root_namespace: config.root_namespace.clone(),
        cluster_domain: config.cluster_domain.clone(),
        default_deny: config.default_deny,
    };
    let stop = CancellationToken::new();
    let guard = stop.clone().drop_guard();
    let Feed { batches, barrier } = Manifests::new(config.manifests.clone(), settings.context()).start(stop.clone())?;
    let (publisher, states) = Publisher::new();
    let (loaded, first_load) = oneshot::channel();
    let index_tokens = Arc::clone(&tokens);
    // The first batch of a large mesh takes a while, which must hold no other task up.
    std::thread::Builder::new()
        .name("index".to_owned())
        .spawn(move || follow(batches, Index::new(settings), publisher, &index_tokens, loaded))
        .context("cannot start a thread for the index")?;
    let objects = first_load.await.context("the manifests could not be read")?;
    let listener = TcpListener::bind(config.listen).await;
    let listener = listener.with_context(|| format!("cannot listen on {}: is another controller running?", config.listen))?;
    let address = listener.local_addr().context("the listener has no address")?;
    let fingerprint = authority.fingerprint();
    let names = serving_names(&config.cluster_domain);
    let shared = Shared { states, tokens, authority, barrier, stop: stop.clone() };
    let server = tokio::spawn(serve::serve(listener, names, shared));
    info!(%address, trust_domain = %config.trust_domain, root_sha256 = fingerprint, objects, "serving agents");
    Ok(RunningController { address, stop: guard.disarm(), server })
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

/// Keeps the index, the tokens and the published state up with the source, until that ends.
fn follow(
    mut batches: mpsc::Receiver<Batch>,
    mut index: Index,
    mut publisher: Publisher,
    tokens: &NodeTokens,
    loaded: oneshot::Sender<usize>,
) {
    let mut loaded = Some(loaded);
    while let Some(batch) = batches.blocking_recv() {
        let mut update = index.apply(&batch.changes);
        for warning in update.warnings.drain(..) {
            warn!("{warning}");
        }
        for failure in update.nodes.take().into_iter().flat_map(|nodes| tokens.set_nodes(&nodes)) {
            error!("{:#}", anyhow::Error::from(failure));
        }
        publisher.publish(update);
        batch.passed();
        if let Some(loaded) = loaded.take() {
            // Whoever started this may have given up meanwhile.
            let _gone = loaded.send(index.objects());
        }
    }
}

/// The names that agents may know the controller by, besides its address.
fn serving_names(cluster_domain: &str) -> Vec<String> {
    let service = "culvert-controller.culvert-system";
    let mut names =
        vec!["localhost".to_owned(), service.to_owned(), format!("{service}.svc"), format!("{service}.svc.{cluster_domain}")];
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned();
    if rustls_pki_types::DnsName::try_from(host.as_str()).is_ok() && !names.contains(&host) {
        names.push(host);
    }
    names
}
