//! What is measured, on which paths, and what is to be reached. One [`Row`] is measured as a whole; each of its [`Figure`]s is a line of
//! the table.
//!
//! Goals and yardsticks that depend on the machine are ratios to the direct path in the same run. Latency on one connection, processor
//! time and memory have values: direct has none, or one that tells more of the scheduler's choice of processors than of anything else.

use crate::topology::Path;

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

/// How to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Measure {
    /// iperf3 with this many streams, to the server or from it.
    Stream { streams: u8, down: bool },
    /// Requests on this many lasting connections.
    Requests { clients: usize },
    /// A connection for each request, from this many clients.
    Connections { clients: usize },
    /// What the agents hold idle and with connections open.
    Memory,
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

use Bound::{Ratio, Value};

const BOTH: &[Path] = &[Path::Culvert];

const AGENTS_CPU: Figure = Figure::less("agents_cpu", "  both agents' CPU", "s/GB");
const MACHINE_CPU: Figure = Figure::less("machine_cpu", "  the machine's CPU", "s/GB");

/// All rows, in the order in which they are measured and shown.
pub(crate) const ROWS: &[Row] = &[
    Row {
        name: "memory",
        group: "Memory of an agent",
        measure: Measure::Memory,
        base: None,
        paths: BOTH,
        figures: &[
            Figure::less("idle_a", "idle, client's node", "MB").goal(Value(12.0)).peer(Value(15.0)),
            Figure::less("idle_b", "idle, server's node", "MB").goal(Value(12.0)).peer(Value(15.0)),
            Figure::less("each_of_1000_a", "1,000 connections, client's node", "KiB each").goal(Value(6.0)).peer(Value(7.0)),
            Figure::less("each_of_1000_b", "1,000 connections, server's node", "KiB each").goal(Value(6.0)).peer(Value(7.0)),
            Figure::less("each_of_most_a", "most connections, client's node", "KiB each").goal(Value(6.0)).peer(Value(7.0)),
            Figure::less("each_of_most_b", "most connections, server's node", "KiB each").goal(Value(6.0)).peer(Value(7.0)),
        ],
    },
    Row {
        name: "stream-1-up",
        group: "Throughput, iperf3",
        measure: Measure::Stream { streams: 1, down: false },
        base: Some(Path::Direct),
        paths: BOTH,
        figures: &[
            Figure::more("rate", "1 stream to the server", "Gbit/s").goal(Ratio(0.38)).peer(Ratio(0.18)),
            AGENTS_CPU.goal(Value(0.5)).peer(Value(0.95)),
            MACHINE_CPU,
        ],
    },
    Row {
        name: "stream-1-down",
        group: "Throughput, iperf3",
        measure: Measure::Stream { streams: 1, down: true },
        base: Some(Path::Direct),
        paths: BOTH,
        figures: &[
            Figure::more("rate", "1 stream from the server", "Gbit/s").goal(Ratio(0.38)).peer(Ratio(0.18)),
            AGENTS_CPU.goal(Value(0.5)).peer(Value(0.95)),
            MACHINE_CPU,
        ],
    },
    Row {
        name: "stream-8-up",
        group: "Throughput, iperf3",
        measure: Measure::Stream { streams: 8, down: false },
        base: Some(Path::Direct),
        paths: BOTH,
        figures: &[
            Figure::more("rate", "8 streams to the server", "Gbit/s").goal(Ratio(0.41)).peer(Ratio(0.20)),
            AGENTS_CPU,
            MACHINE_CPU,
        ],
    },
    Row {
        name: "stream-8-down",
        group: "Throughput, iperf3",
        measure: Measure::Stream { streams: 8, down: true },
        base: Some(Path::Direct),
        paths: BOTH,
        figures: &[
            Figure::more("rate", "8 streams from the server", "Gbit/s").goal(Ratio(0.41)).peer(Ratio(0.20)),
            AGENTS_CPU,
            MACHINE_CPU,
        ],
    },
    Row {
        name: "request-1",
        group: "128 B up, 1 KiB down",
        measure: Measure::Requests { clients: 1 },
        base: Some(Path::Direct),
        paths: BOTH,
        figures: &[
            Figure::less("p50", "1 connection, p50", "µs").goal(Value(100.0)).peer(Value(134.0)),
            Figure::less("p99", "1 connection, p99", "µs").goal(Value(160.0)).peer(Value(241.0)),
        ],
    },
    Row {
        name: "request-64",
        group: "128 B up, 1 KiB down",
        measure: Measure::Requests { clients: 64 },
        base: Some(Path::Direct),
        paths: BOTH,
        figures: &[
            Figure::more("rate", "64 connections", "requests/s").goal(Ratio(0.38)).peer(Ratio(0.17)),
            Figure::less("p50", "  p50", "µs"),
            Figure::less("p99", "  p99", "µs"),
        ],
    },
    Row {
        name: "connect-32",
        group: "Connect, one request, close",
        measure: Measure::Connections { clients: 32 },
        base: Some(Path::Direct),
        paths: BOTH,
        figures: &[
            Figure::more("rate", "32 clients", "connections/s").goal(Ratio(0.42)).peer(Ratio(0.20)),
            Figure::less("p99", "  p99", "µs"),
        ],
    },
];
