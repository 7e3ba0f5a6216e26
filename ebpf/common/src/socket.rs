//! What `connect` notes about a socket, for `getpeername` and `sock_ops`. Kept in the socket.

use crate::{Connection, Endpoint, Flow};

/// A connecting socket that is ours.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Socket {
    original_dst: Endpoint,
    kind: u32,
    source: u64,
    destination: u64,
    generation: u64,
}

/// Why a socket is noted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SocketKind {
    /// An application's connection that was redirected to the agent.
    Captured,
    /// The agent's own connection to an application in an enrolled pod.
    Delivery,
    /// An application's connection that goes straight to another pod of the node.
    SameNode,
}

const _: () = assert!(size_of::<Socket>() == 48);

impl Socket {
    /// A captured connection and the address it was dialled to.
    #[inline(always)]
    #[must_use]
    pub const fn captured(original_dst: Endpoint) -> Self {
        Self { original_dst, kind: 0, source: 0, destination: 0, generation: 0 }
    }

    /// A delivery to `destination`.
    #[inline(always)]
    #[must_use]
    pub const fn delivery(destination: Endpoint) -> Self {
        Self { original_dst: destination, kind: 1, source: 0, destination: 0, generation: 0 }
    }

    /// A connection to `endpoint` that stays in the kernel. `source` and `destination` are the cookies of the two network namespaces,
    /// `generation` is the destination's.
    #[inline(always)]
    #[must_use]
    pub const fn same_node(endpoint: Endpoint, source: u64, destination: u64, generation: u64) -> Self {
        Self { original_dst: endpoint, kind: 2, source, destination, generation }
    }

    /// Why it is noted.
    #[inline(always)]
    #[must_use]
    pub const fn kind(&self) -> SocketKind {
        match self.kind {
            0 => SocketKind::Captured,
            1 => SocketKind::Delivery,
            _ => SocketKind::SameNode,
        }
    }

    /// What is kept of a connection that stays in the kernel, now that both of its ends and the cookie of its source's socket are known.
    #[inline(always)]
    #[must_use]
    pub const fn connection(&self, flow: Flow, socket: u64) -> Connection {
        Connection::new(flow, socket, self.source, self.destination, self.generation)
    }

    /// The cookie of the network namespace that connects; 0 where that is not kept.
    #[inline(always)]
    #[must_use]
    pub const fn source(&self) -> u64 {
        self.source
    }

    /// The address that was dialled.
    #[inline(always)]
    #[must_use]
    pub const fn original_dst(&self) -> Endpoint {
        self.original_dst
    }
}
