//! What many workloads have in common, kept once.
//!
//! Enters: a value as one resource gave it. Leaves: the one copy that all hold which were given the same. In a large mesh most of a
//! workload is like its neighbour's: namespace, service account, node, what made it, its services and what its ports accept.

use std::collections::HashSet;
use std::hash::Hash;
use std::sync::Arc;

use crate::model::spiffe_id::SpiffeIdError;
use crate::model::{PeerAuthentication, ServedPorts, SpiffeId, TelemetryNames, TrustDomain};

/// With fewer values nobody looks for those that are not needed any more.
const FIRST_SWEEP: usize = 1024;

/// All values that resources have in common.
#[derive(Debug, Default)]
pub(super) struct Shared {
    pub(super) texts: Pool<Arc<str>>,
    identities: Pool<SpiffeId>,
    pub(super) services: Pool<Arc<ServedPorts>>,
    pub(super) policies: Pool<Arc<Vec<Arc<str>>>>,
    pub(super) telemetry: Pool<Arc<TelemetryNames>>,
    pub(super) modes: Pool<Arc<PeerAuthentication>>,
}

/// The values of one type. A value that nobody else holds is let go when the pool has doubled since it last looked for such.
#[derive(Debug)]
pub(super) struct Pool<T> {
    values: HashSet<T>,
    /// What was asked for last: resources come in the order of their names, and pods of one Deployment one after the other.
    last: Option<T>,
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

impl Shared {
    /// The one copy of a workload's identity.
    ///
    /// # Errors
    /// As [`SpiffeId::new`].
    pub(super) fn identity(
        &mut self,
        trust_domain: TrustDomain,
        namespace: &str,
        service_account: &str,
    ) -> Result<SpiffeId, SpiffeIdError> {
        if let Some(last) = &self.identities.last
            && (last.namespace(), last.service_account()) == (namespace, service_account)
            && *last.trust_domain() == trust_domain
        {
            return Ok(last.clone());
        }
        Ok(self.identities.one(SpiffeId::new(trust_domain, namespace, service_account)?))
    }
}

impl Pool<Arc<str>> {
    /// The one copy of a text.
    pub(super) fn text(&mut self, text: &str) -> Arc<str> {
        self.values.get(text).cloned().unwrap_or_else(|| self.add(text.into()))
    }
}

impl<T: Counted> Pool<T> {
    /// The one copy of `value`.
    pub(super) fn one(&mut self, value: impl Into<T>) -> T {
        let value = value.into();
        if let Some(last) = self.last.as_ref().filter(|last| **last == value) {
            return last.clone();
        }
        let one = self.values.get(&value).cloned().unwrap_or_else(|| self.add(value));
        self.last = Some(one.clone());
        one
    }

    fn add(&mut self, value: T) -> T {
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
        Self { values: HashSet::new(), last: None, sweep_at: FIRST_SWEEP }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_values_are_one() {
        let mut shared = Shared::default();
        let texts = ["shop", "store", "shop", "shop"].map(|text| shared.texts.text(text));
        assert!(Arc::ptr_eq(&texts[0], &texts[2]) && Arc::ptr_eq(&texts[0], &texts[3]) && !Arc::ptr_eq(&texts[0], &texts[1]));
        let lists = ["a/b", "a/c", "a/b", "a/b"].map(|key| shared.policies.one(vec![key.into()]));
        assert!(Arc::ptr_eq(&lists[0], &lists[2]) && Arc::ptr_eq(&lists[0], &lists[3]) && lists[0] != lists[1]);
    }

    #[test]
    fn an_identity_is_shared_by_those_of_one_domain_namespace_and_account() {
        let mut shared = Shared::default();
        let mut identity = |domain: &str, namespace, account| {
            let domain = domain.parse().expect("legal");
            shared.identity(domain, namespace, account).map(|id| (id.is_shared(), id.to_string()))
        };
        for (domain, namespace, account) in
            [("td", "a", "b"), ("td", "a", "b"), ("other", "a", "b"), ("td", "b", "b"), ("td", "b", "a"), ("td", "a", "b")]
        {
            let expected = format!("spiffe://{domain}/ns/{namespace}/sa/{account}");
            assert_eq!(identity(domain, namespace, account), Ok((true, expected)));
        }
        assert!(identity("td", "a/b", "c").is_err());
    }

    #[test]
    fn values_that_nobody_holds_do_not_pile_up() {
        let mut texts = Pool::<Arc<str>>::default();
        let held = texts.text("held");
        for number in 0..FIRST_SWEEP * 10 {
            texts.text(&format!("job-{number}"));
        }
        assert!(texts.values.len() <= FIRST_SWEEP, "{} values", texts.values.len());
        assert!(Arc::ptr_eq(&held, &texts.text("held")), "what is held stays");
    }
}
