//! What is to be said of each policy: the parts of it that do not do what it says.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use crate::controller::source::{Kind, ObjectKey};
use crate::policy::Problem;
use crate::policy::peer_authentication::Overruled;

/// What is to be said of one policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The policy.
    pub policy: ObjectKey,
    /// The policy's own UID, if it has one.
    pub uid: Option<String>,
    /// The generation of the policy that this is about, if it has one.
    pub generation: Option<i64>,
    /// Sentences, each on a part that is not enforced as written, and why; none at all when the policy is gone.
    pub problems: Option<Vec<String>>,
}

/// What is known of all policies.
#[derive(Debug, Default)]
pub(super) struct Findings {
    notes: BTreeMap<ObjectKey, Note>,
    overruled: BTreeMap<ObjectKey, String>,
    stale: BTreeSet<ObjectKey>,
}

#[derive(Debug, Default)]
struct Note {
    uid: Option<String>,
    generation: Option<i64>,
    force: Force,
    problems: Vec<String>,
}

/// What of an object is in force.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Force {
    /// Nothing, as far as is noted.
    #[default]
    Nothing,
    /// What stands in for it.
    StandIn,
    /// What it says, or said when it last made sense.
    Object,
}

impl Findings {
    /// A policy is in force, with these exceptions.
    pub(super) fn note(&mut self, key: &ObjectKey, metadata: &ObjectMeta, problems: &[Problem]) {
        let problems = problems.iter().map(ToString::to_string).collect();
        let note = Note { uid: metadata.uid.clone(), generation: metadata.generation, force: Force::Object, problems };
        self.notes.insert(key.clone(), note);
        self.stale.insert(key.clone());
    }

    /// What of a policy is in force. Of other objects it is not noted: what they said stays so.
    pub(super) fn force(&self, key: &ObjectKey) -> Force {
        if is_policy(key.kind) { self.notes.get(key).map(|note| note.force).unwrap_or_default() } else { Force::Object }
    }

    /// An object cannot be used as it is now.
    pub(super) fn refuse(&mut self, key: &ObjectKey, uid: Option<&String>, problem: String, force: Force) {
        if !is_policy(key.kind) {
            return;
        }
        let note = Note { uid: uid.cloned(), generation: None, force, problems: vec![problem] };
        self.notes.insert(key.clone(), note);
        self.stale.insert(key.clone());
    }

    /// These `PeerAuthentication`s have no effect, and no others.
    pub(super) fn overrule(&mut self, overruled: &[Overruled]) {
        let now: BTreeMap<_, _> =
            overruled.iter().filter_map(|overruled| Some((key_of(&overruled.policy)?, overruled.by.clone()))).collect();
        let differs = |key: &&ObjectKey| now.get(*key) != self.overruled.get(*key);
        let changed: Vec<_> = now.keys().chain(self.overruled.keys()).filter(differs).cloned().collect();
        self.stale.extend(changed);
        self.overruled = now;
    }

    /// An object is gone.
    pub(super) fn forget(&mut self, key: &ObjectKey) {
        if self.notes.remove(key).is_some() {
            self.stale.insert(key.clone());
        }
    }

    /// What is to be said now.
    pub(super) fn take(&mut self) -> Vec<Finding> {
        let stale = std::mem::take(&mut self.stale);
        let finding = |policy: ObjectKey| {
            let Some(note) = self.notes.get(&policy) else {
                return Finding { policy, uid: None, generation: None, problems: None };
            };
            let mut problems = note.problems.clone();
            problems.extend(self.overruled.get(&policy).map(|by| {
                format!("it has no effect: PeerAuthentication {by} is older and has the same scope; remove one of them")
            }));
            Finding { uid: note.uid.clone(), generation: note.generation, problems: Some(problems), policy }
        };
        stale.into_iter().map(finding).collect()
    }
}

fn is_policy(kind: Kind) -> bool {
    matches!(kind, Kind::PeerAuthentication | Kind::AuthorizationPolicy)
}

fn key_of(policy: &str) -> Option<ObjectKey> {
    let (namespace, name) = policy.split_once('/')?;
    Some(ObjectKey { kind: Kind::PeerAuthentication, namespace: namespace.to_owned(), name: name.to_owned() })
}
