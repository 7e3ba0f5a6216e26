//! The controller on a cluster's API server: its parts in order.
//!
//! Enters: a client, and what the controller is told. Leaves: a controller that serves, with its metrics and readiness served from
//! the start. It is ready once there is an authority, all objects have been read, and it serves; it stays so when the API server
//! goes away, since what was read last stays in force.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use kube::Client;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::kubernetes::{Now, ca, policy_status, roots};
use super::node_auth::{NodeAuth, TokenReviews};
use super::serve::Shared;
use super::source::kubernetes::Cluster;
use super::source::{Feed, Source};
use super::{ControllerConfig, Followed, MeshSettings, Outlets, RunningController, follow, listen, serving_names};
use crate::controller::authority::Authority;
use crate::observe::{ControllerMetrics, Readiness, http, readiness};

/// How often the authority's end is looked at for the metrics.
const CA_EXPIRY: Duration = Duration::from_secs(60);

/// What a controller on Kubernetes is told besides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KubernetesConfig {
    /// The file that names the API server; none: the one of the cluster that this process runs in.
    pub kubeconfig: Option<PathBuf>,
    /// The namespace of the controller, the agents and their Secrets.
    pub namespace: String,
    /// The name of the controller's Service.
    pub service: String,
    /// Namespaces that are never in the mesh, besides its own.
    pub excluded_namespaces: Vec<String>,
    /// Where metrics are served.
    pub metrics_listen: SocketAddr,
    /// Where readiness is served.
    pub ready_listen: SocketAddr,
}

/// Starts a controller. It serves when this returns, which waits for an API server that answers.
///
/// # Errors
/// When a port cannot be used.
pub async fn start(
    config: ControllerConfig,
    kubernetes: KubernetesConfig,
    client: Client,
    now: Now,
) -> Result<RunningController> {
    let stop = CancellationToken::new();
    let guard = stop.clone().drop_guard();
    let (metrics, readiness) = (ControllerMetrics::new(), Readiness::new());
    observe(&kubernetes, &metrics, &readiness, &stop).await?;
    let (signing, synced, serving) =
        (readiness.condition("authority"), readiness.condition("objects"), readiness.condition("agents are served"));

    let settings = ca::Settings {
        namespace: kubernetes.namespace.clone(),
        trust_domain: config.trust_domain.to_string(),
        longest: config.cert_ttl,
        now: Arc::clone(&now),
    };
    let authority = ca::open(client.clone(), settings, signing, stop.clone());
    let nodes: Arc<dyn NodeAuth> = Arc::new(TokenReviews::new(client.clone(), &kubernetes.namespace));
    let excluded = kubernetes.excluded_namespaces.iter().cloned().chain([kubernetes.namespace.clone()]).collect::<BTreeSet<_>>();
    let mesh = MeshSettings { namespaces_told: true, ..config.mesh_settings(excluded) };
    let Ok(Feed { batches, barrier }) = Cluster::new(client.clone(), mesh.context(), metrics.clone()).start(stop.clone());
    let (namespaces, enrolled) = watch::channel(BTreeSet::new());
    let findings = Some(policy_status::start(client.clone(), now, stop.clone()));
    let outlets = Outlets { nodes: Arc::clone(&nodes), metrics: metrics.clone(), findings, namespaces };
    let Followed { states, objects } = follow(batches, mesh, outlets).await.context("the cluster could not be read")?;
    synced.met();

    let authority = authority.await.context("there is no authority")?;
    roots::start(client, kubernetes.namespace.clone(), authority.roots(), enrolled, stop.clone());
    tokio::spawn(tell_expiry(Arc::clone(&authority), metrics.clone(), stop.clone()));
    let names = serving_names(&kubernetes.service, &kubernetes.namespace, &config.cluster_domain);
    let shared = Shared { states, nodes, authority, barrier, metrics, stop };
    let running = listen(&config, names, shared, objects).await?;
    serving.met();
    guard.disarm();
    Ok(running)
}

/// Serves metrics and readiness.
async fn observe(
    kubernetes: &KubernetesConfig,
    metrics: &ControllerMetrics,
    readiness: &Readiness,
    stop: &CancellationToken,
) -> Result<()> {
    let metrics_server = http::Server::metrics(kubernetes.metrics_listen).await?;
    let readiness_server = http::Server::readiness(kubernetes.ready_listen).await?;
    tokio::spawn(metrics_server.serve(metrics.clone().router(), stop.clone()));
    tokio::spawn(readiness_server.serve(readiness::router(readiness.clone()), stop.clone()));
    Ok(())
}

async fn tell_expiry(authority: Arc<Authority>, metrics: ControllerMetrics, stop: CancellationToken) {
    let mut clock = tokio::time::interval(CA_EXPIRY);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = clock.tick() => metrics.ca_expiry(authority.expires()),
        }
    }
}
