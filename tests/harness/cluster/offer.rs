//! What the API server offers, asked of itself, whatever its version; and tests that cannot be run without it.

use std::io::Write as _;

use serde_json::Value;

use super::{Cluster, kubectl, run};

/// Says on the standard error that the running test is not: a test that does nothing passes, and what it prints is otherwise not shown.
pub fn not_run(why: &str) {
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    // Past the test runner, which keeps to itself what a test prints that passes.
    let _nobody_reads = writeln!(std::io::stderr(), "NOT RUN: {test}: {why}");
}

impl Cluster {
    /// Whether the API server has a kind of object, as `kubectl api-resources` names it: its plural, with the group after a dot.
    ///
    /// # Panics
    /// When the API server does not tell.
    #[must_use]
    pub fn offers(&self, resource: &str) -> bool {
        self.kubectl(&["api-resources", "--output=name", "--cached=false"]).lines().any(|offered| offered == resource)
    }

    /// Whether the API server would keep the field at this JSON pointer of an object, which is not made. One that it does not know, or that
    /// is turned off, it drops.
    ///
    /// # Panics
    /// When it would not take the object, and not for want of that field.
    #[must_use]
    pub fn keeps(&self, object: &Value, field: &str) -> bool {
        assert!(object.pointer(field).is_some(), "{object} has no {field}");
        let words = ["create", "--dry-run=server", "--validate=false", "--output=json", "--filename=-"];
        match run(kubectl().args(words), &object.to_string()) {
            Ok(kept) => {
                let kept: Value = serde_json::from_str(&kept).expect("kubectl prints JSON");
                kept.pointer(field) == object.pointer(field)
            }
            // What is left of a probe, or of a volume, of which the only kind that was given is dropped.
            Err(refusal) if refusal.contains("must specify a handler type") || refusal.contains("must specify a volume type") => {
                false
            }
            Err(refusal) => panic!("whether {field} is kept: {refusal}"),
        }
    }
}
