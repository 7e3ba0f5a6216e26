//! Culvert: mutual TLS for every pod of a node, without a sidecar.
pub mod deliver;
pub mod identity;
pub mod model;
pub mod policy;
pub mod proto;
pub mod relay;
pub mod tunnel;
