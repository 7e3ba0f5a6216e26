//! Culvert: mutual TLS for every pod of a node, without a sidecar.
pub mod drain;
pub mod model;
pub mod observe;
pub mod proto;
