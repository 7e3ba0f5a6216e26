//! The load generator: a server and clients that cost as little as can be, because they share the machine with what is measured. Each is
//! one thread that serves all of its connections without blocking.

pub(crate) mod connections;
pub(crate) mod requests;
pub(crate) mod server;

use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::Result;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollEvent};

/// Bytes of a request.
pub(crate) const REQUEST: usize = 128;
/// Bytes of an answer.
pub(crate) const ANSWER: usize = 1024;

/// Where the server answers every request that comes.
pub(crate) const LASTING: u16 = 9000;
/// Where the server answers one request and closes.
pub(crate) const CLOSING: u16 = 9001;

/// How many events are fetched at once.
const EVENTS: usize = 256;
/// How often the loops look around, in milliseconds.
const LOOK: u16 = 100;
/// How long nothing may happen before the load counts as stuck.
const PATIENCE: Duration = Duration::from_secs(10);

/// What to do, and for how long.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) server: IpAddr,
    pub(crate) clients: usize,
    /// Not counted, before the rest.
    pub(crate) warm_up: Duration,
    pub(crate) lasting: Duration,
}

/// What came of it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Done {
    /// Of each request, or each connection with its request, in nanoseconds, ascending.
    pub(crate) latencies: Vec<u32>,
    /// How many were done in each second.
    pub(crate) seconds: Vec<u32>,
    pub(crate) failures: u64,
    pub(crate) elapsed: Duration,
}

impl Done {
    /// How many were done in a second.
    pub(crate) fn rate(&self) -> f64 {
        self.latencies.len() as f64 / self.elapsed.as_secs_f64()
    }

    /// The latency that this share of all did not exceed, in microseconds.
    pub(crate) fn percentile(&self, share: f64) -> f64 {
        let last = self.latencies.len().saturating_sub(1);
        self.latencies
            .get((last as f64 * share).round() as usize)
            .map_or(f64::NAN, |nanoseconds| f64::from(*nanoseconds) / 1000.0)
    }

    fn count(&mut self, begun: Instant, started: Instant, now: Instant) {
        if now < begun {
            return;
        }
        let latency = now.duration_since(started).as_nanos();
        self.latencies.push(u32::try_from(latency).unwrap_or(u32::MAX));
        let second = now.duration_since(begun).as_secs() as usize;
        if self.seconds.len() <= second {
            self.seconds.resize(second + 1, 0);
        }
        self.seconds[second] += 1;
    }

    fn finish(mut self, elapsed: Duration) -> Self {
        self.latencies.sort_unstable();
        self.elapsed = elapsed;
        self
    }
}

/// Waits for events, but not for long.
fn wait(epoll: &Epoll, events: &mut [EpollEvent]) -> Result<usize> {
    match epoll.wait(events, LOOK) {
        Err(Errno::EINTR) => Ok(0),
        other => Ok(other?),
    }
}
