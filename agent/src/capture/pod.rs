//! An enrolled pod of this node.
//!
//! Handed to whoever serves its connections. The namespace's routing stays as long as anybody holds the pod, so that connections
//! that are open when the pod leaves the mesh live on.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwap;
use tokio_util::sync::CancellationToken;

use super::Netns;
use super::routing::RoutingLease;
use crate::model::Workload;

/// An enrolled pod.
#[derive(Debug)]
pub struct LocalPod {
    /// Its network namespace.
    pub netns: Netns,
    /// Its addresses, at most one a family. They do not change: a pod with others is another `LocalPod`.
    pub addresses: Vec<IpAddr>,
    /// The pod has left the mesh: no new connection comes, and open ones live on.
    pub released: CancellationToken,
    /// The pod's namespace is gone, and [`released`](Self::released) is set as well: open connections have no pod any more.
    pub gone: CancellationToken,
    workload: ArcSwap<Workload>,
    generation: AtomicU64,
    _routing: Option<RoutingLease>,
}

impl LocalPod {
    pub(super) fn new(netns: Netns, workload: Arc<Workload>, generation: u64, routing: Option<RoutingLease>) -> Self {
        Self {
            netns,
            addresses: workload.addresses.to_vec(),
            released: CancellationToken::new(),
            gone: CancellationToken::new(),
            workload: ArcSwap::new(workload),
            generation: AtomicU64::new(generation),
            _routing: routing,
        }
    }

    /// The workload as it is now. Its UID, identity and addresses never change; what it accepts may.
    #[must_use]
    pub fn workload(&self) -> Arc<Workload> {
        self.workload.load_full()
    }

    /// What verdicts on the pod's connections are bound to: it changes with everything that may change one. To be read before the state
    /// that a verdict is reached by.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    pub(super) fn set_generation(&self, generation: u64) {
        self.generation.store(generation, Ordering::Release);
    }

    pub(super) fn set_workload(&self, workload: Arc<Workload>) {
        self.workload.store(workload);
    }
}
