//! The nouns of the mesh, without I/O: what a workload, an identity, a policy and a snapshot are.
//!
//! Everything here is plain data and pure functions over it. No sockets, clocks, randomness or tasks: time arrives as an
//! argument. Foreign input (wire, manifests, kernel) is turned into these types at its edge and never travels further raw.

pub mod address;
pub mod authorization;
pub mod close_reason;
pub mod enrolment;
pub mod flow;
pub mod mode;
pub mod policy_table;
pub mod same_node;
pub mod snapshot;
pub mod spiffe_id;
pub mod workload;

pub use address::{OriginalDst, PeerAddr, PodIp};
pub use authorization::{Action, Authorization, Clause, IpBlock, Match, Rule, Scope, ServiceAccountMatch, StringMatch};
pub use close_reason::CloseReason;
pub use enrolment::enrolment;
pub use flow::{Flow, Verdict};
pub use mode::{Mode, PeerAuthentication};
pub use policy_table::Applicable;
pub use same_node::SameNode;
pub use snapshot::{Destination, Snapshot};
pub use spiffe_id::{SpiffeId, TrustDomain};
pub use workload::{
    PodAddresses, PodUid, PortMapping, ServedPorts, Service, TelemetryNames, TextEnd, TunnelProtocol, Workload, WorkloadType,
};
