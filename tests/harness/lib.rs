//! Nodes and pods as network namespaces, with a real controller and real agents, removed again when dropped.
//!
//! A [`Mesh`] has a flat network over two nodes, `a` and `b`, each with a namespace, a bridge and an uplink to the fabric between
//! them. Pods are namespaces with a veth into their node's bridge. The binary under test is `CULVERT_BIN`.

pub mod app;
pub mod mesh;
pub mod metrics;
pub mod netns;
pub mod program;
pub mod service;
pub mod wire;

pub use mesh::{Mesh, MeshSpec, Pod, PodSpec};
pub use metrics::Metrics;
pub use netns::Namespace;
pub use program::Program;
pub use service::{Endpoint, Service};
pub use wire::Capture;

use std::time::{Duration, Instant};

/// Waits until `condition` holds, and says `what` did not when it does not within 15 s.
///
/// # Panics
/// When it does not hold in time.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(15);
    while !condition() {
        assert!(Instant::now() < deadline, "not within 15 s: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
