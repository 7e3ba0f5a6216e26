//! Connections between two enrolled pods of one node that stay in the kernel: what lets them, and what is told of them.

use crate::{Address, Endpoint, Flow};

/// What a verdict is about: who connects, and where to.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct VerdictKey {
    /// The cookie of the source's network namespace.
    source: u64,
    destination: Endpoint,
    padding: u32,
}

/// The agent's word that connections may go straight to the pod, for as long as neither pod has changed: each change gives a pod
/// another generation. A denial has no entry.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The generation of the source's entry among the namespaces.
    pub source_generation: u64,
    /// The cookie of the destination's network namespace.
    pub destination: u64,
    /// The generation of the destination's entry among the namespaces. 0, which no entry has: it was tried in vain, since the kernel gives
    /// such a connection another source than the pod's own address, or the network does not let it through.
    pub destination_generation: u64,
    /// `CLOCK_MONOTONIC` in ns when the first of both pods' certificates ends, and the verdict with it.
    pub expires_ns: u64,
}

/// How many bytes the ring buffer has in which the programs tell of connections.
pub const CONNECTION_EVENTS_LENGTH: u32 = 1024 * 1024;

/// A connection that stays in the kernel.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connection {
    /// Both ends.
    pub flow: Flow,
    /// The cookie of the source's socket, which no other socket of this kernel ever has.
    pub socket: u64,
    /// The cookie of the source's network namespace.
    pub source: u64,
    /// The cookie of the destination's network namespace.
    pub destination: u64,
    /// The generation of the destination's entry among the namespaces by which it was let go.
    pub generation: u64,
    /// The cookie of the destination's socket; 0 until there is one.
    pub accepted: u64,
    /// The ends that are closed, whether in order, and what becomes of the entry: bits that the programs know.
    pub closed: u64,
    /// `CLOCK_MONOTONIC` in ns when it was open, 0 before; once it has ended, how long it was, in ns.
    pub open_ns: u64,
    /// Bytes that the source sent and the destination's kernel has received; 0 before it has ended.
    pub sent: u64,
    /// Bytes that the destination sent and the source's kernel has received; 0 before it has ended.
    pub received: u64,
    /// The same as the source's socket counted them, which may have taken the destination's FIN for one; 0 before that is closed.
    pub arrived: u64,
    stage: u32,
    /// 1: it was handed to the agent, because the destination had changed meanwhile.
    pub steered: u32,
}

/// How far a connection has come. Kept as `u32`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Stage {
    /// It is being set up.
    Connecting = 0,
    /// It is open.
    Open = 1,
    /// Both ends closed it in order.
    Finished = 2,
    /// The source ended it out of order.
    SourceReset = 3,
    /// The destination ended it out of order.
    DestinationReset = 4,
    /// It was refused, and never open.
    Refused = 5,
    /// Nobody answered, or the source gave up, and it was never open.
    Unanswered = 6,
}

const _: () = assert!(size_of::<VerdictKey>() == 32 && size_of::<Verdict>() == 32);
const _: () = assert!(size_of::<Connection>() == 128);

impl VerdictKey {
    /// Connections from the namespace of this cookie to `destination`.
    #[inline(always)]
    #[must_use]
    pub const fn new(source: u64, destination: Endpoint) -> Self {
        Self { source, destination, padding: 0 }
    }
}

impl Connection {
    /// A connection that is being set up.
    #[inline(always)]
    #[must_use]
    pub const fn new(flow: Flow, socket: u64, source: u64, destination: u64, generation: u64) -> Self {
        Self {
            flow,
            socket,
            source,
            destination,
            generation,
            accepted: 0,
            closed: 0,
            open_ns: 0,
            sent: 0,
            received: 0,
            arrived: 0,
            stage: Stage::Connecting as u32,
            steered: 0,
        }
    }

    /// How far it has come. A value that is not known reads as being set up.
    #[inline(always)]
    #[must_use]
    pub const fn stage(&self) -> Stage {
        match self.stage {
            1 => Stage::Open,
            2 => Stage::Finished,
            3 => Stage::SourceReset,
            4 => Stage::DestinationReset,
            5 => Stage::Refused,
            6 => Stage::Unanswered,
            _ => Stage::Connecting,
        }
    }

    /// Notes how far it has come.
    #[inline(always)]
    pub const fn set_stage(&mut self, stage: Stage) {
        self.stage = stage as u32;
    }
}

impl Flow {
    /// The same connection, told from its other end.
    #[inline(always)]
    #[must_use]
    pub const fn reversed(self) -> Self {
        Self { source: self.destination, destination: self.source }
    }

    /// Whether the end that dialled is at `address`.
    #[inline(always)]
    #[must_use]
    pub fn is_from(&self, address: Address) -> bool {
        self.source.address() == address
    }
}
