//! Culvert: mutual TLS for every pod of a node, without a sidecar.
//!
//! ```text
//! controller   objects ─> source ─> index ─> publish ─> serve ── delta xDS, certificates ──┐
//!                                                                                          v
//! agent        ┌──────────────────────── discovery (snapshots) and identity (SVIDs) ────────┐
//!              v                                                                           v
//!   pod ─> capture ─> outbound ─> tunnel ══ TLS 1.3, port 15008 ══ tunnel ─> inbound ─> deliver ─> pod
//!                        └── relay ──┘                               └── policy, relay ──┘
//! ```
//!
//! | module | what it is for |
//! |---|---|
//! | [`node`] | the agent's composition root; start here |
//! | [`capture`] | loads the programs, enrols pods, listens in their namespaces |
//! | [`outbound`], [`inbound`] | the two sides of a connection |
//! | [`same_node`] | connections between pods of the node that stay in the kernel |
//! | [`serve`], [`open_connections`], [`drain`], [`limits`] | accepting, calling off, ending and bounding connections |
//! | [`order`] | connections arrive in the order in which they were made |
//! | [`deliver`] | connections that the agent opens from inside a pod |
//! | [`tunnel`] | TLS, secure naming, the two forms of tunnel, the pool |
//! | [`relay`] | the two-way copy |
//! | [`policy`] | modes and authorization |
//! | [`identity`], [`discovery`] | certificates; the node's view of the mesh |
//! | [`model`] | the nouns, without I/O |
//! | [`observe`] | metrics, access log, readiness, admin interface |
//! | [`controller`] | the certificate authority and the configuration server |
//! | [`installation`], [`diagnosis`] | Culvert on a cluster, and what is wrong with one |
//! | [`cli`], [`config`] | arguments, and the configuration made of them |
//! | [`backoff`], [`footprint`], [`proto`] | pauses before trying again; memory given back; generated wire formats |

pub mod backoff;
pub mod capture;
pub mod cli;
pub mod config;
pub mod controller;
pub mod deliver;
pub mod diagnosis;
pub mod discovery;
pub mod drain;
pub mod footprint;
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
pub mod order;
pub mod outbound;
pub mod policy;
pub mod proto;
pub mod relay;
pub mod same_node;
pub mod serve;
#[cfg(test)]
mod test_memory;
pub mod tunnel;
