//! Throughput with iperf3, and what the processors did for it.

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::cpu::Clock;
use crate::measure::{Scale, Values};
use crate::program;
use crate::topology::{IPERF, Path, Topology};

pub(super) fn measure(topology: &Topology, path: Path, scale: Scale, streams: u8, down: bool) -> Result<Values> {
    let (client, server) = topology.ends(path)?;
    let mut command = client.netns.command("iperf3");
    command.args(["--json", "--client", &server.v4.to_string(), "--port", &IPERF.to_string(), "--connect-timeout", "5000"]);
    command.args(["--parallel", &streams.to_string(), "--time", &scale.lasting.as_secs().max(1).to_string()]);
    if down {
        command.arg("--reverse");
    }
    let agents = topology.agents(path);
    let before = Clock::read(&agents)?;
    let printed = program::output(command)?;
    let (by_agents, by_machine) = Clock::read(&agents)?.since(before);
    let report: Value = serde_json::from_str(&printed).context("iperf3's report")?;
    let received = &report["end"]["sum_received"];
    let number = |field: &str| received[field].as_f64().with_context(|| format!("iperf3 tells no {field}: {}", report["error"]));
    let gigabytes = number("bytes")? / 1e9;
    let mut values = vec![("rate", number("bits_per_second")? / 1e9), ("machine_cpu", by_machine / gigabytes)];
    if !agents.is_empty() {
        values.push(("agents_cpu", by_agents / gigabytes));
    }
    Ok(values)
}
