//! What a workload takes from its clients: mutual TLS, plaintext, or both.

use std::collections::BTreeMap;
use std::fmt;

/// What a workload's port accepts (`security.istio.io` `PeerAuthentication`, `mtls.mode`, with UNSET already resolved).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Mode {
    /// Tunnels and plaintext. The default: a workload that joins the mesh breaks nobody.
    #[default]
    Permissive,
    /// Tunnels only; plaintext is refused.
    Strict,
    /// Plaintext; peers in the mesh do not tunnel either. A tunnel that comes all the same is served.
    Disable,
}

/// The modes of one workload after all scopes were weighed: the narrowest won.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct PeerAuthentication {
    /// The mode of every port without one of its own.
    pub mode: Mode,
    /// Modes by the port that the application listens on.
    pub ports: BTreeMap<u16, Mode>,
}

impl PeerAuthentication {
    /// The mode of `port`.
    #[must_use]
    pub fn mode_of(&self, port: u16) -> Mode {
        self.ports.get(&port).copied().unwrap_or(self.mode)
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Permissive => "PERMISSIVE",
            Self::Strict => "STRICT",
            Self::Disable => "DISABLE",
        })
    }
}
