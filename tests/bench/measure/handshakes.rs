//! How many tunnels a second are made, when every connection needs one.

use std::time::Instant;

use anyhow::{Result, ensure};

use crate::load::connections;
use crate::measure::Values;
use crate::topology::{Path, Topology};

/// How many connections are opened and kept, so that no tunnel is free for the next.
const CONNECTIONS: usize = 1000;
/// What the agents call their handshakes.
const METRIC: &str = "culvert_handshakes_total{side=\"client\",result=\"ok\"}";

pub(super) fn measure(topology: &Topology, path: Path) -> Result<Values> {
    let (from, to) = topology.ends(path)?;
    let (before, begun) = (topology.metric(0, METRIC)?, Instant::now());
    let (_, open) = connections::open(&from.netns, to.v4, CONNECTIONS)?;
    let elapsed = begun.elapsed().as_secs_f64();
    // Tunnels that earlier rounds have left are used again, and no handshake is counted for them.
    let handshakes = topology.metric(0, METRIC)? - before;
    drop(open);
    ensure!(handshakes > 0.0, "{CONNECTIONS} connections and not one handshake");
    Ok(vec![("rate", handshakes / elapsed)])
}
