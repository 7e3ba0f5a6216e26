//! Culvert: mutual TLS for every pod of a node, without a sidecar.
pub mod controller;
pub mod model;
pub mod policy;
pub mod proto;
