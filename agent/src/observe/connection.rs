//! The accounting of one connection: opened, bytes, and exactly one end.
//!
//! Enters: the participants ([`ConnectionInfo`]), bytes as the relay counts them ([`ByteCounts`]), the reason of the end. Leaves:
//! the traffic metrics, one access-log line, and the list of open connections. The relay never calls in here: it adds to two
//! atomics, which are read at a scrape, so that long connections show while they run, and at the close, exact to the byte.
//!
//! A connection is either opened and closed, or failed. One that is dropped without a word ended because the agent is stopping.

use std::collections::HashMap;
use std::fmt;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::access_log::{self, Ended, Participants};
use super::metrics::Metrics;
use super::traffic::Pair;
use crate::model::{CloseReason, Service, SpiffeId, Workload};

/// Locks that open and closed connections are spread over.
const SHARDS: usize = 16;

/// Which end of the connection is this agent's pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The pod dialled. Metrics say `reporter="source"`.
    Outbound,
    /// The pod was dialled. Metrics say `reporter="destination"`.
    Inbound,
}

impl Direction {
    pub(super) const ALL: [Self; 2] = [Self::Outbound, Self::Inbound];

    /// The word for logs and labels.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
        }
    }

    /// Bytes from source to destination and back, as the agent's own pod sees them: sent, received.
    fn of_pod(self, [sent, received]: [u64; 2]) -> [u64; 2] {
        match self {
            Self::Outbound => [sent, received],
            Self::Inbound => [received, sent],
        }
    }
}

/// How the connection travels between its pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Security {
    /// In a tunnel, both ends authenticated.
    MutualTls,
    /// Within the node's kernel, which attests both ends, and not encrypted.
    Attested,
    /// As it is.
    None,
}

impl Security {
    /// The word for logs.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::MutualTls => "mutual_tls",
            Self::Attested => "attested",
            Self::None => "plaintext",
        }
    }
}

/// Who takes part in a connection. What is not known is none.
#[derive(Clone, Debug)]
pub struct ConnectionInfo {
    /// Which end is this agent's pod.
    pub direction: Direction,
    /// The workload that dialled.
    pub source: Option<Arc<Workload>>,
    /// The address that it dialled from.
    pub source_addr: SocketAddr,
    /// Its identity, verified or attested; none for plaintext.
    pub source_identity: Option<SpiffeId>,
    /// The workload that was dialled.
    pub destination: Option<Arc<Workload>>,
    /// The address and port that the application at the destination listens on.
    pub destination_addr: SocketAddr,
    /// The address that the application at the source dialled, where it is another.
    pub original_dst: Option<SocketAddr>,
    /// The destination's identity, verified or attested; none for plaintext.
    pub destination_identity: Option<SpiffeId>,
    /// The service that was dialled, if it was one.
    pub destination_service: Option<Arc<Service>>,
    /// How the connection travels.
    pub security: Security,
}

impl ConnectionInfo {
    /// A plaintext connection of which only the ends are known.
    #[must_use]
    pub fn new(direction: Direction, source_addr: SocketAddr, destination_addr: SocketAddr) -> Self {
        Self {
            direction,
            source: None,
            source_addr,
            source_identity: None,
            destination: None,
            destination_addr,
            original_dst: None,
            destination_identity: None,
            destination_service: None,
            security: Security::None,
        }
    }
}

/// Bytes of payload that have been passed on, without what tunnels add. The same meaning in both directions.
#[derive(Debug, Default)]
pub struct ByteCounts {
    /// From the source to the destination. Istio's metric for these is `istio_tcp_received_bytes_total`.
    pub sent: AtomicU64,
    /// From the destination to the source. Istio's metric for these is `istio_tcp_sent_bytes_total`.
    pub received: AtomicU64,
}

/// The agent's eyes: shared by everything that sees connections. Clones are cheap and the same observer.
#[derive(Clone, Debug)]
pub struct Observer(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    metrics: Metrics,
    next_id: AtomicU64,
    open_count: AtomicUsize,
    open: [Mutex<HashMap<u64, Arc<Entry>>>; SHARDS],
}

/// What connections have in common that differ in the source's port alone. While there is one of these, its counters keep their place.
#[derive(Debug)]
pub struct Recurring {
    direction: Direction,
    pair: Arc<Pair>,
    participants: Participants,
}

/// An open connection, as the table of open connections holds it.
#[derive(Debug)]
struct Entry {
    id: u64,
    info: ConnectionInfo,
    opened_at: Instant,
    bytes: ByteCounts,
    flushed: ByteCounts,
    pair: Arc<Pair>,
}

/// One open connection as operators see it.
#[derive(Clone, Debug)]
pub struct OpenView {
    /// A number that no other connection of this agent has.
    pub id: u64,
    /// Who takes part.
    pub info: ConnectionInfo,
    /// Bytes that the agent's pod sent.
    pub bytes_sent: u64,
    /// Bytes that the agent's pod received.
    pub bytes_received: u64,
    /// How long it has been open.
    pub age: Duration,
}

impl Observer {
    /// An observer that has seen nothing yet, for the agent of `node`.
    #[must_use]
    pub fn new(node: &str) -> Self {
        Self(Arc::new(Inner {
            metrics: Metrics::new(node),
            next_id: AtomicU64::new(1),
            open_count: AtomicUsize::new(0),
            open: Default::default(),
        }))
    }

    /// The agent's metrics.
    #[must_use]
    pub fn metrics(&self) -> &Metrics {
        &self.0.metrics
    }

    /// Counts a connection as opened. It is open until [`OpenConnection::close`] or drop.
    #[must_use = "the connection ends when this is dropped"]
    pub fn open(&self, info: ConnectionInfo) -> OpenConnection {
        let pair = self.0.metrics.traffic.pair(&info);
        pair.count_opened();
        self.0.metrics.open_gauge(info.direction).inc();
        let entry = Arc::new(Entry {
            id: self.0.next_id.fetch_add(1, Relaxed),
            info,
            opened_at: Instant::now(),
            bytes: ByteCounts::default(),
            flushed: ByteCounts::default(),
            pair,
        });
        self.0.open_count.fetch_add(1, Relaxed);
        self.shard(entry.id).lock().unwrap_or_else(PoisonError::into_inner).insert(entry.id, Arc::clone(&entry));
        OpenConnection { observer: self.clone(), entry, closed: false }
    }

    /// Counts and logs a connection that ended before it was opened.
    pub fn fail(&self, info: &ConnectionInfo, reason: CloseReason, detail: &dyn fmt::Display) {
        self.0.metrics.traffic.pair(info).count_failed(reason);
        self.0.metrics.count_closed(reason);
        access_log::failed(info, reason, detail);
    }

    /// What connections have in common that are like this one but for the source's port, for [`carried`](Self::carried).
    #[must_use]
    pub fn recurring(&self, info: &ConnectionInfo) -> Recurring {
        let (pair, participants) = (self.0.metrics.traffic.pair(info), Participants::new(info));
        Recurring { direction: info.direction, pair, participants }
    }

    /// Counts and logs a connection that others have carried, when it is over: one of `recurring` from `source_port`, which was open for as
    /// long as they say. `sent` bytes went from its source to its destination, `received` back.
    pub fn carried(
        &self,
        recurring: &Recurring,
        source_port: u16,
        [sent, received]: [u64; 2],
        lasted: Duration,
        reason: CloseReason,
    ) {
        let pair = &recurring.pair;
        pair.count_opened();
        pair.add_bytes(sent, received);
        pair.count_closed(reason);
        self.0.metrics.traffic.touch(pair);
        self.0.metrics.count_closed(reason);
        let [bytes_sent, bytes_received] = recurring.direction.of_pod([sent, received]);
        let ended = Ended { bytes_sent, bytes_received, duration: lasted, reason, detail: None };
        access_log::closed_between(&recurring.participants, source_port, &ended);
    }

    /// Writes the page of metrics in OpenMetrics text, open connections included up to this moment. Takes as long as `page` takes what is
    /// written, and holds nobody up.
    ///
    /// # Errors
    /// Those of `page`: the metrics add none of their own.
    pub fn expose(&self, page: &mut impl fmt::Write) -> fmt::Result {
        self.each_open(|entry| entry.flush());
        self.0.metrics.encode(page)
    }

    /// How many connections are open.
    #[must_use]
    pub fn open_count(&self) -> usize {
        self.0.open_count.load(Relaxed)
    }

    /// Open connections, at most `limit` of them, the oldest of those first.
    #[must_use]
    pub fn open_connections(&self, limit: usize) -> Vec<OpenView> {
        let mut entries = Vec::new();
        self.each_open(|entry| {
            if entries.len() < limit {
                entries.push(Arc::clone(entry));
            }
        });
        entries.sort_unstable_by_key(|entry| entry.id);
        entries.iter().map(|entry| entry.view()).collect()
    }

    fn each_open(&self, mut visit: impl FnMut(&Arc<Entry>)) {
        for shard in &self.0.open {
            shard.lock().unwrap_or_else(PoisonError::into_inner).values().for_each(&mut visit);
        }
    }

    fn shard(&self, id: u64) -> &Mutex<HashMap<u64, Arc<Entry>>> {
        &self.0.open[(id % SHARDS as u64) as usize]
    }
}

impl Entry {
    /// Adds to the metrics what was counted since the last flush. Scrape and close may come at once: `fetch_max` gives every byte
    /// to exactly one of them.
    fn flush(&self) {
        let new = |counted: &AtomicU64, flushed: &AtomicU64| {
            let counted = counted.load(Relaxed);
            counted.saturating_sub(flushed.fetch_max(counted, Relaxed))
        };
        let to_destination = new(&self.bytes.sent, &self.flushed.sent);
        let to_source = new(&self.bytes.received, &self.flushed.received);
        self.pair.add_bytes(to_destination, to_source);
    }

    fn view(&self) -> OpenView {
        let [bytes_sent, bytes_received] = self.pod_bytes();
        let age = self.opened_at.elapsed();
        OpenView { id: self.id, info: self.info.clone(), bytes_sent, bytes_received, age }
    }

    /// Bytes as the agent's own pod sees them: sent, received.
    fn pod_bytes(&self) -> [u64; 2] {
        self.info.direction.of_pod([&self.bytes.sent, &self.bytes.received].map(|bytes| bytes.load(Relaxed)))
    }
}

/// A connection that counts as open. Dropped without [`OpenConnection::close`], it ends with [`CloseReason::Draining`].
#[derive(Debug)]
pub struct OpenConnection {
    observer: Observer,
    entry: Arc<Entry>,
    closed: bool,
}

impl OpenConnection {
    /// Where the relay counts the bytes that it has passed on.
    #[must_use]
    pub fn bytes(&self) -> &ByteCounts {
        &self.entry.bytes
    }

    /// Ends the connection: counts it and writes its line in the access log. All bytes must have been counted.
    pub fn close(mut self, reason: CloseReason, detail: Option<&dyn fmt::Display>) {
        let lasted = self.entry.opened_at.elapsed();
        self.end(lasted, reason, detail);
    }

    /// The same, of a connection that others have watched, for as long as they say.
    pub fn close_after(mut self, lasted: Duration, reason: CloseReason) {
        self.end(lasted, reason, None);
    }

    /// The connection goes on without this agent: its end is another's to tell.
    pub fn leave(mut self) {
        self.closed = true;
    }

    fn end(&mut self, duration: Duration, reason: CloseReason, detail: Option<&dyn fmt::Display>) {
        self.closed = true;
        let entry = &self.entry;
        let inner = &self.observer.0;
        self.observer.shard(entry.id).lock().unwrap_or_else(PoisonError::into_inner).remove(&entry.id);
        inner.open_count.fetch_sub(1, Relaxed);
        entry.flush();
        entry.pair.count_closed(reason);
        inner.metrics.traffic.touch(&entry.pair);
        inner.metrics.count_closed(reason);
        inner.metrics.open_gauge(entry.info.direction).dec();
        let [bytes_sent, bytes_received] = entry.pod_bytes();
        let ended = Ended { bytes_sent, bytes_received, duration, reason, detail };
        access_log::closed(&entry.info, &ended);
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        if !self.closed {
            let lasted = self.entry.opened_at.elapsed();
            self.end(lasted, CloseReason::Draining, None);
        }
    }
}

#[cfg(test)]
pub(crate) mod fixtures;
#[cfg(test)]
mod tests;
