//! All rows: what is to be reached, and what the peer reached, beside direct connections of the same run.

use super::Bound::{Ratio, Value};
use super::{Figure, Measure, Row};
use crate::topology::Path;

/// All rows, in the order in which they are measured and shown.
pub(crate) const ROWS: &[Row] = &[
    Row {
        name: "memory",
        group: MEMORY,
        measure: Measure::Memory,
        base: None,
        paths: &[Path::Culvert],
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
        paths: &[Path::Culvert],
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
        paths: &[Path::Culvert],
        figures: &[Figure::more("rate", "64 connections", REQUESTS).goal(Ratio(0.38)).peer(Ratio(0.17)), P50, P99],
    },
    Row {
        name: "connect-32",
        group: CONNECT,
        measure: Measure::Connections { clients: 32 },
        base: Some(Path::Direct),
        paths: &[Path::Culvert],
        figures: &[
            Figure::more("rate", "32 clients connecting", CONNECTIONS).goal(Ratio(0.42)).peer(Ratio(0.20)),
            P50,
            P99,
            AGENTS_CPU_EACH,
            MACHINE_CPU_EACH,
            FAILED,
        ],
    },
    Row {
        name: "wrk-64",
        group: "64 connections kept alive, 1 KiB",
        measure: Measure::Wrk,
        base: Some(Path::Direct),
        paths: &[Path::Culvert],
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
        figures: &[
            Figure::more("rate", "32 clients connecting", CONNECTIONS).goal(Ratio(0.95)),
            AGENTS_CPU_EACH,
            MACHINE_CPU_EACH,
            FAILED,
        ],
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
        figures: &[Figure::more("rate", "32 clients connecting", CONNECTIONS).goal(Ratio(0.98)), MACHINE_CPU_EACH, FAILED],
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
            Figure::less("held_10000", "10,000 workloads, held by an agent", MB),
            Figure::less("peak_10000", "  at most, while it starts", MB),
            Figure::less("ready_10000", "10,000 workloads, start to ready", "s"),
            Figure::less("again_10000", "  held by the next agent", MB),
            Figure::less("again_peak_10000", "  at most, while that starts", MB),
            Figure::less("again_ready_10000", "  the next agent, start to ready", "s"),
            Figure::less("held_200000", "200,000 workloads, held by an agent", MB).goal(Value(150.0)),
            Figure::less("peak_200000", "  at most, while it starts", MB),
            Figure::less("ready_200000", "200,000 workloads, start to ready", "s").goal(Value(2.0)),
            Figure::less("again_200000", "  held by the next agent", MB),
            Figure::less("again_peak_200000", "  at most, while that starts", MB),
            Figure::less("again_ready_200000", "  the next agent, start to ready", "s"),
        ],
    },
    Row {
        name: "api-scale",
        group: "10,000 pods on 500 nodes in a real API server",
        measure: Measure::ApiScale,
        base: None,
        paths: &[Path::Culvert],
        figures: &[
            Figure::less("start", "controller, start to serving", "s"),
            Figure::less("controller", "controller, held", MB),
            Figure::less("controller_peak", "  at most, while it starts", MB),
            Figure::less("agents", "500 agents at once, until all know all", "s"),
            Figure::less("agents_lost", "  that had to connect again", "times"),
            Figure::less("controller_500", "controller with 500 agents, held", MB),
            Figure::less("controller_500_peak", "  at most, while they connect", MB),
            Figure::less("change", "a pod's change, until the last agent knows", MS),
            Figure::less("change_bytes", "  received for it by each", "bytes"),
            Figure::less("agent_ready", "agent, start to ready", "s"),
            Figure::less("agent", "agent, held", MB),
            Figure::less("agent_peak", "  at most, while it starts", MB),
            Figure::less("agent_resources", "  sent to it", "resources"),
            Figure::less("agent_bytes", "  sent to it", "kB"),
            Figure::less("again_ready", "agent, after 10 changes, start to ready", "s"),
            Figure::less("again", "agent, started again, held", MB),
            Figure::less("again_peak", "  at most, while it starts", MB),
            Figure::less("again_resources", "  sent to it", "resources"),
            Figure::less("again_bytes", "  sent to it", "kB"),
            Figure::less("agents_again", "a new controller, until 500 agents agree", "s"),
            Figure::less("agents_again_resources", "  sent to an agent at most", "resources"),
            Figure::less("controller_again", "  held by it", MB),
            Figure::less("controller_again_peak", "  at most, while they come", MB),
        ],
    },
];

const AGENTS_CPU: Figure = Figure::less("agents_cpu", "  both agents' CPU", "s/GB");
const MACHINE_CPU: Figure = Figure::less("machine_cpu", "  the machine's CPU", "s/GB");
const AGENTS_CPU_EACH: Figure = Figure::less("agents_cpu", "  both agents' CPU", "µs each");
const MACHINE_CPU_EACH: Figure = Figure::less("machine_cpu", "  the machine's CPU", "µs each");

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
const P50: Figure = Figure::less("p50", "  p50", "µs");
const P99: Figure = Figure::less("p99", "  p99", "µs");
const FAILED: Figure = Figure::less("failed", "  failed", "connections");

const STREAM_1_UP: [Figure; 3] = one_stream("1 stream to the server");
const STREAM_1_DOWN: [Figure; 3] = one_stream("1 stream from the server");
const STREAM_8_UP: [Figure; 3] = eight_streams("8 streams to the server");
const STREAM_8_DOWN: [Figure; 3] = eight_streams("8 streams from the server");

const fn stream(name: &'static str, streams: u8, down: bool, figures: &'static [Figure]) -> Row {
    Row {
        name,
        group: THROUGHPUT,
        measure: Measure::Stream { streams, down },
        base: Some(Path::Direct),
        paths: &[Path::Culvert],
        figures,
    }
}

const fn one_stream(title: &'static str) -> [Figure; 3] {
    let rate = Figure::more("rate", title, GBITS).goal(Ratio(0.38)).peer(Ratio(0.18));
    [rate, AGENTS_CPU.goal(Value(0.5)).peer(Value(0.95)), MACHINE_CPU]
}

const fn eight_streams(title: &'static str) -> [Figure; 3] {
    [Figure::more("rate", title, GBITS).goal(Ratio(0.41)).peer(Ratio(0.20)), AGENTS_CPU, MACHINE_CPU]
}
