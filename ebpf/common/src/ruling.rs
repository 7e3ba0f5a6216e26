//! What the agent has decided in advance, so that the programs need not ask.

use crate::Address;

/// What happens to a connection of an enrolled pod to a destination. Kept as `u32`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Dispatch {
    /// Let through untouched.
    Pass = 0,
    /// Handed to the agent.
    Capture = 1,
    /// Refused at once.
    Refuse = 2,
}

/// What happens to a plaintext connection to an enrolled pod. Kept as `u32`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Admission {
    /// Refused.
    Drop = 0,
    /// The application takes it.
    Pass = 1,
    /// The agent's plaintext listener takes it and asks the policy.
    Steer = 2,
}

/// Which of the agent's listeners in a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum ListenerRole {
    /// Takes the pod's captured connections.
    Outbound = 0,
    /// Takes plaintext that needs a decision.
    Plaintext = 1,
    /// Takes peers' tunnels.
    Hbone = 2,
}

/// One of the agent's listeners, by the pod's address.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ListenerKey {
    address: Address,
    role: u32,
}

const _: () = assert!(size_of::<ListenerKey>() == 20);

impl Dispatch {
    /// Reads what a map holds. An unknown value is a refusal.
    #[inline(always)]
    #[must_use]
    pub const fn from_u32(value: u32) -> Self {
        match value {
            0 => Self::Pass,
            1 => Self::Capture,
            _ => Self::Refuse,
        }
    }
}

impl Admission {
    /// Reads what a map holds. An unknown value is a refusal.
    #[inline(always)]
    #[must_use]
    pub const fn from_u32(value: u32) -> Self {
        match value {
            1 => Self::Pass,
            2 => Self::Steer,
            _ => Self::Drop,
        }
    }
}

impl ListenerKey {
    /// The listener of `role` for the pod at `address`.
    #[inline(always)]
    #[must_use]
    pub const fn new(address: Address, role: ListenerRole) -> Self {
        Self { address, role: role as u32 }
    }
}
