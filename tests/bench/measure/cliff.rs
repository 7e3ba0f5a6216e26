//! Whether connections go on at the rate at which they began, while the server's pod fills up with sockets in TIME_WAIT. The client
//! closes first, so that the socket that waits in the server's pod is the one that whoever delivers has connected from there.

use anyhow::{Result, ensure};

use crate::load::Plan;
use crate::load::connections::{self, Ending};
use crate::measure::{Scale, Values};
use crate::topology::{Path, Topology, set};

const CLIENTS: usize = 32;
/// More than can come to wait, so that the kernel drops none.
const TIME_WAIT_BUCKETS: &str = "262144";

pub(super) fn measure(topology: &Topology, path: Path, scale: Scale) -> Result<Values> {
    let (from, to) = topology.ends(path)?;
    set(&to.netns, "net/ipv4/tcp_max_tw_buckets", TIME_WAIT_BUCKETS)?;
    // The client must not run out of ports by itself: it has many, and takes those that have waited for a second again.
    set(&from.netns, "net/ipv4/ip_local_port_range", "1024 65535")?;
    set(&from.netns, "net/ipv4/tcp_tw_reuse", "1")?;
    let plan = Plan { server: to.v4, clients: CLIENTS, warm_up: scale.warm_up, lasting: scale.cliff };
    let done = connections::run(&from.netns, plan, Ending::ClientCloses)?;
    let whole = usize::try_from(scale.cliff.as_secs())?;
    let seconds: Vec<f64> = (0..whole).map(|second| done.seconds.get(second).copied().map_or(0.0, f64::from)).collect();
    let part = (whole / 4).max(1);
    let mean = |seconds: &[f64]| seconds.iter().sum::<f64>() / seconds.len() as f64;
    let (first, last) = (mean(&seconds[..part]), mean(&seconds[whole - part..]));
    ensure!(first > 0.0, "no connection on the path {}", path.name());
    let mut values = vec![("first", first), ("last", last), ("flat", last / first), ("failed", done.failures as f64)];
    values.extend(seconds.into_iter().map(|count| ("second", count)));
    Ok(values)
}
