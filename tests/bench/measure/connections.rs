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
    let agents = topology.agents(path);
    let (begun, before) = (Instant::now(), Clock::read(&agents)?);
    let done = connections::run(&from.netns, plan, Ending::ServerCloses)?;
    let (by_agents, by_machine) = Clock::read(&agents)?.since(before);
    let elapsed = begun.elapsed().as_secs_f64();
    ensure!(!done.latencies.is_empty(), "no connection in {:?} on the path {}", done.elapsed, path.name());
    // Those of the warm-up, which are not counted, took as long.
    let each = |seconds: f64| seconds * 1e6 / (done.rate() * elapsed);
    let failed = done.failures as f64;
    let mut values = vec![
        ("rate", done.rate()),
        ("p50", done.percentile(0.5)),
        ("p99", done.percentile(0.99)),
        ("failed", failed),
        ("machine_cpu", each(by_machine)),
    ];
    if !agents.is_empty() {
        values.push(("agents_cpu", each(by_agents)));
    }
    Ok(values)
}
