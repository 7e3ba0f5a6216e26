//! Request and answer on lasting connections.

use anyhow::Result;

use crate::load::{Plan, requests};
use crate::measure::{Scale, Values};
use crate::topology::{Path, Topology};

pub(super) fn measure(topology: &Topology, path: Path, scale: Scale, clients: usize) -> Result<Values> {
    let (from, to) = topology.ends(path)?;
    let plan = Plan { server: to.v4, clients, warm_up: scale.warm_up, lasting: scale.lasting };
    let done = requests::run(&from.netns, plan)?;
    Ok(vec![("rate", done.rate()), ("p50", done.percentile(0.5)), ("p99", done.percentile(0.99))])
}
