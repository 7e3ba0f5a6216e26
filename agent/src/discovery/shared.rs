//! What many workloads have in common, kept once.
//!
//! Enters: a value as one resource gave it. Leaves: the one copy that all hold which were given the same. In a large mesh most of a
//! workload is like its neighbour's: namespace, service account, node, what made it, its services and what its ports accept.

use std::collections::HashSet;
use std::hash::Hash;
use std::sync::Arc;

use crate::model::{PeerAuthentication, ServedPorts, SpiffeId, TelemetryNames};

/// With fewer values nobody looks for those that are not needed any more.
const FIRST_SWEEP: usize = 1024;

/// All values that resources have in common.
#[derive(Debug, Default)]
pub(super) struct Shared {
    pub(super) texts: Pool<Arc<str>>,
    pub(super) identities: Pool<SpiffeId>,
    pub(super) services: Pool<Arc<ServedPorts>>,
    pub(super) policies: Pool<Arc<Vec<Arc<str>>>>,
    pub(super) telemetry: Pool<Arc<TelemetryNames>>,
    pub(super) modes: Pool<Arc<PeerAuthentication>>,
}

/// The values of one type. A value that nobody else holds is let go when the pool has doubled since it last looked for such.
#[derive(Debug)]
pub(super) struct Pool<T> {
    values: HashSet<T>,
    sweep_at: usize,
}

/// A value whose copies are one.
pub(super) trait Counted: Clone + Eq + Hash {
    /// Whether there is another copy.
    fn is_shared(&self) -> bool;
}

impl<T: ?Sized + Eq + Hash> Counted for Arc<T> {
    fn is_shared(&self) -> bool {
        Self::strong_count(self) > 1
    }
}

impl Counted for SpiffeId {
    fn is_shared(&self) -> bool {
        self.is_shared()
    }
}

impl<T: Counted> Pool<T> {
    /// The one copy of `value`.
    pub(super) fn one(&mut self, value: impl Into<T>) -> T {
        let value = value.into();
        if let Some(held) = self.values.get(&value) {
            return held.clone();
        }
        if self.values.len() >= self.sweep_at {
            self.values.retain(Counted::is_shared);
            self.sweep_at = FIRST_SWEEP.max(self.values.len() * 2);
        }
        self.values.insert(value.clone());
        value
    }
}

impl<T> Default for Pool<T> {
    fn default() -> Self {
        Self { values: HashSet::new(), sweep_at: FIRST_SWEEP }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_values_are_one() {
        let mut texts = Pool::<Arc<str>>::default();
        let (one, other) = (texts.one("shop"), texts.one("shop".to_owned()));
        assert!(Arc::ptr_eq(&one, &other) && !Arc::ptr_eq(&one, &texts.one("store")));
    }

    #[test]
    fn values_that_nobody_holds_do_not_pile_up() {
        let mut texts = Pool::<Arc<str>>::default();
        let held = texts.one("held");
        for number in 0..FIRST_SWEEP * 10 {
            texts.one(format!("job-{number}"));
        }
        assert!(texts.values.len() <= FIRST_SWEEP, "{} values", texts.values.len());
        assert!(Arc::ptr_eq(&held, &texts.one("held")), "what is held stays");
    }
}
