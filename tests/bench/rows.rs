//! What is measured, on which paths, and what is to be reached. One [`Row`] is measured as a whole; each of its [`Figure`]s is a line of
//! the table.
//!
//! Goals and yardsticks that depend on the machine are ratios to the direct path in the same run. Latency on one connection, processor
//! time and memory have values: direct has none, or one that tells more of the scheduler's choice of processors than of anything else.

mod catalogue;

use crate::topology::Path;

pub(crate) use catalogue::ROWS;

/// A measurement and what comes of it.
#[derive(Debug)]
pub(crate) struct Row {
    /// What `--only` says.
    pub(crate) name: &'static str,
    /// What it stands below in the table.
    pub(crate) group: &'static str,
    pub(crate) measure: Measure,
    /// What the paths are compared with.
    pub(crate) base: Option<Path>,
    pub(crate) paths: &'static [Path],
    pub(crate) figures: &'static [Figure],
}

impl Row {
    /// Whether it is measured only when it is asked for: it needs programs that take minutes to build.
    pub(crate) fn by_name_only(&self) -> bool {
        self.measure == Measure::ApiScale
    }

    /// Whether another proxy can be measured beside: between two nodes, by nothing that only Culvert has.
    pub(crate) fn of_any_proxy(&self) -> bool {
        let any = match self.measure {
            Measure::Stream { .. } | Measure::Requests { .. } | Measure::Connections { .. } | Measure::Wrk | Measure::Memory => {
                true
            }
            Measure::FirstByte | Measure::Handshakes | Measure::Cliff | Measure::MeshSize | Measure::ApiScale => false,
        };
        any && self.paths == [Path::Culvert]
    }
}

/// How to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Measure {
    /// iperf3 with this many streams, to the server or from it.
    Stream { streams: u8, down: bool },
    /// Requests on this many lasting connections.
    Requests { clients: usize },
    /// A connection for each request, from this many clients.
    Connections { clients: usize },
    /// wrk with 64 connections to nginx.
    Wrk,
    /// The first answer of a pod to another that has never spoken to it.
    FirstByte,
    /// New tunnels.
    Handshakes,
    /// Connections while sockets in TIME_WAIT pile up.
    Cliff,
    /// What the agents hold idle and with connections open.
    Memory,
    /// What an agent holds of a large mesh.
    MeshSize,
    /// What a cluster costs whose objects come from an API server.
    ApiScale,
}

/// A line of the table.
#[derive(Debug)]
pub(crate) struct Figure {
    pub(crate) key: &'static str,
    pub(crate) title: &'static str,
    pub(crate) unit: &'static str,
    pub(crate) better: Better,
    pub(crate) goal: Option<Bound>,
    /// What a well-known peer doing the same job reached.
    pub(crate) peer: Option<Bound>,
}

/// Which way is up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Better {
    More,
    Less,
}

/// A goal or a yardstick.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Bound {
    /// Of the path to its base.
    Ratio(f64),
    /// In the figure's unit.
    Value(f64),
}

impl Figure {
    const fn more(key: &'static str, title: &'static str, unit: &'static str) -> Self {
        Self { key, title, unit, better: Better::More, goal: None, peer: None }
    }

    const fn less(key: &'static str, title: &'static str, unit: &'static str) -> Self {
        Self { key, title, unit, better: Better::Less, goal: None, peer: None }
    }

    const fn goal(mut self, goal: Bound) -> Self {
        self.goal = Some(goal);
        self
    }

    const fn peer(mut self, peer: Bound) -> Self {
        self.peer = Some(peer);
        self
    }
}
