//! What has been told of one kind's objects, so that only differences are told.
//!
//! Enters: objects as lists, watches and look-ups bring them, in any mixture. Leaves: [`Change`]s. Of each object only its name and
//! version are kept. Versions are compared as numbers, which API servers promise they are (KEP-5504); one that is not is taken as
//! newer, so that the order of arrival decides.

use std::collections::HashMap;
use std::sync::Arc;

use serde_json::value::RawValue;
use tracing::warn;

use super::parse::{Head, head, object};
use crate::controller::source::{Change, Kind, Object, ObjectKey, stand_in};
use crate::policy::compile::MeshContext;

/// What has been told of one kind.
#[derive(Debug)]
pub(super) struct Ledger {
    kind: Kind,
    mesh: MeshContext,
    origin: Arc<str>,
    held: HashMap<Name, Held>,
    /// Counts lists: what the present one does not have is gone at its end.
    round: u32,
    /// The version up to which every change has been told.
    reached: u64,
}

/// Namespace and name.
type Name = (Box<str>, Box<str>);

#[derive(Debug)]
struct Held {
    version: Box<str>,
    round: u32,
}

impl Ledger {
    pub(super) fn new(kind: Kind, mesh: MeshContext) -> Self {
        Self { kind, mesh, origin: "Kubernetes API".into(), held: HashMap::new(), round: 1, reached: 0 }
    }

    /// An object of a new list.
    pub(super) fn listed(&mut self, raw: &RawValue) -> Option<Change> {
        let head = self.head(raw)?;
        let held = self.held.get_mut(&head.name());
        if let Some(held) = held {
            held.round = self.round;
            if !newer(&head.version, &held.version) {
                return None;
            }
        }
        Some(self.tell(head, raw, self.round))
    }

    /// The end of a list: what it did not have is gone, unless it is younger than the list.
    pub(super) fn complete(&mut self, version: &str) -> Vec<Change> {
        self.reach(version);
        let (round, reached) = (self.round, self.reached);
        let gone = |held: &Held| held.round != round && number(&held.version).is_none_or(|version| version <= reached);
        let names: Vec<Name> = self.held.iter().filter(|(_, held)| gone(held)).map(|(name, _)| name.clone()).collect();
        self.round = self.round.wrapping_add(1);
        names.iter().filter_map(|name| self.forget(name)).collect()
    }

    /// An object that a watch tells of.
    pub(super) fn changed(&mut self, raw: &RawValue) -> Option<Change> {
        let head = self.head(raw)?;
        self.reach(&head.version);
        let known = self.held.get(&head.name());
        if known.is_some_and(|held| !newer(&head.version, &held.version)) {
            return None;
        }
        Some(self.tell(head, raw, self.before()))
    }

    /// The last state of an object that is gone.
    pub(super) fn removed(&mut self, raw: &RawValue) -> Option<Change> {
        let head = self.head(raw)?;
        self.reach(&head.version);
        let name = head.name();
        // Made again since, and found by a look-up: the watch will come to that.
        if self.held.get(&name).is_some_and(|held| number(&held.version) > number(&head.version)) {
            return None;
        }
        self.forget(&name)
    }

    /// An object that was looked up. It counts only if the watch has not come so far: else what the watch told is newer, be it
    /// that the object is gone.
    pub(super) fn found(&mut self, raw: &RawValue) -> Option<Change> {
        let head = self.head(raw)?;
        let ahead = number(&head.version).is_some_and(|version| version > self.reached);
        let known = self.held.get(&head.name()).is_some_and(|held| !newer(&head.version, &held.version));
        (ahead && !known).then(|| self.tell(head, raw, self.before()))
    }

    /// Every change up to this version has been told.
    pub(super) fn reach(&mut self, version: &str) {
        self.reached = self.reached.max(number(version).unwrap_or(0));
    }

    /// There are no objects of this kind.
    pub(super) fn clear(&mut self) -> Vec<Change> {
        let names: Vec<Name> = self.held.keys().cloned().collect();
        names.iter().filter_map(|name| self.forget(name)).collect()
    }

    /// What has not been in the present list, or the next one.
    fn before(&self) -> u32 {
        self.round.wrapping_sub(1)
    }

    fn tell(&mut self, head: Head, raw: &RawValue, round: u32) -> Change {
        let key = self.key(&head.name());
        let held = Held { version: head.version.as_str().into(), round };
        self.held.insert(head.name(), held);
        match object(self.kind, raw).and_then(|object| object.check(&self.mesh).map(|()| object)) {
            Ok(object) => Change::Applied { object: Arc::new(object), origin: Arc::clone(&self.origin) },
            Err(error) => Change::Refused { key, uid: head.uid, error, stand_in: self.stand_in(raw) },
        }
    }

    fn stand_in(&self, raw: &RawValue) -> Option<Arc<Object>> {
        stand_in::of(self.kind, &serde_json::from_str(raw.get()).ok()?, &self.mesh).map(Arc::new)
    }

    fn forget(&mut self, name: &Name) -> Option<Change> {
        self.held.remove(name)?;
        Some(Change::Removed(self.key(name)))
    }

    fn key(&self, (namespace, name): &Name) -> ObjectKey {
        ObjectKey { kind: self.kind, namespace: namespace.to_string(), name: name.to_string() }
    }

    fn head(&self, raw: &RawValue) -> Option<Head> {
        head(raw).inspect_err(|error| warn!("an object of kind {} has no readable metadata: {error}", self.kind.as_str())).ok()
    }
}

fn number(version: &str) -> Option<u64> {
    version.parse().ok()
}

/// Whether `version` is another than `held`, and not an older one.
fn newer(version: &str, held: &str) -> bool {
    match (number(version), number(held)) {
        (Some(version), Some(held)) => version > held,
        _ => version != held,
    }
}

#[cfg(test)]
mod tests;
