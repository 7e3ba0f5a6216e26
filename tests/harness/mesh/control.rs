//! Agents: how they are started, told to stop, and looked into.

use std::path::{Path, PathBuf};

use culvert_ebpf_common::LAYOUT;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{Mesh, NODES};

impl Mesh {
    /// Has agents that are started from now on find this variable in their environment.
    pub fn agent_environment(&mut self, name: &str, value: &str) {
        self.agent_environment.push((name.to_owned(), value.to_owned()));
    }

    /// Has agents that are started from now on hold at most so many descriptors; none: as many as this process may.
    pub fn agent_descriptors(&mut self, limit: Option<u32>) {
        self.agent_descriptors = limit;
    }

    /// Has agents that are started from now on trust the roots in this file, not the controller's own.
    pub fn trust(&mut self, root: &Path) {
        root.clone_into(&mut self.root);
    }

    /// Puts the pods of both nodes into one directory of namespaces, which both agents are given. To be called before either.
    pub fn share_netns_dir(&mut self) {
        self.one_netns_dir = true;
    }

    /// Where the pods' namespaces of a node are mounted.
    #[must_use]
    pub fn netns_dir(&self, node: usize) -> PathBuf {
        if self.one_netns_dir { self.dir.join("netns") } else { self.dir.join(NODES[node]).join("netns") }
    }

    /// Where the agent of a node has pinned its maps.
    #[must_use]
    pub fn pin_dir(&self, node: usize) -> PathBuf {
        self.dir.join(NODES[node]).join("bpf").join(NODES[node]).join(format!("v{LAYOUT}"))
    }

    /// Where the agent of a node keeps what its controller told.
    #[must_use]
    pub fn agent_state_dir(&self, node: usize) -> PathBuf {
        self.dir.join(NODES[node]).join("state")
    }

    /// Sends the controller a signal.
    ///
    /// # Panics
    /// When it does not run.
    pub fn signal_controller(&self, signal: Signal) {
        let controller = self.controller.as_ref().expect("the controller was started");
        kill(Pid::from_raw(controller.id().cast_signed()), signal).expect("the controller runs");
    }

    /// Sends the agent of a node a signal.
    ///
    /// # Panics
    /// When it does not run.
    pub fn signal_agent(&self, node: usize, signal: Signal) {
        let agent = self.agents[node].as_ref().expect("the agent was started");
        kill(Pid::from_raw(agent.id().cast_signed()), signal).expect("the agent runs");
    }

    /// Waits until the agent of a node has ended by itself. Says whether it was in order.
    ///
    /// # Panics
    /// When it does not run.
    pub fn await_agent(&mut self, node: usize) -> bool {
        let mut agent = self.agents[node].take().expect("the agent was started");
        agent.wait().expect("a child of ours").success()
    }
}
