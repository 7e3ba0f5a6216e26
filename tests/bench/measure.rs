//! The measurements, one module each. Each gives values by the keys of its row's figures, from one round on one path; a key may have
//! several.

mod api_scale;
mod cliff;
mod connections;
mod first_byte;
mod handshakes;
mod memory;
mod mesh_size;
mod requests;
mod throughput;
mod wrk;

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
    /// How long connections must go on at one rate, in whole seconds.
    pub(crate) cliff: Duration,
    /// How many connections are opened at most.
    pub(crate) most_connections: usize,
    /// How many workloads there are at most.
    pub(crate) most_workloads: usize,
    /// How many pods are made that have never spoken before, in each round.
    pub(crate) newcomers: usize,
    /// How many pods of a cluster change, one after the other.
    pub(crate) pod_changes: usize,
}

impl Scale {
    /// Figures to be published, in under 15 minutes.
    pub(crate) const FULL: Self = Self {
        rounds: 5,
        lasting: Duration::from_secs(4),
        warm_up: Duration::from_millis(500),
        cliff: Duration::from_secs(20),
        most_connections: 10_000,
        most_workloads: 200_000,
        newcomers: 5,
        pod_changes: 50,
    };
    /// Enough to see where one stands, in under 3 minutes.
    pub(crate) const QUICK: Self = Self {
        rounds: 3,
        lasting: Duration::from_millis(1500),
        warm_up: Duration::from_millis(250),
        cliff: Duration::from_secs(8),
        most_connections: 1000,
        most_workloads: 10_000,
        newcomers: 3,
        pod_changes: 20,
    };
}

impl Measure {
    /// Measures once.
    pub(crate) fn run(self, lab: &mut Lab, path: Path, scale: Scale) -> Result<Values> {
        match self {
            Self::Stream { streams, down } => throughput::measure(lab.topology()?, path, scale, streams, down),
            Self::Requests { clients } => requests::measure(lab.topology()?, path, scale, clients),
            Self::Connections { clients } => connections::measure(lab.topology()?, path, scale, clients),
            Self::Wrk => wrk::measure(lab.topology()?, path, scale),
            Self::FirstByte => first_byte::measure(lab.topology()?, path, scale),
            Self::Handshakes => handshakes::measure(lab.topology()?, path),
            Self::Cliff => cliff::measure(lab.topology()?, path, scale),
            Self::Memory => memory::measure(lab.fresh_topology()?, path, scale),
            Self::MeshSize => {
                lab.clear();
                mesh_size::measure(scale)
            }
            Self::ApiScale => {
                lab.clear();
                api_scale::measure(scale)
            }
        }
    }

    /// How often it is measured. Memory does not vary with what else the machine does, and the cliff has its first seconds to compare
    /// its last with.
    pub(crate) fn rounds(self, scale: Scale) -> usize {
        match self {
            Self::Memory | Self::MeshSize | Self::ApiScale | Self::Cliff => 1,
            Self::Stream { .. }
            | Self::Requests { .. }
            | Self::Connections { .. }
            | Self::Wrk
            | Self::FirstByte
            | Self::Handshakes => scale.rounds,
        }
    }
}
