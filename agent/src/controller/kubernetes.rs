//! What the controller does with an API server besides reading the mesh from it: it keeps its authority there, publishes the roots,
//! and tells the writers of policies what is not enforced.
//!
//! Several replicas do all of this at once, without electing one: what is made once is made by "create if absent", and everything
//! else is written so that writing it twice is writing it once (server-side apply with content that only the cluster's own state
//! decides, names of Events included). So no lease has to expire before a replica's death is made up for, no clock is compared,
//! and the price is a second request that changes nothing.

pub mod api;
pub mod ca;
pub mod follow;
pub mod policy_status;
pub mod resource;
pub mod roots;
pub mod rotate;
pub mod rotation;
#[cfg(test)]
pub(in crate::controller) mod test_server;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};

/// Tells the time.
pub type Now = Arc<dyn Fn() -> SystemTime + Send + Sync>;

/// Why there is no way to an API server.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The named file cannot be used.
    #[error("--kubeconfig: {} cannot be used", path.display())]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: kube::config::KubeconfigError,
    },
    /// This is no pod of a cluster.
    #[error("not in a pod of a cluster: name a file with --kubeconfig")]
    InCluster(#[source] kube::config::InClusterError),
    /// The client cannot be built.
    #[error("cannot build a client for the API server")]
    Client(#[from] kube::Error),
}

/// A client for the API server that `kubeconfig` names in its current context, or for the one of the cluster that this process
/// runs in. Nothing is sent yet. Must be called on a Tokio runtime.
///
/// # Errors
/// [`ConnectError`].
pub async fn connect(kubeconfig: Option<&Path>) -> Result<Client, ConnectError> {
    let config = match kubeconfig {
        None => Config::incluster().map_err(ConnectError::InCluster)?,
        Some(path) => {
            let failed = |source| ConnectError::Kubeconfig { path: path.to_owned(), source };
            let read = Kubeconfig::read_from(path).map_err(failed)?;
            Config::from_custom_kubeconfig(read, &KubeConfigOptions::default()).await.map_err(failed)?
        }
    };
    Ok(Client::try_from(config)?)
}
