//! Every metric of the controller.
//!
//! Enters: facts from the controller's parts, through typed methods. Leaves: one page of OpenMetrics text. All label values are
//! fixed words of the program.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::routing::get;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

use super::http::{content, offload};
use super::metrics::CONTENT_TYPE;

/// Every metric of the controller. Clones share them.
#[derive(Clone)]
pub struct ControllerMetrics(Arc<Metrics>);

struct Metrics {
    registry: Registry,
    objects: Family<[(&'static str, &'static str); 1], Gauge>,
    watches: Family<[(&'static str, &'static str); 1], Gauge>,
    xds_clients: Gauge,
    certificates_issued: Counter,
    certificates_refused: Family<[(&'static str, &'static str); 1], Counter>,
    push_duration: Histogram,
    policy_problems: Gauge,
    ca_expiry: Gauge,
}

/// Why a certificate was not issued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// No good token.
    Unauthenticated,
    /// No enrolled pod of that identity is on the asking node.
    NotOnNode,
    /// The request is malformed, unproved or of a key that is not signed for.
    BadRequest,
    /// The authority or the API server cannot do it now.
    Unable,
}

/// A client that is connected, counted until this is dropped.
#[derive(Debug)]
pub struct CountedClient(Gauge);

impl Drop for CountedClient {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl Refusal {
    fn as_str(self) -> &'static str {
        match self {
            Self::Unauthenticated => "unauthenticated",
            Self::NotOnNode => "not_on_node",
            Self::BadRequest => "bad_request",
            Self::Unable => "unable",
        }
    }
}

impl Default for ControllerMetrics {
    fn default() -> Self {
        Self::new()
    }
}

impl ControllerMetrics {
    /// All metrics at zero.
    #[must_use]
    pub fn new() -> Self {
        let mut metrics = Metrics {
            registry: Registry::default(),
            objects: Family::default(),
            watches: Family::default(),
            xds_clients: Gauge::default(),
            certificates_issued: Counter::default(),
            certificates_refused: Family::default(),
            push_duration: Histogram::new(exponential_buckets(0.000_5, 2.0, 16)),
            policy_problems: Gauge::default(),
            ca_expiry: Gauge::default(),
        };
        let mut all = Registry::default();
        let registry = all.sub_registry_with_prefix("culvert_controller");
        registry.register("build", "What runs here", Info::new([("version", env!("CARGO_PKG_VERSION"))]));
        registry.register("objects", "Objects that the mesh is made of, by kind", metrics.objects.clone());
        registry.register("watch_up", "1 while objects of a kind are followed, by kind", metrics.watches.clone());
        registry.register("xds_clients", "Clients connected for configuration", metrics.xds_clients.clone());
        registry.register("certificates_issued", "Certificates signed for workloads", metrics.certificates_issued.clone());
        let about = "Requests for certificates that were refused, by reason";
        registry.register("certificates_refused", about, metrics.certificates_refused.clone());
        let about = "Time from reading a change to handing it to a client, in seconds";
        registry.register("push_duration_seconds", about, metrics.push_duration.clone());
        let about = "Policies of which a part is not enforced";
        registry.register("policies_not_enforced", about, metrics.policy_problems.clone());
        let about = "When the certificate that signs ends, in seconds since 1970";
        registry.register_with_unit("ca_expiry_timestamp", about, Unit::Seconds, metrics.ca_expiry.clone());
        metrics.registry = all;
        Self(Arc::new(metrics))
    }

    /// How many objects of a kind there are.
    pub fn objects(&self, kind: &'static str, count: usize) {
        self.0.objects.get_or_create(&[("kind", kind)]).set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// Whether objects of a kind are followed.
    pub fn watch(&self, kind: &'static str, up: bool) {
        self.0.watches.get_or_create(&[("kind", kind)]).set(i64::from(up));
    }

    /// Counts a client that is connected.
    #[must_use = "the client counts as connected only while this is held"]
    pub fn client(&self) -> CountedClient {
        self.0.xds_clients.inc();
        CountedClient(self.0.xds_clients.clone())
    }

    /// A certificate was signed.
    pub fn issued(&self) {
        self.0.certificates_issued.inc();
    }

    /// A certificate was refused.
    pub fn refused(&self, reason: Refusal) {
        self.0.certificates_refused.get_or_create(&[("reason", reason.as_str())]).inc();
    }

    /// A change was handed to a client, this long after it was read.
    pub fn pushed(&self, took: Duration) {
        self.0.push_duration.observe(took.as_secs_f64());
    }

    /// How many policies are not enforced in part.
    pub fn policy_problems(&self, count: usize) {
        self.0.policy_problems.set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// When what is signed with ends.
    pub fn ca_expiry(&self, at: SystemTime) {
        let seconds = at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        self.0.ca_expiry.set(i64::try_from(seconds).unwrap_or(i64::MAX));
    }

    /// The page.
    #[must_use]
    pub fn exposition(&self) -> String {
        let mut page = String::new();
        // Writing to a string does not fail.
        encode(&mut page, &self.0.registry).unwrap_or_default();
        page
    }

    /// The routes of the metrics server.
    pub fn router(self) -> Router {
        let page = move || {
            let metrics = self.clone();
            async move { offload(move || content(CONTENT_TYPE, metrics.exposition())).await }
        };
        Router::new().route("/metrics", get(page))
    }
}

impl fmt::Debug for ControllerMetrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ControllerMetrics").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_has_the_names_that_a_scraper_sees() {
        let metrics = ControllerMetrics::new();
        metrics.objects("Pod", 3);
        metrics.watch("Pod", true);
        let client = metrics.client();
        metrics.issued();
        metrics.refused(Refusal::NotOnNode);
        metrics.pushed(Duration::from_millis(3));
        metrics.policy_problems(2);
        metrics.ca_expiry(UNIX_EPOCH + Duration::from_secs(7));
        let page = metrics.exposition();
        for line in [
            "culvert_controller_objects{kind=\"Pod\"} 3",
            "culvert_controller_watch_up{kind=\"Pod\"} 1",
            "culvert_controller_xds_clients 1",
            "culvert_controller_certificates_issued_total 1",
            "culvert_controller_certificates_refused_total{reason=\"not_on_node\"} 1",
            "culvert_controller_push_duration_seconds_count 1",
            "culvert_controller_policies_not_enforced 2",
            "culvert_controller_ca_expiry_timestamp_seconds 7",
        ] {
            assert!(page.lines().any(|found| found == line), "{line} is not in\n{page}");
        }
        drop(client);
        assert!(metrics.exposition().contains("culvert_controller_xds_clients 0"));
    }
}
