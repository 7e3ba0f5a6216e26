//! What policy is asked about, and what it answers.

use std::net::SocketAddr;
use std::sync::Arc;

use super::SpiffeId;

/// One connection as the destination sees it: all that an L4 policy may look at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flow {
    /// The source's identity from its verified certificate chain; none for plaintext.
    pub source_identity: Option<SpiffeId>,
    /// The source's address and port. Never IPv4-mapped.
    pub source: SocketAddr,
    /// The destination workload's address and the port that its application listens on. Never IPv4-mapped.
    pub destination: SocketAddr,
}

/// Allow or deny, with the policy that decided (`namespace/name`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The connection may pass. `by` is the ALLOW policy that matched; none when no ALLOW policy applies.
    Allow {
        /// The policy that decided.
        by: Option<Arc<str>>,
    },
    /// The connection is refused. `by` is the DENY policy that matched; none when ALLOW policies apply and none matched, or
    /// when the mesh denies by default.
    Deny {
        /// The policy that decided.
        by: Option<Arc<str>>,
    },
}

impl Verdict {
    /// Whether the connection may pass.
    #[must_use]
    pub fn allowed(&self) -> bool {
        matches!(self, Self::Allow { .. })
    }
}
