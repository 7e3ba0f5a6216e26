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

    /// What it means, for who reads the word in a log: a sentence without a stop.
    #[must_use]
    pub fn meaning(self) -> &'static str {
        match self {
            Self::Finished => "both ends closed it in order",
            Self::SourceReset => "the client reset it, or gave up before it was open",
            Self::DestinationReset => "the server reset it",
            Self::DestinationRefused => "nothing listens at the destination's port: is the server up, and on that port?",
            Self::DestinationUnreachable => {
                "the destination or its node did not answer in time: is there a way, and does a NetworkPolicy allow port 15008?"
            }
            Self::NoEndpoint => "the service has no ready endpoint",
            Self::PolicyDenied => {
                "an AuthorizationPolicy of the destination denies it; the line names the policy, or says that no ALLOW matches"
            }
            Self::PolicyChanged => "it was open when a policy or mode changed, and is denied now",
            Self::PlaintextRefused => {
                "it came in plaintext to a port that takes mutual TLS only (STRICT): is the client in the mesh?"
            }
            Self::PeerNotAuthenticated => {
                "the peer's certificate did not verify, or is another workload's than the one meant; the line says which and why"
            }
            Self::TunnelFailed => "the tunnel to the peer broke, or the peer spoke another protocol",
            Self::NoIdentity => {
                "the pod had no certificate in time: can its agent reach the controller? (/certificates of the admin interface says why)"
            }
            Self::NoOriginalDst => {
                "the kernel told no destination for a captured connection: the pod dialled the agent's port itself"
            }
            Self::BadRequest => "the peer asked for an address that is not this pod's",
            Self::Overloaded => {
                "a bound on connections was reached: raise the agent's limit of open files, or look for who floods it"
            }
            Self::Draining => "the agent was told to stop, and the connection was open still at its deadline",
            Self::PodGone => "the pod left the node or the mesh",
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_readme_tells_the_meaning_of_every_word() {
        let readme = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md")).unwrap();
        for reason in CloseReason::ALL {
            let row = format!("| `{reason}` | {} |", reason.meaning());
            assert!(readme.contains(&row), "the README lacks the row: {row}");
        }
    }

    #[test]
    fn a_word_stands_for_one_reason() {
        for reason in CloseReason::ALL {
            assert_eq!(CloseReason::from_word(reason.as_str()), Some(reason));
        }
        assert_eq!(CloseReason::from_word("finished "), None);
    }
}
