//! The wire formats, generated from `agent/proto` by `build.rs`.
#![allow(missing_docs, unreachable_pub, clippy::all, reason = "generated code")]
#![allow(
    clippy::allow_attributes_without_reason,
    clippy::clone_on_ref_ptr,
    clippy::too_many_lines,
    clippy::wildcard_enum_match_arm,
    reason = "generated code"
)]

pub mod packed;

/// Envoy's discovery protocol.
pub mod discovery {
    tonic::include_proto!("envoy.service.discovery.v3");
}
/// Workloads and services.
pub mod workload {
    tonic::include_proto!("istio.workload");
}
/// Authorization policies.
pub mod security {
    tonic::include_proto!("istio.security");
}
/// The certificate service.
pub mod ca {
    tonic::include_proto!("istio.v1.auth");
}
/// Culvert's own additions.
pub mod culvert {
    tonic::include_proto!("culvert.v1");
}

/// The type URL of workloads and services.
pub const ADDRESS_TYPE: &str = "type.googleapis.com/istio.workload.Address";
/// The type URL of authorization policies.
pub const AUTHORIZATION_TYPE: &str = "type.googleapis.com/istio.security.Authorization";
/// The type URL of the mesh-wide settings.
pub const MESH_TYPE: &str = "type.googleapis.com/culvert.v1.Mesh";
/// The type URL of how a workload speaks to pods of its node, in its extensions.
pub const SAME_NODE_TYPE: &str = "type.googleapis.com/culvert.v1.SameNode";
/// The type URL of which pod a workload is, in its extensions.
pub const POD_TYPE: &str = "type.googleapis.com/culvert.v1.Pod";
/// The type URL of a workload's modes, in its extensions.
pub const PEER_AUTHENTICATION_TYPE: &str = "type.googleapis.com/culvert.v1.PeerAuthentication";
