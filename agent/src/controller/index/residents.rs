//! Which identities run on which node: what the certificate authority signs by.

use std::sync::Arc;

use crate::model::SpiffeId;

/// The identities of the enrolled pods of each node. Cheap to copy.
#[derive(Clone, Debug, Default)]
pub struct Residents(imbl::HashMap<(Arc<str>, SpiffeId), u32>);

impl Residents {
    /// Whether an enrolled pod on `node` has this identity.
    #[must_use]
    pub fn contains(&self, node: &str, identity: &SpiffeId) -> bool {
        self.0.contains_key(&(Arc::from(node), identity.clone()))
    }

    /// One pod more has this identity on this node.
    pub(super) fn enter(&mut self, residence: (Arc<str>, SpiffeId)) {
        *self.0.entry(residence).or_insert(0) += 1;
    }

    /// One pod less has this identity on this node.
    pub(super) fn leave(&mut self, residence: &(Arc<str>, SpiffeId)) {
        match self.0.get_mut(residence) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(self.0.remove(residence)),
        }
    }
}
