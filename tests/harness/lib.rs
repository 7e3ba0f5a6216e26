//! Nodes and pods as network namespaces, with a real controller and real agents, removed again when dropped.
//!
//! A [`Cluster`] is a Kubernetes cluster that is up already. A [`Mesh`] has a flat network over two nodes, `a` and `b`, each with a
//! namespace, a bridge and an uplink to the fabric between them. Pods are namespaces with a veth into their node's bridge, and all of
//! their processes are in a cgroup of this process's own. The binary under test is `CULVERT_BIN`.

pub mod app;
pub mod attacker;
pub mod cgroup;
pub mod cluster;
pub mod crowd;
pub mod forge;
pub mod http2;
pub mod kernel;
pub mod mesh;
pub mod metrics;
pub mod netns;
pub mod peer;
pub mod process;
pub mod program;
pub mod service;
pub mod view;
pub mod wire;

pub use cluster::Cluster;
pub use mesh::{Attached, Mesh, MeshSpec, Pod, PodSpec};
pub use metrics::Metrics;
pub use netns::Namespace;
pub use process::{Footprint, Process};
pub use program::Program;
pub use service::{Endpoint, Service};
pub use wire::Capture;

use std::fmt::Debug;
use std::time::{Duration, Instant};

/// How long [`eventually`] waits.
const PATIENCE: Duration = Duration::from_secs(15);

/// Waits until `condition` holds, and says `what` did not when it does not within 15 s.
///
/// # Panics
/// When it does not hold in time.
pub fn eventually(what: &str, condition: impl FnMut() -> bool) {
    eventually_within(PATIENCE, what, condition);
}

/// The same, for what may take longer.
///
/// # Panics
/// When it does not hold in time.
pub fn eventually_within(patience: Duration, what: &str, mut condition: impl FnMut() -> bool) {
    wait(patience, || if condition() { Ok(()) } else { Err(what.to_owned()) });
}

/// Waits until `now` gives what is wanted, and says what it gave last when it does not within 15 s.
///
/// # Panics
/// When it does not in time.
pub fn eventually_equal<T: Debug + PartialEq>(what: &str, wanted: &T, mut now: impl FnMut() -> T) {
    wait(PATIENCE, || {
        let seen = now();
        if seen == *wanted { Ok(()) } else { Err(format!("{what}: {seen:?}, not {wanted:?}")) }
    });
}

/// Looks again and again until nothing is lacking. Where the processor is emulated all takes longer: `CULVERT_SLOWNESS` times as long.
fn wait(patience: Duration, mut look: impl FnMut() -> Result<(), String>) {
    let slowness =
        std::env::var("CULVERT_SLOWNESS").map_or(1, |times| times.parse().expect("CULVERT_SLOWNESS is a whole number"));
    let patience = patience * slowness;
    let deadline = Instant::now() + patience;
    while let Err(lacking) = look() {
        assert!(Instant::now() < deadline, "not within {} s: {lacking}", patience.as_secs());
        std::thread::sleep(Duration::from_millis(5));
    }
}
