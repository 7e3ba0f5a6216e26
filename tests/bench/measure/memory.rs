//! What agents hold that have carried nothing yet, and what each open connection adds.

use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::sys::resource::{Resource, getrlimit};

use crate::cpu::{anonymous, resident};
use crate::load::connections;
use crate::measure::{Scale, Values};
use crate::topology::{Path, Topology};

/// How many connections are open, and the keys of what each costs the agents. The second step goes as far as descriptors reach.
const STEPS: [(usize, [&str; 2]); 2] =
    [(1000, ["each_of_1000_a", "each_of_1000_b"]), (10_000, ["each_of_most_a", "each_of_most_b"])];
/// An agent gives back what only starting took a moment after it knows the mesh.
pub(super) const STARTED: Duration = Duration::from_secs(4);
/// An agent takes a connection for each four descriptors that it may have, and from one client half of those; some are spoken for.
const DESCRIPTORS_EACH: u64 = 8;
const SPOKEN_FOR: u64 = 400;

pub(super) fn measure(topology: &Topology, path: Path, scale: Scale) -> Result<Values> {
    let (from, to) = topology.ends(path)?;
    let agents = topology.agents(path);
    // One process of another proxy may serve both nodes.
    let agents = agents.first().zip(agents.last()).map(|(near, far)| [*near, *far]).context("nobody carries connections")?;
    std::thread::sleep(STARTED);
    // An agent's code comes and goes with what it does: connections cost what it has for itself.
    let memory = || -> Result<[f64; 2]> { Ok([anonymous(agents[0])?, anonymous(agents[1])?]) };
    let mut values = vec![("idle_a", resident(agents[0])? / 1e6), ("idle_b", resident(agents[1])? / 1e6)];
    let idle = memory()?;
    let mut open = Vec::new();
    let descriptors = getrlimit(Resource::RLIMIT_NOFILE)?.0.saturating_sub(SPOKEN_FOR) / DESCRIPTORS_EACH;
    for (count, keys) in STEPS.into_iter().filter(|(count, _)| *count <= scale.most_connections) {
        let count = count.min(usize::try_from(descriptors)?);
        open.extend(connections::open(&from.netns, to.v4, count.saturating_sub(open.len()))?.1);
        let grown = memory()?;
        values.extend((0..2).map(|agent| (keys[agent], (grown[agent] - idle[agent]) / 1024.0 / count as f64)));
        if count > 1000 {
            values.push(("most", count as f64));
        }
    }
    Ok(values)
}
