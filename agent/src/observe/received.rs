//! What came from the controller over discovery, by type of resource: an agent that starts again is sent only what has changed.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

/// Counts by a type's word.
type ByType = Family<[(&'static str, &'static str); 1], Counter>;

/// Counts what came. Clones share the counts.
#[derive(Clone, Debug, Default)]
pub struct XdsReceived {
    resources: ByType,
    removed: ByType,
    bytes: ByType,
}

impl XdsReceived {
    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register("xds_resources_received", "Resources that the controller sent, by type", self.resources.clone());
        registry.register(
            "xds_resources_removed",
            "Resources that the controller said are no more, by type",
            self.removed.clone(),
        );
        registry.register("xds_received_bytes", "Bytes of the controller's responses, by type", self.bytes.clone());
    }

    /// Counts a response: how many resources it brought, how many it said are no more, and its size. `word` is one of a fixed set.
    pub fn count(&self, word: &'static str, resources: usize, removed: usize, bytes: usize) {
        for (counts, number) in [(&self.resources, resources), (&self.removed, removed), (&self.bytes, bytes)] {
            counts.get_or_create(&[("type", word)]).inc_by(number as u64);
        }
    }
}
