//! What the agent tells the programs about a network namespace.

use crate::Address;

/// A network namespace, keyed by its cookie.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Namespace {
    state: u32,
    padding: u32,
    generation: u64,
    ipv4: Address,
    ipv6: Address,
}

/// What a network namespace is to the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NamespaceState {
    /// Not a pod in the mesh: its connections are none of ours.
    Exempt,
    /// Not classified yet: it may become a pod in the mesh, so nothing leaves it.
    Pending,
    /// A pod in the mesh.
    Enrolled,
}

const _: () = assert!(size_of::<Namespace>() == 48);

impl Namespace {
    /// A namespace with nothing of ours in it.
    #[must_use]
    pub const fn exempt() -> Self {
        Self { state: 0, padding: 0, generation: 0, ipv4: Address::UNSPECIFIED, ipv6: Address::UNSPECIFIED }
    }

    /// A namespace that waits to be classified.
    #[must_use]
    pub const fn pending() -> Self {
        Self { state: 1, ..Self::exempt() }
    }

    /// An enrolled pod's namespace. A family that the pod lacks is [`Address::UNSPECIFIED`]; `generation` is one that the namespace
    /// has not had before, and not 0.
    #[must_use]
    pub const fn enrolled(ipv4: Address, ipv6: Address, generation: u64) -> Self {
        Self { state: 2, padding: 0, generation, ipv4, ipv6 }
    }

    /// What the namespace is. An unknown value reads as pending, which lets nothing out.
    #[inline(always)]
    #[must_use]
    pub const fn state(&self) -> NamespaceState {
        match self.state {
            0 => NamespaceState::Exempt,
            2 => NamespaceState::Enrolled,
            _ => NamespaceState::Pending,
        }
    }

    /// What verdicts on the pod must be as new as. Verdicts of another generation are void.
    #[inline(always)]
    #[must_use]
    pub const fn generation(&self) -> u64 {
        self.generation
    }

    /// The pod's own address of IPv4 or of IPv6.
    #[inline(always)]
    #[must_use]
    pub const fn own(&self, v4: bool) -> Address {
        if v4 { self.ipv4 } else { self.ipv6 }
    }
}
