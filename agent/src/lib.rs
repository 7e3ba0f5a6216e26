//! Culvert: mutual TLS for every pod of a node, without a sidecar.
pub mod backoff;
pub mod capture;
pub mod cli;
pub mod config;
pub mod controller;
pub mod deliver;
pub mod diagnosis;
pub mod discovery;
pub mod drain;
#[cfg(any(test, feature = "fuzz"))]
pub mod fuzz;
pub mod identity;
pub mod inbound;
pub mod installation;
pub mod limits;
pub mod model;
pub mod node;
pub mod observe;
pub mod open_connections;
pub mod outbound;
pub mod policy;
pub mod proto;
pub mod relay;
pub mod serve;
pub mod tunnel;
