//! Culvert: mutual TLS for every pod of a node, without a sidecar.
pub mod capture;
pub mod cli;
pub mod config;
pub mod controller;
pub mod deliver;
pub mod discovery;
pub mod drain;
pub mod identity;
pub mod model;
pub mod observe;
pub mod policy;
pub mod proto;
pub mod relay;
pub mod tunnel;
