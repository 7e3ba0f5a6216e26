//! What the mesh's size costs an agent that has only few pods of its own: memory, and the time until it knows all of it, for the first one
//! on a node and for the next.

use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use harness::{Mesh, eventually_within};

use crate::cpu::{most_resident, resident};
use crate::interrupt;
use crate::measure::memory::STARTED;
use crate::measure::{Scale, Values};
use crate::metrics;

/// How many workloads, and the keys of what an agent holds with them, of what it held at most, and of how long it takes to know them: the
/// first one, and one that finds what the first has kept.
const SIZES: [(usize, [Keys; 2]); 2] = [
    (10_000, [["held_10000", "peak_10000", "ready_10000"], ["again_10000", "again_peak_10000", "again_ready_10000"]]),
    (200_000, [["held_200000", "peak_200000", "ready_200000"], ["again_200000", "again_peak_200000", "again_ready_200000"]]),
];
type Keys = [&'static str; 3];
/// Workloads for each service, and in each file of manifests.
const A_SERVICE: usize = 10;
const A_FILE: usize = 10_000;
const PATIENCE: Duration = Duration::from_secs(180);
/// The node whose agent is looked at.
const NODE: usize = 1;

pub(super) fn measure(scale: Scale) -> Result<Values> {
    let mut mesh = Mesh::start();
    let mut values = Vec::new();
    let mut written = 0;
    for (size, agents) in SIZES.into_iter().filter(|(size, _)| *size <= scale.most_workloads) {
        mesh.kill_agent(NODE);
        mesh.kill_controller();
        for first in (written..size).step_by(A_FILE) {
            interrupt::check()?;
            mesh.apply_file(&format!("workloads-{first}.json"), &workloads(first..(first + A_FILE).min(size)));
        }
        written = size;
        mesh.start_controller_within(PATIENCE);
        harness::mesh::clear(&mesh.agent_state_dir(NODE));
        for keys in agents {
            mesh.kill_agent(NODE);
            values.extend(measure_agent(&mut mesh, keys)?);
        }
    }
    Ok(values)
}

fn measure_agent(mesh: &mut Mesh, [held, peak, ready]: Keys) -> Result<Values> {
    let begun = Instant::now();
    mesh.start_agent(NODE);
    eventually_within(PATIENCE, "the agent knows the mesh", || {
        interrupt::wanted() || metrics::get(mesh.node(NODE), 15021, "/healthz/ready").is_ok()
    });
    interrupt::check()?;
    let took = begun.elapsed().as_secs_f64();
    let agent = mesh.agent_process(NODE).context("the agent has ended")?;
    std::thread::sleep(STARTED);
    Ok(vec![(ready, took), (held, resident(agent)? / 1e6), (peak, most_resident(agent)? / 1e6)])
}

/// Pods on nodes elsewhere, and a service for a few of them each.
fn workloads(numbers: std::ops::Range<usize>) -> String {
    let mut items = String::from("{\"kind\": \"List\", \"items\": [\n");
    for number in numbers {
        let address = Ipv4Addr::from_bits(Ipv4Addr::new(10, 100, 0, 0).to_bits() + number as u32);
        let group = number / A_SERVICE;
        let _infallible = write!(
            items,
            r#"{{"apiVersion": "v1", "kind": "Pod", "metadata": {{"name": "app-{group}-{number}", "namespace": "team-{team}",
  "uid": "00000000-0000-4000-8000-{number:012}", "labels": {{"app": "app-{group}", "culvert.dev/mesh": "enabled"}}}},
  "spec": {{"nodeName": "node-{node}", "serviceAccountName": "app-{group}", "containers": [{{"name": "app", "image": "none"}}]}},
  "status": {{"phase": "Running", "podIP": "{address}", "podIPs": [{{"ip": "{address}"}}], "conditions": [{{"type": "Ready", "status": "True"}}]}}}},
"#,
            team = group % 100,
            node = number % 1000,
        );
        if number % A_SERVICE == 0 {
            items.push_str(&service(group));
        }
    }
    items.truncate(items.trim_end_matches([',', '\n']).len());
    items.push_str("\n]}\n");
    items
}

fn service(group: usize) -> String {
    let address = Ipv4Addr::from_bits(Ipv4Addr::new(10, 200, 0, 0).to_bits() + group as u32);
    format!(
        r#"{{"apiVersion": "v1", "kind": "Service", "metadata": {{"name": "app-{group}", "namespace": "team-{team}"}},
  "spec": {{"clusterIP": "{address}", "clusterIPs": ["{address}"], "selector": {{"app": "app-{group}"}}, "ports": [{{"name": "http", "port": 80, "targetPort": 8080, "protocol": "TCP"}}]}}}},
"#,
        team = group % 100,
    )
}
