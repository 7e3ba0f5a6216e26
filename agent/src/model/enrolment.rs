//! Whether a namespace or pod is in the mesh, by its labels.

use std::collections::BTreeMap;

/// What labels say of enrolment: Culvert's own before Istio's. A value that neither knows says nothing.
#[must_use]
pub fn enrolment(labels: &BTreeMap<String, String>) -> Option<bool> {
    let own = match labels.get("culvert.dev/mesh").map(String::as_str) {
        Some("enabled") => Some(true),
        Some("disabled") => Some(false),
        _ => None,
    };
    own.or_else(|| match labels.get("istio.io/dataplane-mode").map(String::as_str) {
        Some("ambient") => Some(true),
        Some("none") => Some(false),
        _ => None,
    })
}
