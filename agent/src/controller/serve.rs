//! What agents ask over port 15012: discovery and certificates, over TLS, for nodes with a token only.
//!
//! Enters: connections from anywhere, the mesh's states, the authority. Leaves: delta xDS and signed certificates. Bytes from the
//! network can neither end the process nor make it keep more than a bounded amount.

mod authenticated;
mod certificates;
mod discovery;
mod listener;
mod quota;
mod relief;
mod subscription;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::metadata::MetadataMap;
use tonic::transport::Server;

use self::authenticated::Authenticated;
use self::certificates::Certificates;
use self::discovery::Discovery;
use self::quota::Quota;
use self::relief::Relief;
use super::authority::Authority;
use super::node_auth::NodeAuth;
use super::publish::MeshState;
use super::source::Barrier;
use crate::observe::ControllerMetrics;
use crate::observe::control_plane::Refusal;
use crate::proto::ca::istio_certificate_service_server::IstioCertificateServiceServer;
use crate::proto::discovery::aggregated_discovery_service_server::AggregatedDiscoveryServiceServer;

/// How often a quiet connection is asked for a sign of life, and how long that may take.
const KEEPALIVE: Duration = Duration::from_secs(20);
/// Requests under way on one connection.
const STREAMS: u32 = 1024;
/// The largest list of headers taken, in bytes.
const HEADERS: u32 = 16 * 1024;
/// The largest discovery request, in bytes: a reconnecting client names all that it holds.
const DISCOVERY_REQUEST: usize = 32 * 1024 * 1024;
/// The largest certificate request, in bytes.
const CERTIFICATE_REQUEST: usize = 64 * 1024;

/// What the services have in common.
#[derive(Clone, Debug)]
pub(super) struct Shared {
    pub(super) states: watch::Receiver<Arc<MeshState>>,
    pub(super) nodes: Arc<dyn NodeAuth>,
    pub(super) authority: Arc<Authority>,
    pub(super) barrier: Barrier,
    pub(super) metrics: ControllerMetrics,
    pub(super) stop: CancellationToken,
}

/// Whether a connection has shown a token. One that does not in time is closed.
#[derive(Clone, Debug, Default)]
struct ConnectionAuth(Arc<AtomicBool>);

impl Shared {
    /// The node that a request comes from.
    async fn node_of(&self, metadata: &MetadataMap, connection: Option<ConnectionAuth>) -> Result<Arc<str>, Status> {
        let node = self.nodes.authenticate(metadata).await?;
        if let Some(connection) = connection {
            connection.0.store(true, Ordering::Relaxed);
        }
        Ok(node)
    }
}

/// Serves on `listener` until `shared.stop` is cancelled. `names` are the DNS names that agents may know the controller by.
///
/// # Errors
/// When HTTP/2 cannot be served at all.
pub(super) async fn serve(listener: TcpListener, names: Vec<String>, shared: Shared) -> Result<(), tonic::transport::Error> {
    let incoming = listener::accept(listener, names, Arc::clone(&shared.authority), shared.stop.clone());
    let (quota, relief) = (Quota::default(), Relief::start());
    let discovery = AggregatedDiscoveryServiceServer::new(Discovery { shared: shared.clone(), quota, relief });
    let certificates = IstioCertificateServiceServer::new(Certificates(shared.clone()));
    Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        .max_concurrent_streams(STREAMS)
        .http2_max_header_list_size(HEADERS)
        .add_service(Authenticated::new(discovery.max_decoding_message_size(DISCOVERY_REQUEST), &shared, |_| {}))
        .add_service(Authenticated::new(certificates.max_decoding_message_size(CERTIFICATE_REQUEST), &shared, |metrics| {
            metrics.refused(Refusal::Unauthenticated);
        }))
        .serve_with_incoming_shutdown(incoming, shared.stop.cancelled_owned())
        .await
}
