//! The mesh's resources as they are handed out: immutable states that share all but what changed.
//!
//! Enters: [`Update`]s. Leaves: a [`MeshState`] through a watch channel. Every change has a sequence number, and the log holds each
//! name once, at its last change: whoever is behind reads what changed since, however long it was away, and nobody holds anything
//! up. Of removed resources a bounded number is remembered; who is further behind than that must start over.

#[cfg(test)]
mod tests;

use std::net::IpAddr;
use std::ops::Bound;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::watch;

use super::index::{Residents, Resource, ResourceKind, Update};

/// How many removed resources are remembered.
const REMOVED_KEPT: usize = 16_384;

/// All resources at one moment. Cheap to copy.
#[derive(Clone, Debug, Default)]
pub struct MeshState {
    sequence: u64,
    floor: u64,
    entries: imbl::OrdMap<(ResourceKind, Arc<str>), Entry>,
    log: imbl::OrdMap<(ResourceKind, u64), (Arc<str>, Instant)>,
    removed: imbl::OrdMap<u64, (ResourceKind, Arc<str>)>,
    by_address: imbl::HashMap<IpAddr, imbl::OrdSet<Arc<str>>>,
    residents: Residents,
}

#[derive(Clone, Debug)]
struct Entry {
    sequence: u64,
    resource: Option<Arc<Resource>>,
    /// The last change with which some who had been told of it no longer were.
    withdrawn: u64,
}

/// Publishes states.
#[derive(Debug)]
pub struct Publisher {
    states: watch::Sender<Arc<MeshState>>,
    kept: usize,
}

impl Publisher {
    /// A publisher of an empty state, and where its states are read.
    #[must_use]
    pub fn new() -> (Self, watch::Receiver<Arc<MeshState>>) {
        let (states, reader) = watch::channel(Arc::default());
        (Self { states, kept: REMOVED_KEPT }, reader)
    }

    /// Publishes what an update changes, which was read at `at`. Resources that are still the same are not touched.
    pub fn publish(&mut self, update: Update, at: Instant) {
        let mut state = MeshState::clone(&self.states.borrow());
        state.residents = update.residents;
        for (kind, name, resource) in update.resources {
            state.set(kind, name, resource, at);
        }
        state.forget(self.kept);
        self.states.send_replace(Arc::new(state));
    }
}

impl MeshState {
    /// The number of the last change.
    #[must_use]
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Whether all changes since `sequence` are still known.
    #[must_use]
    pub fn remembers(&self, sequence: u64) -> bool {
        sequence >= self.floor
    }

    /// Who may ask for which identity.
    #[must_use]
    pub fn residents(&self) -> &Residents {
        &self.residents
    }

    /// The resource of this name, whoever is told of it.
    #[must_use]
    pub fn resource(&self, kind: ResourceKind, name: &str) -> Option<&Arc<Resource>> {
        self.entries.get(&(kind, Arc::from(name)))?.resource.as_ref()
    }

    /// The workload or service at this address.
    #[must_use]
    pub fn at_address(&self, address: IpAddr) -> Option<&Arc<Resource>> {
        let name = self.by_address.get(&address)?.iter().next()?;
        self.resource(ResourceKind::Address, name)
    }

    /// All resources of a kind, by name, whoever is told of them.
    pub fn resources(&self, kind: ResourceKind) -> impl Iterator<Item = &Arc<Resource>> {
        let first: (ResourceKind, Arc<str>) = (kind, "".into());
        let all = self.entries.range(first..).take_while(move |((other, _), _)| *other == kind);
        all.filter_map(|(_, entry)| entry.resource.as_ref())
    }

    /// What changed after `sequence` for an agent of `node`, each name once, in the order of the changes: its resource, or none if it was
    /// removed or is now another node's.
    pub fn changes(
        &self,
        kind: ResourceKind,
        sequence: u64,
        node: &str,
    ) -> impl Iterator<Item = (&Arc<str>, Option<&Arc<Resource>>)> {
        let range = (Bound::Excluded((kind, sequence)), Bound::Included((kind, u64::MAX)));
        self.log.range(range).filter_map(move |(_, (name, _))| {
            let entry = self.entries.get(&(kind, Arc::clone(name)))?;
            match &entry.resource {
                Some(resource) if resource.is_for(node) => Some((name, Some(resource))),
                Some(_) if entry.withdrawn <= sequence => None,
                Some(_) | None => Some((name, None)),
            }
        })
    }

    /// When the first of the changes after `sequence` that still count was read.
    #[must_use]
    pub fn oldest_change(&self, kind: ResourceKind, sequence: u64) -> Option<Instant> {
        let range = (Bound::Excluded((kind, sequence)), Bound::Included((kind, u64::MAX)));
        self.log.range(range).next().map(|(_, (_, at))| *at)
    }

    fn set(&mut self, kind: ResourceKind, name: Arc<str>, resource: Option<Resource>, at: Instant) {
        let key = (kind, name);
        let before = self.entries.get(&key).cloned();
        let before_resource = before.as_ref().and_then(|entry| entry.resource.as_ref());
        if before_resource.map(|resource| resource.as_ref()) == resource.as_ref() {
            return;
        }
        self.sequence += 1;
        if let Some(entry) = &before {
            self.log.remove(&(kind, entry.sequence));
            self.removed.remove(&entry.sequence);
        }
        let audience = |resource: &Resource| resource.node.clone();
        let narrowed = before_resource.is_some_and(|before| resource.as_ref().map(audience) != Some(audience(before)));
        let withdrawn = if narrowed { self.sequence } else { before.as_ref().map_or(0, |entry| entry.withdrawn) };
        for address in before_resource.iter().flat_map(|resource| &resource.addresses) {
            let left = self.by_address.get_mut(address).is_some_and(|names| {
                names.remove(&key.1);
                !names.is_empty()
            });
            if !left {
                self.by_address.remove(address);
            }
        }
        for address in resource.iter().flat_map(|resource| &resource.addresses) {
            self.by_address.entry(*address).or_default().insert(Arc::clone(&key.1));
        }
        self.log.insert((kind, self.sequence), (Arc::clone(&key.1), at));
        if resource.is_none() {
            self.removed.insert(self.sequence, key.clone());
        }
        self.entries.insert(key, Entry { sequence: self.sequence, resource: resource.map(Arc::new), withdrawn });
    }

    /// Forgets the oldest removals beyond `kept`.
    fn forget(&mut self, kept: usize) {
        while self.removed.len() > kept
            && let Some((sequence, key)) = self.removed.get_min().cloned()
        {
            self.removed.remove(&sequence);
            self.log.remove(&(key.0, sequence));
            self.entries.remove(&key);
            self.floor = sequence;
        }
    }
}
