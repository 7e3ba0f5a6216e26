//! The node's view of the mesh, as the controller tells it.
//!
//! Enters: the controller's delta-xDS stream (Istio ambient's workload discovery and Culvert's own mesh settings). Leaves: immutable
//! [`Snapshot`]s through a watch channel, and answers about single addresses ([`DiscoveryHandle::resolve`]). While the controller
//! is away the last snapshot stays; a resource that makes no sense changes nothing and is reported to both ends. What has not
//! been answered is never taken for absent.
//!
//! ```text
//! controller <-> xds (stream) -> mirror (what is held) -> decode -> Snapshot -> watch
//!                 ├-> questions (addresses asked for)
//!                 └-> keep (what is held, for the next agent of the node)
//! ```

mod decode;
#[cfg(test)]
mod fixture;
mod keep;
mod mirror;
mod questions;
mod shared;
mod xds;

use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};

use crate::identity::ControllerEndpoint;
use crate::model::{Snapshot, TrustDomain};
use crate::observe::XdsReceived;

pub use decode::{DecodeError, Fault};

/// The most addresses that are asked about at one time, and the most questions that wait to be sent.
pub const OUTSTANDING: usize = 1024;
/// How long a question waits for its answer.
pub const RESOLVE_DEADLINE: Duration = Duration::from_secs(2);

/// What the client of discovery needs to know.
#[derive(Clone, Debug)]
pub struct DiscoveryConfig {
    /// The controller.
    pub endpoint: ControllerEndpoint,
    /// This node's name.
    pub node: Arc<str>,
    /// The mesh's trust domain when the control plane does not name one: it is then not Culvert's.
    pub default_trust_domain: TrustDomain,
    /// Where what the controller tells is kept for the node's next agent.
    pub state_dir: PathBuf,
    /// Where what comes from the controller is counted.
    pub received: XdsReceived,
}

/// Starts the client of discovery.
#[derive(Debug)]
pub struct Discovery;

/// What the client of discovery knows. The client ends with the last copy.
#[derive(Clone, Debug)]
pub struct DiscoveryHandle {
    snapshots: watch::Receiver<Arc<Snapshot>>,
    connected: watch::Receiver<bool>,
    questions: mpsc::Sender<Question>,
}

/// Why an address could not be resolved. In each case nothing is known: the connection must not be let out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResolveError {
    /// There is no connection to the controller.
    #[error("the controller is not connected")]
    NotConnected,
    /// The controller did not answer in time, or its answer was unusable.
    #[error("the controller gave no usable answer within {} s", RESOLVE_DEADLINE.as_secs())]
    Timeout,
    /// Too many questions are open.
    #[error("{OUTSTANDING} addresses are being asked about already")]
    Overloaded,
}

type Reply = Result<Arc<Snapshot>, ResolveError>;

/// An address that somebody asks about.
#[derive(Debug)]
struct Question {
    address: IpAddr,
    reply: oneshot::Sender<Reply>,
}

impl Discovery {
    /// Connects to the controller, on the present tokio runtime, and again whenever the connection is lost.
    #[must_use]
    pub fn start(config: DiscoveryConfig) -> DiscoveryHandle {
        let (snapshots_in, snapshots) = watch::channel(Arc::new(Snapshot::empty(&config.node)));
        let (connected_in, connected) = watch::channel(false);
        let (questions, questions_out) = mpsc::channel(OUTSTANDING);
        tokio::spawn(xds::Client::new(config, questions_out, snapshots_in, connected_in).run());
        DiscoveryHandle { snapshots, connected, questions }
    }
}

/// Removes what was kept in `state_dir` for the agent of `node`. For a node that leaves the mesh.
///
/// # Errors
/// The first file that cannot be removed.
pub fn forget(state_dir: &Path, node: &str) -> io::Result<()> {
    keep::forget(state_dir, node)
}

impl DiscoveryHandle {
    /// The state of the mesh and its changes.
    #[must_use]
    pub fn snapshots(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.snapshots.clone()
    }

    /// Whether the controller is connected.
    #[must_use]
    pub fn connected(&self) -> watch::Receiver<bool> {
        self.connected.clone()
    }

    /// The state of the mesh in which it is certain what is at `address`: a workload, a service, or nothing that the mesh
    /// knows. Asks the controller where the present state does not say.
    ///
    /// # Errors
    /// A [`ResolveError`] when it cannot be known now.
    ///
    /// # Cancel safety
    /// Dropping the future withdraws the question; others on the same address are not affected.
    pub async fn resolve(&self, address: IpAddr) -> Reply {
        let address = address.to_canonical();
        let snapshot = Arc::clone(&self.snapshots.borrow());
        if snapshot.workload_at(address).is_some() || snapshot.service_at(address).is_some() {
            return Ok(snapshot);
        }
        if !*self.connected.borrow() {
            return Err(ResolveError::NotConnected);
        }
        let (reply, answer) = oneshot::channel();
        self.questions.try_send(Question { address, reply }).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => ResolveError::Overloaded,
            mpsc::error::TrySendError::Closed(_) => ResolveError::NotConnected,
        })?;
        match tokio::time::timeout(RESOLVE_DEADLINE, answer).await {
            Ok(Ok(reply)) => reply,
            Ok(Err(_dropped)) => Err(ResolveError::NotConnected),
            Err(_elapsed) => Err(ResolveError::Timeout),
        }
    }
}

/// Takes foreign bytes for a controller's response, of each type in turn, into a mirror that keeps what came before.
#[cfg(any(test, feature = "fuzz"))]
pub fn fuzz(bytes: &[u8]) {
    use prost::Message as _;

    let Ok(default_trust_domain) = "cluster.local".parse() else { return };
    let Ok(response) = crate::proto::discovery::DeltaDiscoveryResponse::decode(bytes) else { return };
    let mut mirror = mirror::Mirror::new("fuzz", default_trust_domain);
    for kind in mirror::Kind::ALL.into_iter().chain(mirror::Kind::ALL) {
        let mut of_kind = response.clone();
        // A mutation seldom hits a type's whole name.
        for value in of_kind.resources.iter_mut().filter_map(|resource| resource.resource.as_mut()) {
            value.type_url = kind.type_url().to_owned();
        }
        drop(mirror.apply(kind, &of_kind, |_| true));
    }
    let snapshot = mirror.snapshot();
    for workload in snapshot.workloads() {
        drop(snapshot.policies_for(workload));
    }
}
