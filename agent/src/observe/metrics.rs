//! Every metric of the agent.
//!
//! Enters: facts from the parts that know them, through typed methods; counts kept elsewhere (the programs' outcomes, dropped log
//! lines), read at each scrape. Leaves: one page of OpenMetrics text ([`super::Observer::expose`]).
//!
//! The encoder appends `_total` to counters and `_info` to infos; the names in the tests are the ones a scraper sees. A label value
//! that comes from outside is escaped, and the number of its values is bounded.

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

use super::connection::Direction;
use super::labels::Escaped;
use super::log;
use super::received::XdsReceived;
use super::traffic::{MAX_PAIRS, Traffic, TrafficCollector};
use crate::model::{Action, CloseReason, SpiffeId, Verdict};
use crate::policy::evaluate::Evaluation;

/// How many series of policy verdicts are told apart; later policies are counted as `overflow`.
const MAX_VERDICT_SERIES: usize = 5_000;

/// The page's media type.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Which end of a TLS handshake or tunnel this agent is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// It dialled.
    Client,
    /// It accepted.
    Server,
}

impl Side {
    const ALL: [Self; 2] = [Self::Client, Self::Server];

    /// The word for a label.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Server => "server",
        }
    }
}

/// Reads counts that are kept elsewhere: label value and count since start.
pub type CountSource = Box<dyn Fn() -> Vec<(&'static str, u64)> + Send + Sync>;

/// Every metric of the agent. All methods are cheap enough for once a connection; none is for once a read.
pub struct Metrics {
    own: Registry,
    pairs: Registry,
    pub(super) traffic: Arc<Traffic>,
    closed: [Counter; CloseReason::ALL.len()],
    connections_open: [Gauge; 2],
    tunnels_open: [Gauge; 2],
    handshakes: Family<[(&'static str, &'static str); 2], Counter>,
    handshake_duration: [Histogram; 2],
    certificate_requests: Family<[(&'static str, &'static str); 1], Counter>,
    certificate_expiry: Family<IdentityLabel, Gauge>,
    verdicts: Family<VerdictLabels, Counter>,
    verdict_series: AtomicUsize,
    xds_connected: Gauge,
    xds_received: XdsReceived,
    enrolled_pods: Gauge,
    plaintext_refused: Counter,
    capture_outcomes: Arc<OnceLock<CountSource>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct IdentityLabel {
    identity: Escaped,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct VerdictLabels {
    policy: Escaped,
    verdict: &'static str,
    dry_run: &'static str,
}

/// A tunnel that is open, counted until it is dropped.
#[derive(Debug)]
pub struct CountedTunnel(Gauge);

/// The counters of what one evaluation says.
#[derive(Debug)]
pub struct CountedVerdicts(Vec<Counter>);

impl CountedVerdicts {
    /// Counts it once.
    pub fn count(&self) {
        for counter in &self.0 {
            counter.inc();
        }
    }
}

impl Drop for CountedTunnel {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl Metrics {
    /// All metrics at zero, for the agent of `node`.
    #[must_use]
    pub fn new(node: &str) -> Self {
        let mut metrics = Self {
            own: Registry::default(),
            pairs: Registry::default(),
            traffic: Arc::new(Traffic::new(MAX_PAIRS)),
            closed: Default::default(),
            connections_open: Default::default(),
            tunnels_open: Default::default(),
            handshakes: Family::default(),
            handshake_duration: std::array::from_fn(|_| Histogram::new(exponential_buckets(0.000_5, 2.0, 14))),
            certificate_requests: Family::default(),
            certificate_expiry: Family::default(),
            verdicts: Family::default(),
            verdict_series: AtomicUsize::new(0),
            xds_connected: Gauge::default(),
            xds_received: XdsReceived::default(),
            enrolled_pods: Gauge::default(),
            plaintext_refused: Counter::default(),
            capture_outcomes: Arc::default(),
        };
        let mut own = Registry::with_prefix("culvert");
        metrics.register_own(&mut own, node);
        metrics.own = own;
        metrics.pairs.register_collector(Box::new(TrafficCollector(Arc::clone(&metrics.traffic))));
        metrics
    }

    fn register_own(&self, registry: &mut Registry, node: &str) {
        let build = [("version", Escaped::from(env!("CARGO_PKG_VERSION"))), ("node", Escaped::from(node))];
        registry.register("build", "What runs here, and on which node", Info::new(build));
        registry.register("xds_connected", "1 while the agent is connected to its controller", self.xds_connected.clone());
        self.xds_received.register(registry);
        registry.register("enrolled_pods", "Pods of this node that are enrolled", self.enrolled_pods.clone());
        registry.register("plaintext_refused", "Plaintext connections refused by mode", self.plaintext_refused.clone());
        registry.register("handshakes", "TLS handshakes by side and result", self.handshakes.clone());
        registry.register(
            "certificate_requests",
            "Requests for workload certificates, by result",
            self.certificate_requests.clone(),
        );
        registry.register(
            "certificate_expiry_timestamp_seconds",
            "When the certificate held for an identity expires, in seconds since 1970",
            self.certificate_expiry.clone(),
        );
        registry.register("policy_verdicts", "Authorization verdicts by policy", self.verdicts.clone());
        registry.register_collector(Box::new(OwnCollector {
            closed: CloseReason::ALL.map(|reason| (reason.as_str(), self.closed[reason as usize].clone())),
            connections_open: Direction::ALL.map(|direction| (direction.as_str(), self.open_gauge(direction).clone())),
            tunnels_open: Side::ALL.map(|side| (side.as_str(), self.tunnels_open[side as usize].clone())),
            handshake_duration: Side::ALL.map(|side| (side.as_str(), self.handshake_duration[side as usize].clone())),
            capture_outcomes: Arc::clone(&self.capture_outcomes),
        }));
    }

    /// Writes the page. Counts of open connections are as fresh as their last flush: see [`super::Observer::expose`].
    pub(super) fn encode(&self, page: &mut impl fmt::Write) -> fmt::Result {
        // Families are locked while they are written, and `page` may wait for a slow client; the table of pairs is not.
        let mut own = String::new();
        encode_registry(&mut own, &self.own)?;
        page.write_str(&own)?;
        drop(own);
        encode_registry(page, &self.pairs)?;
        encode_eof(page)
    }

    pub(super) fn count_closed(&self, reason: CloseReason) {
        self.closed[reason as usize].inc();
    }

    pub(super) fn open_gauge(&self, direction: Direction) -> &Gauge {
        &self.connections_open[direction as usize]
    }

    /// Sets where the programs' outcome counts are read at each scrape. Only the first call has an effect.
    pub fn read_capture_outcomes_from(&self, source: CountSource) {
        if self.capture_outcomes.set(source).is_err() {
            tracing::debug!("the source of capture outcomes is already set");
        }
    }

    /// Counts a TLS handshake and its duration. `result` is `ok` or one of a fixed set of words, such as a close reason's.
    pub fn handshake(&self, side: Side, result: &'static str, duration: Duration) {
        self.handshakes.get_or_create(&[("side", side.as_str()), ("result", result)]).inc();
        self.handshake_duration[side as usize].observe(duration.as_secs_f64());
    }

    /// Counts a request for a certificate. `result` is one of a fixed set of words: `issued`, `refused`, `unavailable`.
    pub fn certificate_request(&self, result: &'static str) {
        self.certificate_requests.get_or_create(&[("result", result)]).inc();
    }

    /// Notes when the certificate held for `identity` expires, in seconds since 1970.
    pub fn certificate_held(&self, identity: &SpiffeId, expires_unix_seconds: i64) {
        self.certificate_expiry.get_or_create(&identity_label(identity)).set(expires_unix_seconds);
    }

    /// Forgets the certificate of `identity`: no pod of the node has it any more. What keeps the series bounded.
    pub fn certificate_dropped(&self, identity: &SpiffeId) {
        self.certificate_expiry.remove(&identity_label(identity));
    }

    /// Counts a verdict. `policy` is `namespace/name`, or none where no policy decided (`-`).
    pub fn policy_verdict(&self, policy: Option<&str>, verdict: &'static str, dry_run: bool) {
        self.verdict_counter(policy, verdict, dry_run).inc();
    }

    fn verdict_counter(&self, policy: Option<&str>, verdict: &'static str, dry_run: bool) -> Counter {
        let dry_run = if dry_run { "true" } else { "false" };
        let mut labels = VerdictLabels { policy: policy.unwrap_or("-").into(), verdict, dry_run };
        if self.verdicts.get(&labels).is_none() && self.verdict_series.fetch_add(1, Relaxed) >= MAX_VERDICT_SERIES {
            self.verdict_series.fetch_sub(1, Relaxed);
            labels.policy = "overflow".into();
        }
        self.verdicts.get_or_create(&labels).clone()
    }

    /// Counts what policy evaluation said: the verdict, what dry-run policies would have done, and what was audited.
    pub fn evaluation(&self, evaluation: &Evaluation) {
        self.verdicts_of(evaluation).count();
    }

    /// What counts the same evaluation again and again.
    #[must_use]
    pub fn verdicts_of(&self, evaluation: &Evaluation) -> CountedVerdicts {
        let (by, verdict) = match &evaluation.verdict {
            Verdict::Allow { by } => (by, "allow"),
            Verdict::Deny { by } => (by, "deny"),
        };
        let mut counters = vec![self.verdict_counter(by.as_deref(), verdict, false)];
        for (policy, action) in &evaluation.dry_run {
            let verdict = match action {
                Action::Allow => "allow",
                Action::Deny => "deny",
                Action::Audit => "audit",
            };
            counters.push(self.verdict_counter(Some(policy), verdict, true));
        }
        counters.extend(evaluation.audited.iter().map(|policy| self.verdict_counter(Some(policy), "audit", false)));
        CountedVerdicts(counters)
    }

    /// Notes whether the agent is connected to its controller.
    pub fn set_xds_connected(&self, connected: bool) {
        self.xds_connected.set(i64::from(connected));
    }

    /// What counts what comes from the controller.
    #[must_use]
    pub fn xds_received(&self) -> XdsReceived {
        self.xds_received.clone()
    }

    /// Notes how many pods of the node are enrolled.
    pub fn set_enrolled_pods(&self, pods: usize) {
        self.enrolled_pods.set(i64::try_from(pods).unwrap_or(i64::MAX));
    }

    /// Counts a plaintext connection that the mode refused.
    pub fn plaintext_refused(&self) {
        self.plaintext_refused.inc();
    }

    /// Counts a tunnel as open until the value is dropped.
    #[must_use = "the tunnel counts as open only while this is held"]
    pub fn tunnel(&self, side: Side) -> CountedTunnel {
        let gauge = self.tunnels_open[side as usize].clone();
        gauge.inc();
        CountedTunnel(gauge)
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

fn identity_label(identity: &SpiffeId) -> IdentityLabel {
    IdentityLabel { identity: identity.to_string().as_str().into() }
}

/// The families with a fixed set of series, and those whose counts are kept elsewhere.
struct OwnCollector {
    closed: [(&'static str, Counter); CloseReason::ALL.len()],
    connections_open: [(&'static str, Gauge); 2],
    tunnels_open: [(&'static str, Gauge); 2],
    handshake_duration: [(&'static str, Histogram); 2],
    capture_outcomes: Arc<OnceLock<CountSource>>,
}

impl OwnCollector {
    fn counters(
        encoder: &mut DescriptorEncoder<'_>,
        (name, help): (&str, &str),
        label: &'static str,
        series: impl IntoIterator<Item = (&'static str, u64)>,
    ) -> Result<(), fmt::Error> {
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        for (value, count) in series {
            family.encode_family(&[(label, value)])?.encode_counter::<NoLabelSet, _, u64>(&count, None)?;
        }
        Ok(())
    }

    fn gauges(
        encoder: &mut DescriptorEncoder<'_>,
        (name, help): (&str, &str),
        label: &'static str,
        series: &[(&'static str, Gauge)],
    ) -> Result<(), fmt::Error> {
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (value, gauge) in series {
            family.encode_family(&[(label, *value)])?.encode_gauge(&gauge.get())?;
        }
        Ok(())
    }
}

impl Collector for OwnCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        use prometheus_client::encoding::EncodeMetric as _;
        let closed = self.closed.iter().map(|(reason, count)| (*reason, count.get()));
        Self::counters(&mut encoder, ("connections_closed", "Connections ended, by reason"), "reason", closed)?;
        let outcomes = self.capture_outcomes.get().map(|source| source()).unwrap_or_default();
        let about = ("capture_outcomes", "How the kernel programs ended, by outcome");
        Self::counters(&mut encoder, about, "outcome", outcomes)?;
        let about = ("connections_open", "Connections that are open, by direction");
        Self::gauges(&mut encoder, about, "direction", &self.connections_open)?;
        let about = ("tunnels_open", "Tunnels that are open, by this agent's side");
        Self::gauges(&mut encoder, about, "side", &self.tunnels_open)?;
        let help = "Time that a TLS handshake took, in seconds";
        let mut family = encoder.encode_descriptor("handshake_duration_seconds", help, None, MetricType::Histogram)?;
        for (side, histogram) in &self.handshake_duration {
            histogram.encode(family.encode_family(&[("side", *side)])?)?;
        }
        let help = "Log lines dropped because the output did not keep up";
        let dropped = encoder.encode_descriptor("log_lines_dropped", help, None, MetricType::Counter);
        dropped?.encode_counter::<NoLabelSet, _, u64>(&log::dropped_lines(), None)
    }
}

impl fmt::Debug for OwnCollector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OwnCollector").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
