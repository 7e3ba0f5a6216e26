//! What the programs tell the agent through the ring buffer.

use crate::Flow;

/// One event.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    kind: u32,
    /// The process that connected, as the first PID namespace numbers it; 0 where there is none.
    pub pid: u32,
    /// The cookie of the network namespace it happened in; 0 where it is not known.
    pub netns_cookie: u64,
    /// The connection; what is not known is zero.
    pub flow: Flow,
}

/// What an event says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// A connection from a namespace that the agent has not classified was refused.
    UnseenNamespace,
    /// A plaintext connection to an enrolled pod was refused.
    PlaintextRefused,
    /// A kind that this agent does not know.
    Unknown,
}

const _: () = assert!(size_of::<Event>() == 56);

impl Event {
    /// A refused connection from a namespace that is not classified.
    #[inline(always)]
    #[must_use]
    pub const fn unseen_namespace(pid: u32, netns_cookie: u64, flow: Flow) -> Self {
        Self { kind: 1, pid, netns_cookie, flow }
    }

    /// A refused plaintext connection.
    #[inline(always)]
    #[must_use]
    pub const fn plaintext_refused(flow: Flow) -> Self {
        Self { kind: 2, pid: 0, netns_cookie: 0, flow }
    }

    /// What the event says.
    #[must_use]
    pub const fn kind(&self) -> EventKind {
        match self.kind {
            1 => EventKind::UnseenNamespace,
            2 => EventKind::PlaintextRefused,
            _ => EventKind::Unknown,
        }
    }
}
