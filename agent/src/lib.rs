//! Culvert: mutual TLS for every pod of a node, without a sidecar.
pub mod cli;
pub mod config;
pub mod drain;
pub mod model;
pub mod node;
pub mod observe;
pub mod proto;
