//! Istio's TCP metrics, kept per pair of workloads in a table of bounded size.
//!
//! Enters: a connection's participants, once; from then on the connection holds its [`Pair`] and counts in it directly. Leaves:
//! five metric families at a scrape. A pair stays after its last connection, so that its counters don't vanish between two
//! scrapes. When the table is full, pairs that nobody has used for `IDLE_SECONDS` make room; if that yields none, new pairs are
//! counted together under labels that read `overflow` (reporter and security policy are kept).
//!
//! Istio names bytes from the destination's point of view for both reporters: `received` is what travels from source to
//! destination (the request), `sent` what travels back (istio.io, "Istio Standard Metrics"; istio/istio#32399).

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Instant;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;

use super::connection::ConnectionInfo;
use super::labels::{self, SeriesLabels};
use crate::model::CloseReason;

/// How many pairs of workloads are told apart. Each has at least five series, so the page stays near 50,000.
pub(super) const MAX_PAIRS: usize = 10_000;

/// After this time without a connection opened, closed or failed, a pair may make room for another.
const IDLE_SECONDS: u64 = 3600;

/// A full table is searched for idle pairs at most this often.
const SWEEP_SECONDS: u64 = 60;

const REASONS: usize = CloseReason::ALL.len();

type ByReason = [AtomicU64; REASONS];

/// The table of pairs.
#[derive(Debug)]
pub(super) struct Traffic {
    pairs: RwLock<HashMap<Arc<str>, Arc<Pair>>>,
    limit: usize,
    started: Instant,
    last_sweep: AtomicU64,
}

/// The counters of one pair of workloads, as one reporter sees them.
#[derive(Debug, Default)]
pub(super) struct Pair {
    opened: AtomicU64,
    closed: ByReason,
    failed: ByReason,
    to_destination: AtomicU64,
    to_source: AtomicU64,
    last_used: AtomicU64,
}

impl Pair {
    pub(super) fn count_opened(&self) {
        self.opened.fetch_add(1, Relaxed);
    }

    pub(super) fn count_closed(&self, reason: CloseReason) {
        self.closed[reason as usize].fetch_add(1, Relaxed);
    }

    pub(super) fn count_failed(&self, reason: CloseReason) {
        self.failed[reason as usize].fetch_add(1, Relaxed);
    }

    /// Adds bytes that travelled.
    pub(super) fn add_bytes(&self, to_destination: u64, to_source: u64) {
        self.to_destination.fetch_add(to_destination, Relaxed);
        self.to_source.fetch_add(to_source, Relaxed);
    }

    fn value(&self, metric: TrafficMetric) -> Values {
        match metric {
            TrafficMetric::Opened => Values::One(self.opened.load(Relaxed)),
            TrafficMetric::Closed => Values::of(&self.closed, true),
            TrafficMetric::Failed => Values::of(&self.failed, false),
            TrafficMetric::Sent => Values::One(self.to_source.load(Relaxed)),
            TrafficMetric::Received => Values::One(self.to_destination.load(Relaxed)),
        }
    }
}

/// A pair's series in one family.
enum Values {
    One(u64),
    ByFlags(Vec<(&'static str, u64)>),
}

impl Values {
    /// Orderly ends go together under `-`. That series is there from the start if `always`, others from their first count on.
    fn of(counts: &ByReason, always: bool) -> Self {
        let count = |reason: CloseReason| counts[reason as usize].load(Relaxed);
        let orderly = CloseReason::ALL.into_iter().filter(|reason| reason.is_orderly()).map(count).sum();
        let disorderly = CloseReason::ALL.into_iter().filter(|reason| !reason.is_orderly());
        let mut series = vec![("-", orderly)];
        series.extend(disorderly.map(|reason| (reason.as_str(), count(reason))));
        series.retain(|(flags, count)| *count > 0 || (always && *flags == "-"));
        Self::ByFlags(series)
    }
}

#[derive(Clone, Copy)]
enum TrafficMetric {
    Opened,
    Closed,
    Failed,
    Sent,
    Received,
}

impl TrafficMetric {
    const ALL: [Self; 5] = [Self::Opened, Self::Closed, Self::Failed, Self::Sent, Self::Received];

    /// The family's name, to which the encoder adds `_total`, and its help.
    fn describe(self) -> (&'static str, &'static str) {
        match self {
            Self::Opened => ("istio_tcp_connections_opened", "TCP connections opened"),
            Self::Closed => ("istio_tcp_connections_closed", "TCP connections closed after they were opened"),
            Self::Failed => ("istio_tcp_connections_failed", "TCP connections that ended before they were opened"),
            Self::Sent => ("istio_tcp_sent_bytes", "Bytes sent from the destination to the source (the response)"),
            Self::Received => ("istio_tcp_received_bytes", "Bytes sent from the source to the destination (the request)"),
        }
    }
}

impl Traffic {
    /// An empty table for at most `limit` pairs.
    pub(super) fn new(limit: usize) -> Self {
        Self { pairs: RwLock::default(), limit, started: Instant::now(), last_sweep: AtomicU64::new(0) }
    }

    /// The counters for this connection's pair. Made once per connection, never per byte.
    pub(super) fn pair(&self, info: &ConnectionInfo) -> Arc<Pair> {
        let key = labels::pack(info);
        let pair = self.find(&key).unwrap_or_else(|| self.insert(key, info));
        self.touch(&pair);
        pair
    }

    /// Notes that the pair was used just now.
    pub(super) fn touch(&self, pair: &Pair) {
        pair.last_used.store(self.now(), Relaxed);
    }

    fn now(&self) -> u64 {
        self.started.elapsed().as_secs()
    }

    fn find(&self, key: &str) -> Option<Arc<Pair>> {
        self.pairs.read().unwrap_or_else(PoisonError::into_inner).get(key).cloned()
    }

    fn insert(&self, key: String, info: &ConnectionInfo) -> Arc<Pair> {
        let mut pairs = self.pairs.write().unwrap_or_else(PoisonError::into_inner);
        if pairs.len() >= self.limit && !pairs.contains_key(key.as_str()) {
            self.sweep(&mut pairs, self.now());
        }
        let full = pairs.len() >= self.limit && !pairs.contains_key(key.as_str());
        let key = if full { labels::overflow(info) } else { key };
        Arc::clone(pairs.entry(key.into()).or_default())
    }

    /// Takes out the pairs that are idle. A pair held by an open connection has another owner than the table, and stays.
    fn sweep(&self, pairs: &mut HashMap<Arc<str>, Arc<Pair>>, now: u64) {
        if now < self.last_sweep.load(Relaxed) + SWEEP_SECONDS {
            return;
        }
        self.last_sweep.store(now, Relaxed);
        pairs.retain(|_, pair| Arc::strong_count(pair) > 1 || now.saturating_sub(pair.last_used.load(Relaxed)) < IDLE_SECONDS);
    }
}

/// The collector's end of the table: a type of its own because the registry takes ownership.
#[derive(Debug)]
pub(super) struct TrafficCollector(pub(super) Arc<Traffic>);

impl Collector for TrafficCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        // Copied out, so that a scrape holds up nobody who opens a connection.
        let pairs: Vec<_> = {
            let pairs = self.0.pairs.read().unwrap_or_else(PoisonError::into_inner);
            pairs.iter().map(|(key, pair)| (Arc::clone(key), Arc::clone(pair))).collect()
        };
        for metric in TrafficMetric::ALL {
            let (name, help) = metric.describe();
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for (key, pair) in &pairs {
                match pair.value(metric) {
                    Values::One(value) => encode(&mut family, key, "-", value)?,
                    Values::ByFlags(series) => {
                        for (flags, value) in series {
                            encode(&mut family, key, flags, value)?;
                        }
                    }
                }
            }
        }
        Ok(())
    }
}

fn encode(family: &mut MetricEncoder<'_>, pair: &str, response_flags: &'static str, value: u64) -> Result<(), fmt::Error> {
    let labels = SeriesLabels { pair, response_flags };
    family.encode_family(&labels)?.encode_counter::<NoLabelSet, _, u64>(&value, None)
}

#[cfg(test)]
mod tests {
    use super::super::connection::fixtures::info;
    use super::*;

    fn named(name: &str) -> ConnectionInfo {
        let mut info = info();
        let mut workload = info.source.as_deref().expect("a source").clone();
        Arc::make_mut(&mut workload.telemetry).workload = Some(name.into());
        info.source = Some(Arc::new(workload));
        info
    }

    #[test]
    fn connections_of_one_pair_share_their_counters() {
        let traffic = Traffic::new(8);
        assert!(Arc::ptr_eq(&traffic.pair(&named("a")), &traffic.pair(&named("a"))));
        assert!(!Arc::ptr_eq(&traffic.pair(&named("a")), &traffic.pair(&named("b"))));
    }

    #[test]
    fn pairs_beyond_the_limit_are_counted_as_overflow() {
        let traffic = Traffic::new(2);
        let (_a, _b) = (traffic.pair(&named("a")), traffic.pair(&named("b")));
        let (c, d) = (traffic.pair(&named("c")), traffic.pair(&named("d")));
        assert!(Arc::ptr_eq(&c, &d), "pairs without room are told apart");
        assert_eq!(traffic.pairs.read().expect("no panic").len(), 3);
        assert!(Arc::ptr_eq(&traffic.pair(&named("a")), &_a), "a pair inside the table lost its place");
    }

    #[test]
    fn a_full_table_gives_up_idle_pairs_and_keeps_open_ones() {
        let traffic = Traffic::new(2);
        let held = traffic.pair(&named("held"));
        drop(traffic.pair(&named("idle")));
        let mut pairs = traffic.pairs.write().expect("no panic");
        traffic.sweep(&mut pairs, IDLE_SECONDS - 1);
        assert_eq!(pairs.len(), 2, "a pair was dropped too soon");
        traffic.sweep(&mut pairs, IDLE_SECONDS + SWEEP_SECONDS);
        assert_eq!(pairs.len(), 1);
        assert!(pairs.values().all(|pair| Arc::ptr_eq(pair, &held)));
    }
}
