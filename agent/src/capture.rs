//! Capture: the kernel's side of a pod in the mesh.
//!
//! Enters: snapshots of the mesh, and the network namespaces that come and go on the node. Leaves: enrolled pods with the agent's
//! listeners inside of them, captured connections with their original destinations, and the maps from which the eBPF programs
//! decide. Capture reads no byte of a connection and judges no identity; where it cannot tell what a namespace is, nothing leaves
//! it. What it sets up in the kernel outlives the agent: a pod without its agent is closed, not open.
//!
//! In the order of a pod's life: [`load`] the programs, [`enroll`] the pod, [`listener`] its connections, [`destroy`] what a change of
//! policy denies.

mod bpffs;
mod cgroup;
pub mod destroy;
pub mod enroll;
mod events;
pub mod listener;
pub mod load;
pub mod maps;
mod mounts;
mod netlink;
pub mod netns;
mod others;
pub mod pod;
pub mod probe;
mod readiness;
mod routing;
mod same_node;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

use aya::EbpfError;
use aya::maps::MapError;
use aya::programs::ProgramError;
use aya::programs::links::LinkError;
use futures_util::future::BoxFuture;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

pub use cgroup::CgroupError;
pub use destroy::destroy_inbound;
pub use listener::{Accepted, Listener};
pub use load::remove;
pub use maps::Maps;
pub use netns::{DELIVERY_MARK, DELIVERY_TABLE, Netns};
pub use pod::LocalPod;
pub use same_node::{SameNodeConnection, SameNodeEvents, SameNodeMaps};

use crate::model::Snapshot;

/// Asks the controller about an address that the snapshot does not know. None: there is no answer yet. Otherwise the snapshot with
/// the answer in it, which the snapshots' channel has by then, too.
pub type Ask = Arc<dyn Fn(IpAddr) -> BoxFuture<'static, Option<Arc<Snapshot>>> + Send + Sync>;

/// Where capture finds things.
#[derive(Clone, Debug)]
pub struct LoadConfig {
    /// The node's name.
    pub node: Arc<str>,
    /// The directory of the pods' network namespaces.
    pub netns_dir: PathBuf,
    /// The cgroup v2 directory below which connections are captured. None: the root of the machine's tree, where a namespace that
    /// the agent has not seen is refused only while the agent runs.
    pub cgroup_root: Option<PathBuf>,
    /// Kubernetes namespaces whose pods never join, so that the controller need not be asked about them.
    pub excluded_namespaces: Vec<String>,
    /// The names of processes that are kubelets.
    pub kubelet_names: Vec<String>,
    /// The directory, on a bpffs or to be one, below which programs and maps are pinned, in a directory of the node's name: agents
    /// of several nodes on one kernel may share it.
    pub bpf_dir: PathBuf,
}

/// What is steered to a listener of the agent's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ListenerKind {
    /// The pod's captured connections.
    Outbound,
    /// Plaintext to the pod that needs a decision; it keeps the port that it was dialled on.
    Plaintext,
    /// Peers' tunnels.
    Hbone,
}

impl ListenerKind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Outbound, Self::Plaintext, Self::Hbone];
}

/// What happens to the node's pods.
#[derive(Debug)]
pub enum PodEvent {
    /// A pod is enrolled; its connections arrive at the listeners, one for each of its addresses and each kind.
    Enrolled {
        /// The pod.
        pod: Arc<LocalPod>,
        /// Its listeners, to be dropped when [`LocalPod::released`] says so.
        listeners: Vec<Listener>,
        /// It was in the mesh before this agent came: what is open to it is to be held against what changed meanwhile.
        inherited: bool,
    },
    /// What a pod accepts, or the policies for it, may have changed, and the kernel rules by the new state from here on: its open
    /// connections are to be held against it.
    Updated(Arc<LocalPod>),
    /// A pod has left the mesh, or the node.
    Released(Arc<LocalPod>),
    /// The kernel refused a plaintext connection to an enrolled pod. Sent while there is room: for logs, not for decisions.
    PlaintextRefused {
        /// Who dialled.
        source: SocketAddr,
        /// What was dialled.
        destination: SocketAddr,
    },
}

/// Why capture cannot work.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// The binary has no programs in it.
    #[error("this build has no eBPF programs in it; build it with `cargo xtask build`, which installs what their compiler needs")]
    NoPrograms,
    /// The kernel is too old, or was built without what is needed.
    #[error("this kernel, Linux {release}, has no {}; use Linux 5.15 or newer on this node", missing.join(", no "))]
    Kernel {
        /// Its version, as it names it.
        release: String,
        /// What it has not, each with the version that brought it.
        missing: Vec<String>,
    },
    /// The agent's own network namespace cannot be read.
    #[error("reading the agent's own network namespace: {0}; /proc is needed")]
    OwnNetns(#[source] io::Error),
    /// There is no cgroup to attach to.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The directory for pins cannot be used.
    #[error(
        "pinning in {}: {source}; mount a bpffs on the node (mount -t bpf bpf DIR) and name it with --bpf-dir, or let agents do it \
         (agent.mountBpffs=true)",
        path.display()
    )]
    Pins {
        /// The directory, or what is pinned.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The object was refused.
    #[error("loading the eBPF object: {0}; Linux 5.15 or newer and CAP_BPF, CAP_NET_ADMIN and CAP_SYS_ADMIN are needed")]
    Object(#[from] EbpfError),
    /// The object lacks a map.
    #[error("the eBPF object has no map {map}: agent and programs are of different versions")]
    NoMap {
        /// The map.
        map: &'static str,
    },
    /// A map was refused.
    #[error("map {map}: {source}")]
    Map {
        /// The map.
        map: &'static str,
        /// Why.
        source: MapError,
    },
    /// The object lacks a program.
    #[error("the eBPF object has no program {program}: agent and programs are of different versions")]
    NoProgram {
        /// The program.
        program: &'static str,
    },
    /// A program was refused.
    #[error("loading or attaching the program {program}: {source}")]
    Program {
        /// The program.
        program: &'static str,
        /// Why.
        source: ProgramError,
    },
    /// A program's link cannot be pinned.
    #[error("the link of the program {program}: {source}")]
    Link {
        /// The program.
        program: &'static str,
        /// Why.
        source: LinkError,
    },
    /// The socket by which the programs learn of the agent cannot be made.
    #[error("marking a socket: {0}; CAP_NET_ADMIN is needed")]
    Mark(#[source] io::Error),
    /// The programs did not see the agent.
    #[error("the programs do not see the agent's own connections: is its cgroup below the cgroup root?")]
    NotNoted,
    /// The namespace directory cannot be watched.
    #[error("watching {}: {source}; create the directory or give another with --netns-dir", path.display())]
    Watch {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The table of mounts, where namespaces appear, cannot be watched.
    #[error("watching {path}: {source}; the agent needs /proc of its own mount namespace", path = mounts::OWN)]
    Mounts {
        /// Why.
        source: io::Error,
    },
    /// Not everything could be removed.
    #[error("could not remove all: {}", failures.join("; "))]
    Remove {
        /// What was left, and why.
        failures: Vec<String>,
    },
}

/// The loaded programs, before pods are enrolled.
pub struct Capture {
    config: LoadConfig,
    directory: enroll::NetnsDir,
    loaded: load::Loaded,
}

impl Capture {
    /// Loads the programs, attaches them to the cgroup and takes over what a predecessor left. Blocks while the kernel verifies
    /// the programs. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// The first step that failed, with the way out where there is one.
    pub fn load(config: &LoadConfig) -> Result<Self, CaptureError> {
        // First of all: where pods cannot be found, nothing may be attached that would keep them waiting.
        let failed = |source| CaptureError::Watch { path: config.netns_dir.clone(), source };
        let directory = enroll::NetnsDir::watch(&config.netns_dir).map_err(failed)?;
        Ok(Self { config: config.clone(), directory, loaded: load::load(config)? })
    }

    /// The maps that the programs decide from.
    #[must_use]
    pub fn maps(&self) -> Maps {
        self.loaded.maps.clone()
    }

    /// The maps of connections between pods of the node that stay in the kernel.
    #[must_use]
    pub fn same_node(&self) -> SameNodeMaps {
        self.loaded.same_node.clone()
    }

    /// What the programs tell of those connections. None: it was taken already.
    #[must_use]
    pub fn take_same_node_events(&mut self) -> Option<SameNodeEvents> {
        self.loaded.same_node_events.take()
    }

    /// Enrols and releases pods until `shutdown`, or until nobody receives `pods`. Everything stays in force in the kernel then.
    ///
    /// # Errors
    /// When the mount table cannot be watched.
    pub async fn run(
        self,
        snapshots: watch::Receiver<Arc<Snapshot>>,
        ask: Ask,
        pods: mpsc::Sender<PodEvent>,
        shutdown: CancellationToken,
    ) -> Result<(), CaptureError> {
        let enroller = enroll::Enroller::new(self.config, self.directory, self.loaded, snapshots, ask, pods);
        enroller.run(shutdown).await
    }
}
