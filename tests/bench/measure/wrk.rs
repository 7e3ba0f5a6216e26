//! wrk with 64 connections that are kept alive, to an nginx that serves 1 KiB.

use anyhow::{Context as _, Result};

use crate::measure::{Scale, Values};
use crate::program;
use crate::topology::{NGINX, Path, Topology};

pub(super) fn measure(topology: &Topology, path: Path, scale: Scale) -> Result<Values> {
    let (from, to) = topology.ends(path)?;
    let mut command = from.netns.command("wrk");
    let seconds = scale.lasting.as_secs().max(1);
    command.args(["--threads", "1", "--connections", "64", "--latency", "--duration", &format!("{seconds}s")]);
    command.arg(format!("http://{}/", to.at(false, NGINX)));
    read(&program::output(command)?)
}

/// The figures in what wrk prints.
fn read(report: &str) -> Result<Values> {
    let after = |start: &str| report.lines().find_map(|line| line.trim_start().strip_prefix(start)).map(str::trim);
    let rate = after("Requests/sec:").with_context(|| format!("wrk tells no rate: {report}"))?.parse()?;
    let microseconds = |start| after(start).and_then(in_microseconds).with_context(|| format!("wrk tells no {start}: {report}"));
    Ok(vec![("rate", rate), ("p50", microseconds("50%")?), ("p99", microseconds("99%")?)])
}

fn in_microseconds(text: &str) -> Option<f64> {
    let unit = text.find(char::is_alphabetic)?;
    let factor = match &text[unit..] {
        "us" => 1.0,
        "ms" => 1e3,
        "s" => 1e6,
        _ => return None,
    };
    Some(text[..unit].parse::<f64>().ok()? * factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPORT: &str = "Running 1s test @ http://127.0.0.1/\n  Latency Distribution\n     50%  410.00us\n     99%    1.50ms\nRequests/sec: 149012.5\n";

    #[test]
    fn the_rate_and_the_latencies_are_found_whatever_their_unit() {
        assert_eq!(read(REPORT).unwrap(), [("rate", 149_012.5), ("p50", 410.0), ("p99", 1500.0)]);
        assert!(read("unable to connect").is_err());
    }
}
