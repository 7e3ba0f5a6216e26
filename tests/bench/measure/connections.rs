//! A connection for each request. The server closes first, as servers do that are asked to: so no client runs out of ports.

use anyhow::{Result, ensure};

use crate::load::client::{self, ClosesFirst, Plan};
use crate::measure::{Scale, Values};
use crate::topology::{Path, Topology};

pub(crate) fn measure(topology: &Topology, path: Path, scale: Scale, clients: usize) -> Result<Values> {
    let (from, to) = topology.ends(path);
    let plan = Plan { server: to.v4, clients, warm_up: scale.warm_up, lasting: scale.lasting };
    let done = client::connections(&from.netns, plan, ClosesFirst::Server)?;
    ensure!(!done.latencies.is_empty(), "no connection in {:?} on the path {}", done.elapsed, path.name());
    let failed = done.failures as f64;
    Ok(vec![("rate", done.rate()), ("p50", done.percentile(0.5)), ("p99", done.percentile(0.99)), ("failed", failed)])
}
