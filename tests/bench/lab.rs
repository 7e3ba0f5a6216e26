//! The topology as long as it is needed: made when a measurement first asks for it.

use std::path::PathBuf;

use anyhow::Result;

use crate::topology::Topology;

/// At most one topology at a time.
#[derive(Debug)]
pub(crate) struct Lab {
    /// Starts and stops the other proxy.
    other: Option<PathBuf>,
    topology: Option<Topology>,
}

impl Lab {
    /// Nothing yet.
    pub(crate) fn new(other: Option<PathBuf>) -> Self {
        Self { other, topology: None }
    }

    /// The topology, whatever has been done on it before.
    pub(crate) fn topology(&mut self) -> Result<&mut Topology> {
        let topology = match self.topology.take() {
            Some(topology) => topology,
            None => Topology::start(self.other.as_deref())?,
        };
        Ok(self.topology.insert(topology))
    }

    /// A topology whose agents have carried next to nothing.
    pub(crate) fn fresh_topology(&mut self) -> Result<&mut Topology> {
        self.clear();
        self.topology()
    }

    /// Removes the topology.
    pub(crate) fn clear(&mut self) {
        self.topology = None;
    }
}
