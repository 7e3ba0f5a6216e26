//! The topology as long as it is needed: made when a measurement first asks for it.

use anyhow::Result;

use crate::topology::Topology;

/// At most one topology at a time.
#[derive(Debug, Default)]
pub(crate) struct Lab(Option<Topology>);

impl Lab {
    /// The topology, whatever has been done on it before.
    pub(crate) fn topology(&mut self) -> Result<&Topology> {
        let topology = match self.0.take() {
            Some(topology) => topology,
            None => Topology::start()?,
        };
        Ok(self.0.insert(topology))
    }

    /// A topology whose agents have carried next to nothing.
    pub(crate) fn fresh_topology(&mut self) -> Result<&Topology> {
        self.0 = None;
        self.topology()
    }
}
