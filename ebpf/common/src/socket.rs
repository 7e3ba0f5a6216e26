//! What `connect` notes about a socket, for `getpeername` and `sock_ops`. Keyed by the socket's cookie.

use crate::Endpoint;

/// A connecting socket that is ours.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Socket {
    original_dst: Endpoint,
    kind: u32,
}

/// Why a socket is noted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SocketKind {
    /// An application's connection that was redirected to the agent.
    Captured,
    /// The agent's own connection to an application in an enrolled pod.
    Delivery,
}

const _: () = assert!(size_of::<Socket>() == 24);

impl Socket {
    /// A captured connection and the address it was dialled to.
    #[inline(always)]
    #[must_use]
    pub const fn captured(original_dst: Endpoint) -> Self {
        Self { original_dst, kind: 0 }
    }

    /// A delivery to `destination`.
    #[inline(always)]
    #[must_use]
    pub const fn delivery(destination: Endpoint) -> Self {
        Self { original_dst: destination, kind: 1 }
    }

    /// Why it is noted.
    #[inline(always)]
    #[must_use]
    pub const fn kind(&self) -> SocketKind {
        if self.kind == 0 { SocketKind::Captured } else { SocketKind::Delivery }
    }

    /// The address that was dialled.
    #[inline(always)]
    #[must_use]
    pub const fn original_dst(&self) -> Endpoint {
        self.original_dst
    }
}
