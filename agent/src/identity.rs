//! Who the node's workloads are: their certificates, and the roots that others' are checked against.
//!
//! Enters: the identities of local workloads ([`SvidStore::lease`]), and what the controller answers to certificate requests.
//! Leaves: current [`Svid`]s and the [`TrustBundle`]. Keys are made here, stay in this process's memory and are neither sent nor
//! written. An SVID that is expired is never handed out.
//!
//! ```text
//! lease -> store -> renew (when) -> request (key, CSR) -> channel -> controller
//!                     └-> svid (checked) -> store -> current, changes, bundle
//! ```

pub mod bundle;
pub mod channel;
pub mod clock;
pub mod provider;
mod renew;
pub mod request;
pub mod store;
pub mod svid;
#[cfg(test)]
pub(crate) mod test_authority;
#[cfg(test)]
pub(crate) mod test_server;

pub use bundle::TrustBundle;
pub use channel::ControllerEndpoint;
pub use clock::{Clock, SystemClock};
pub use request::{ControllerIssuer, IssueError, Issuer};
pub use store::{StoreConfig, SvidError, SvidLease, SvidStatus, SvidStore};
pub use svid::{Svid, SvidFault};
