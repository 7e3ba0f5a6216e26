//! A connection for each request. The server closes first, as servers do that are asked to: so no client runs out of ports.

use std::time::Instant;

use anyhow::{Result, ensure};

use crate::cpu::Clock;
use crate::load::Plan;
use crate::load::connections::{self, Ending};
use crate::measure::{Scale, Values};
use crate::topology::{Path, Topology};

pub(super) fn measure(topology: &Topology, path: Path, scale: Scale, clients: usize) -> Result<Values> {
    let (from, to) = topology.ends(path)?;
    let plan = Plan { server: to.v4, clients, warm_up: scale.warm_up, lasting: scale.lasting };
    let (begun, before) = (Instant::now(), Clock::read(&topology.agents(path))?);
    let done = connections::run(&from.netns, plan, Ending::ServerCloses)?;
    let (by_agents, by_machine) = Clock::read(&topology.agents(path))?.since(before);
    // Those of the warm-up, which are not counted, took as long.
    let each = |seconds: f64| seconds * 1e6 / (done.rate() * begun.elapsed().as_secs_f64());
    ensure!(!done.latencies.is_empty(), "no connection in {:?} on the path {}", done.elapsed, path.name());
    let failed = done.failures as f64;
    Ok(vec![
        ("rate", done.rate()),
        ("p50", done.percentile(0.5)),
        ("p99", done.percentile(0.99)),
        ("failed", failed),
        ("agents_cpu", each(by_agents)),
        ("machine_cpu", each(by_machine)),
    ])
}
