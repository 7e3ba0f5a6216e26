//! Why a connection ended. The same word appears in the access log, in metrics and in the command line's output.

use std::fmt;

/// Why a connection ended. Every connection ends with exactly one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CloseReason {
    /// Both directions ended in order.
    Finished,
    /// The source's side reset the connection.
    SourceReset,
    /// The destination's side reset the connection.
    DestinationReset,
    /// Nothing listens at the destination.
    DestinationRefused,
    /// The destination could not be reached in time, or there is no way to it.
    DestinationUnreachable,
    /// The service has no ready endpoint.
    NoEndpoint,
    /// The destination's authorization policy denies the connection.
    PolicyDenied,
    /// A change of policy or mode denied the connection while it was open.
    PolicyChanged,
    /// Plaintext came to a port that takes mutual TLS only.
    PlaintextRefused,
    /// The peer's certificate did not verify, or names another workload than the one meant.
    PeerNotAuthenticated,
    /// The tunnel to the peer broke or spoke another protocol.
    TunnelFailed,
    /// This workload had no certificate in time.
    NoIdentity,
    /// The original destination of a captured connection is not known.
    NoOriginalDst,
    /// The request was for an address that is not this pod's, or for a port of the agent's own.
    BadRequest,
    /// A bound on open connections was reached.
    Overloaded,
    /// The agent is stopping.
    Draining,
    /// The pod went away.
    PodGone,
}

impl CloseReason {
    /// All of them, in the order of their numbers: `ALL[i] as usize == i`.
    pub const ALL: [Self; 17] = [
        Self::Finished,
        Self::SourceReset,
        Self::DestinationReset,
        Self::DestinationRefused,
        Self::DestinationUnreachable,
        Self::NoEndpoint,
        Self::PolicyDenied,
        Self::PolicyChanged,
        Self::PlaintextRefused,
        Self::PeerNotAuthenticated,
        Self::TunnelFailed,
        Self::NoIdentity,
        Self::NoOriginalDst,
        Self::BadRequest,
        Self::Overloaded,
        Self::Draining,
        Self::PodGone,
    ];

    /// The reason of this word.
    #[must_use]
    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| reason.as_str() == word)
    }

    /// The word for logs and metric labels.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Finished => "finished",
            Self::SourceReset => "source_reset",
            Self::DestinationReset => "destination_reset",
            Self::DestinationRefused => "destination_refused",
            Self::DestinationUnreachable => "destination_unreachable",
            Self::NoEndpoint => "no_endpoint",
            Self::PolicyDenied => "policy_denied",
            Self::PolicyChanged => "policy_changed",
            Self::PlaintextRefused => "plaintext_refused",
            Self::PeerNotAuthenticated => "peer_not_authenticated",
            Self::TunnelFailed => "tunnel_failed",
            Self::NoIdentity => "no_identity",
            Self::NoOriginalDst => "no_original_dst",
            Self::BadRequest => "bad_request",
            Self::Overloaded => "overloaded",
            Self::Draining => "draining",
            Self::PodGone => "pod_gone",
        }
    }

    /// Whether the connection was set up and then ended as its ends wanted.
    #[must_use]
    pub fn is_orderly(self) -> bool {
        matches!(self, Self::Finished | Self::SourceReset | Self::DestinationReset)
    }
}

const _: () = {
    let mut i = 0;
    while i < CloseReason::ALL.len() {
        assert!(CloseReason::ALL[i] as usize == i, "`ALL` is not in the order of the numbers");
        i += 1;
    }
    // `PodGone` is the last variant: with one added after it, `ALL` must grow as well.
    assert!(CloseReason::ALL.len() == CloseReason::PodGone as usize + 1);
};

impl fmt::Display for CloseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
