//! What the agent tells the programs about itself.

/// The one entry of the settings map.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// Cookies of the network namespaces that are the node's own: the first network namespace and the agent's.
    pub host_cookies: [u64; 2],
    /// `CLOCK_MONOTONIC` in ns up to which a connection from a network namespace that the agent has not seen is refused; the agent
    /// keeps it ahead of now while it runs. `u64::MAX`: for ever, also when the agent is gone.
    pub refuse_unseen_until_ns: u64,
    /// The agent's secret: a process that connects with this socket mark is noted as an agent. 0: none is being taken in.
    pub agent_mark: u32,
    /// Must be 0.
    pub padding: u32,
}

const _: () = assert!(size_of::<Settings>() == 32);
