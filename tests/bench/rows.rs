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

/// Rows with this path have the other proxy's, too, where that can be measured.
pub(crate) const BOTH: &[Path] = &[Path::Culvert];

const AGENTS_CPU: Figure = Figure::less("agents_cpu", "  both agents' CPU", "s/GB");
const MACHINE_CPU: Figure = Figure::less("machine_cpu", "  the machine's CPU", "s/GB");

const MS: &str = "ms";
const MB: &str = "MB";
const EACH: &str = "KiB each";
const GBITS: &str = "Gbit/s";
const REQUESTS: &str = "requests/s";
const CONNECTIONS: &str = "connections/s";

const MEMORY: &str = "Memory of an agent";
const THROUGHPUT: &str = "Throughput, iperf3";
const REQUEST: &str = "128 B up, 1 KiB down";
const CONNECT: &str = "Connect, one request, close";
const SAME_NODE: &str = "Both pods on one node, in the mesh";
const PASSED: &str = "Connections that need no tunnel";
const SET_UP: &str = "Setting up";

/// All rows, in the order in which they are measured and shown.
pub(crate) const ROWS: &[Row] = &[
    Row {
        name: "memory",
        group: MEMORY,
        measure: Measure::Memory,
        base: None,
        paths: BOTH,
        figures: &[
            Figure::less("idle_a", "idle, client's node", MB).goal(Value(12.0)).peer(Value(15.0)),
            Figure::less("idle_b", "idle, server's node", MB).goal(Value(12.0)).peer(Value(15.0)),
            Figure::less("each_of_1000_a", "1,000 connections, client's node", EACH).goal(Value(6.0)).peer(Value(7.0)),
            Figure::less("each_of_1000_b", "1,000 connections, server's node", EACH).goal(Value(6.0)).peer(Value(7.0)),
            Figure::less("each_of_most_a", "most connections, client's node", EACH).goal(Value(6.0)).peer(Value(7.0)),
            Figure::less("each_of_most_b", "most connections, server's node", EACH).goal(Value(6.0)).peer(Value(7.0)),
            Figure::more("most", "  as descriptors allow, 10,000 at most", "open"),
        ],
    },
    stream("stream-1-up", 1, false, &STREAM_1_UP),
    stream("stream-1-down", 1, true, &STREAM_1_DOWN),
    stream("stream-8-up", 8, false, &STREAM_8_UP),
    stream("stream-8-down", 8, true, &STREAM_8_DOWN),
    Row {
        name: "request-1",
        group: REQUEST,
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
        group: REQUEST,
        measure: Measure::Requests { clients: 64 },
        base: Some(Path::Direct),
        paths: BOTH,
        figures: &[Figure::more("rate", "64 connections", REQUESTS).goal(Ratio(0.38)).peer(Ratio(0.17)), P50, P99],
    },
    Row {
        name: "connect-32",
        group: CONNECT,
        measure: Measure::Connections { clients: 32 },
        base: Some(Path::Direct),
        paths: BOTH,
        figures: &[
            Figure::more("rate", "32 clients connecting", CONNECTIONS).goal(Ratio(0.42)).peer(Ratio(0.20)),
            P50,
            P99,
            FAILED,
        ],
    },
    Row {
        name: "wrk-64",
        group: "64 connections kept alive, 1 KiB",
        measure: Measure::Wrk,
        base: Some(Path::Direct),
        paths: BOTH,
        figures: &[Figure::more("rate", "wrk and nginx", REQUESTS).goal(Ratio(0.40)).peer(Ratio(0.18)), P50, P99],
    },
    Row {
        name: "same-node-stream",
        group: SAME_NODE,
        measure: Measure::Stream { streams: 1, down: false },
        base: Some(Path::DirectSameNode),
        paths: &[Path::SameNode],
        figures: &[Figure::more("rate", "1 stream", GBITS).goal(Ratio(0.95)), AGENTS_CPU, MACHINE_CPU],
    },
    Row {
        name: "same-node-connect",
        group: SAME_NODE,
        measure: Measure::Connections { clients: 32 },
        base: Some(Path::DirectSameNode),
        paths: &[Path::SameNode],
        figures: &[Figure::more("rate", "32 clients connecting", CONNECTIONS).goal(Ratio(0.95)), FAILED],
    },
    Row {
        name: "passed-stream",
        group: PASSED,
        measure: Measure::Stream { streams: 1, down: false },
        base: Some(Path::Direct),
        paths: &[Path::OutOfMesh, Path::Plaintext],
        figures: &[Figure::more("rate", "1 stream", GBITS).goal(Ratio(0.98)), AGENTS_CPU],
    },
    Row {
        name: "passed-connect",
        group: PASSED,
        measure: Measure::Connections { clients: 32 },
        base: Some(Path::Direct),
        paths: &[Path::OutOfMesh, Path::Plaintext],
        figures: &[Figure::more("rate", "32 clients connecting", CONNECTIONS).goal(Ratio(0.98)), FAILED],
    },
    Row {
        name: "first-byte",
        group: SET_UP,
        measure: Measure::FirstByte,
        base: Some(Path::Direct),
        paths: &[Path::Culvert],
        figures: &[
            Figure::less("first", "first answer of a pair, with a handshake", MS),
            Figure::less("next", "the next answer of the pair", MS),
        ],
    },
    Row {
        name: "handshakes",
        group: SET_UP,
        measure: Measure::Handshakes,
        base: None,
        paths: &[Path::Culvert],
        figures: &[Figure::more("rate", "handshakes", "tunnels/s")],
    },
    Row {
        name: "cliff",
        group: "Many sockets in TIME_WAIT, the client closes first",
        measure: Measure::Cliff,
        base: Some(Path::Direct),
        paths: &[Path::Culvert],
        figures: &[
            Figure::more("first", "first quarter of the time", CONNECTIONS),
            Figure::more("last", "last quarter of the time", CONNECTIONS),
            Figure::more("flat", "last quarter to first", "").goal(Value(0.9)).peer(Value(0.11)),
            FAILED,
        ],
    },
    Row {
        name: "mesh-size",
        group: "Size of the mesh, a service for ten workloads",
        measure: Measure::MeshSize,
        base: None,
        paths: &[Path::Culvert],
        figures: &[
            Figure::less("held_10000", "10,000 workloads, an agent holds", MB),
            Figure::less("ready_10000", "  from start to ready", "s"),
            Figure::less("held_200000", "200,000 workloads, an agent holds", MB).goal(Value(150.0)),
            Figure::less("ready_200000", "  from start to ready", "s").goal(Value(2.0)),
        ],
    },
];

const P50: Figure = Figure::less("p50", "  p50", "µs");
const P99: Figure = Figure::less("p99", "  p99", "µs");
const FAILED: Figure = Figure::less("failed", "  failed", "connections");

const STREAM_1_UP: [Figure; 3] = one_stream("1 stream to the server");
const STREAM_1_DOWN: [Figure; 3] = one_stream("1 stream from the server");
const STREAM_8_UP: [Figure; 3] = eight_streams("8 streams to the server");
const STREAM_8_DOWN: [Figure; 3] = eight_streams("8 streams from the server");

const fn stream(name: &'static str, streams: u8, down: bool, figures: &'static [Figure]) -> Row {
    Row { name, group: THROUGHPUT, measure: Measure::Stream { streams, down }, base: Some(Path::Direct), paths: BOTH, figures }
}

const fn one_stream(title: &'static str) -> [Figure; 3] {
    let rate = Figure::more("rate", title, GBITS).goal(Ratio(0.38)).peer(Ratio(0.18));
    [rate, AGENTS_CPU.goal(Value(0.5)).peer(Value(0.95)), MACHINE_CPU]
}

const fn eight_streams(title: &'static str) -> [Figure; 3] {
    [Figure::more("rate", title, GBITS).goal(Ratio(0.41)).peer(Ratio(0.20)), AGENTS_CPU, MACHINE_CPU]
}
