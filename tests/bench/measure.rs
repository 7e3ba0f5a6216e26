//! The measurements, one module each. Each gives values by the keys of its row's figures, from one round on one path.

mod connections;
mod memory;
mod requests;
mod throughput;

use std::time::Duration;

use anyhow::Result;

use crate::lab::Lab;
use crate::rows::Measure;
use crate::topology::Path;

/// Values by the keys of figures.
pub(crate) type Values = Vec<(&'static str, f64)>;

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scale {
    pub(crate) rounds: usize,
    /// How long each load lasts.
    pub(crate) lasting: Duration,
    /// How long a load goes on before it is counted.
    pub(crate) warm_up: Duration,
    /// How many connections are opened at most.
    pub(crate) most_connections: usize,
}

impl Scale {
    /// Rounds that make figures to be published, in under 15 minutes.
    pub(crate) const FULL: Self =
        Self { rounds: 3, lasting: Duration::from_secs(4), warm_up: Duration::from_millis(500), most_connections: 10_000 };
    /// Enough to see where one stands, in under 3 minutes.
    pub(crate) const QUICK: Self =
        Self { rounds: 2, lasting: Duration::from_millis(1500), warm_up: Duration::from_millis(250), most_connections: 1000 };
}

impl Measure {
    /// Measures once.
    pub(crate) fn run(self, lab: &mut Lab, path: Path, scale: Scale) -> Result<Values> {
        match self {
            Self::Stream { streams, down } => throughput::measure(lab.topology()?, path, scale, streams, down),
            Self::Requests { clients } => requests::measure(lab.topology()?, path, scale, clients),
            Self::Connections { clients } => connections::measure(lab.topology()?, path, scale, clients),
            Self::Memory => memory::measure(lab.fresh_topology()?, path, scale),
        }
    }

    /// How often it is to be measured. Memory does not vary with what else the machine does.
    pub(crate) fn rounds(self, scale: Scale) -> usize {
        match self {
            Self::Memory => 1,
            Self::Stream { .. } | Self::Requests { .. } | Self::Connections { .. } => scale.rounds,
        }
    }
}
