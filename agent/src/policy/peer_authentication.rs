//! Which mode each port of a workload has, from all `PeerAuthentication` objects.
//!
//! Enter: the objects of the mesh, once for an index, then a namespace and labels for each workload. Leaves: the workload's
//! resolved [`model::PeerAuthentication`](PeerAuthentication). The narrowest scope that says something wins: workload, namespace,
//! mesh; PERMISSIVE if none does. Of several objects of one scope only the oldest counts, even where it leaves the mode open;
//! beside it counts what stands in for one that cannot be read.

use std::collections::{BTreeMap, HashMap};

use super::Problem;
use super::objects::{MutualTls, MutualTlsMode, PeerAuthenticationPolicy, PeerAuthenticationSpec};
use crate::model::{Mode, PeerAuthentication};

/// All `PeerAuthentication` objects of a mesh, arranged so that a workload's are found without a search.
#[derive(Clone, Debug, Default)]
pub struct PeerAuthenticationIndex {
    mesh: Option<Mode>,
    namespaces: HashMap<String, Namespace>,
    overruled: Vec<Overruled>,
}

/// An object of no effect, because an older one has the same scope.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Overruled {
    /// The object without effect, as `namespace/name`.
    pub policy: String,
    /// The older object, as `namespace/name`.
    pub by: String,
}

#[derive(Clone, Debug, Default)]
struct Namespace {
    mode: Option<Mode>,
    /// Objects with a selector, oldest first.
    workloads: Vec<Selected>,
    /// Where those are in `workloads`, by one label of each selector: key, then value. Ascending.
    by_label: HashMap<String, HashMap<String, Vec<usize>>>,
}

#[derive(Clone, Debug)]
struct Selected {
    selector: BTreeMap<String, String>,
    mode: Option<Mode>,
    ports: BTreeMap<u16, Mode>,
}

/// Resolves one workload's modes. For many workloads, build a [`PeerAuthenticationIndex`] once.
#[must_use]
pub fn resolve<'a>(
    objects: impl IntoIterator<Item = &'a PeerAuthenticationPolicy>,
    namespace: &str,
    labels: &BTreeMap<String, String>,
    root_namespace: &str,
) -> PeerAuthentication {
    let relevant = objects.into_iter().filter(|object| [namespace, root_namespace].contains(&object.namespace()));
    PeerAuthenticationIndex::new(relevant, root_namespace).resolve(namespace, labels)
}

/// What in `object` has no effect: port modes without a selector, a selector in the root namespace (Istio has workload scope only
/// in other namespaces), a selector with a wildcard.
#[must_use]
pub fn check(object: &PeerAuthenticationPolicy, root_namespace: &str) -> Vec<Problem> {
    let Some(spec) = &object.spec else { return Vec::new() };
    let mut problems = Vec::new();
    let mut report = |field: &str, value: String, message: &str, effect| {
        problems.push(Problem { field: field.to_owned(), value, message: message.to_owned(), effect });
    };
    let selector = selector_of(spec);
    if selector.is_empty() && !spec.port_level_mtls.is_empty() {
        let ports: Vec<_> = spec.port_level_mtls.keys().map(|port| port.0.to_string()).collect();
        let message = "needs spec.selector.matchLabels: modes by port count for chosen workloads only";
        report("spec.portLevelMtls", ports.join(", "), message, "the port modes are ignored");
    }
    if !selector.is_empty() && object.namespace() == root_namespace {
        let labels: Vec<_> = selector.iter().map(|(key, value)| format!("{key}={value}")).collect();
        let message = "has no meaning in the root namespace: put the object into the workloads' namespace";
        report("spec.selector.matchLabels", labels.join(", "), message, "the object is ignored");
    }
    for (key, value) in selector.iter().filter(|(key, value)| key.is_empty() || key.contains('*') || value.contains('*')) {
        let message = "is no label: wildcards are not supported";
        report("spec.selector.matchLabels", format!("{key}={value}"), message, "the object selects no workload");
    }
    problems
}

impl PeerAuthenticationIndex {
    /// Arranges `objects`, in any order.
    #[must_use]
    pub fn new<'a>(objects: impl IntoIterator<Item = &'a PeerAuthenticationPolicy>, root_namespace: &str) -> Self {
        let mut objects: Vec<_> = objects.into_iter().collect();
        let stands_in = |object: &PeerAuthenticationPolicy| object.spec.as_ref().is_some_and(|spec| spec.stands_in);
        objects.sort_by_key(|object| (stands_in(object), &object.metadata.creation_timestamp, object.name(), object.namespace()));
        let empty = PeerAuthenticationSpec::default();
        let mut index = Self::default();
        let mut oldest: HashMap<_, &PeerAuthenticationPolicy> = HashMap::new();
        for object in objects {
            let spec = object.spec.as_ref().unwrap_or(&empty);
            let is_root = object.namespace() == root_namespace;
            let selector = selector_of(spec);
            if is_root && !selector.is_empty() {
                continue;
            }
            if !spec.stands_in
                && let Some(older) = oldest.get(&(object.namespace(), selector))
            {
                index.overruled.push(Overruled { policy: object.key(), by: older.key() });
                continue;
            }
            oldest.insert((object.namespace(), selector), object);
            if !selector.is_empty() {
                index.namespaces.entry(object.namespace().to_owned()).or_default().insert(spec);
                continue;
            }
            let mode = spec.mtls.and_then(resolved);
            if is_root {
                index.mesh = mode;
            } else {
                index.namespaces.entry(object.namespace().to_owned()).or_default().mode = mode;
            }
        }
        index
    }

    /// The modes of the workload in `namespace` with these `labels`.
    #[must_use]
    pub fn resolve(&self, namespace: &str, labels: &BTreeMap<String, String>) -> PeerAuthentication {
        let namespace = self.namespaces.get(namespace);
        let selected = namespace.and_then(|namespace| namespace.oldest_selecting(labels));
        let mode = selected.and_then(|selected| selected.mode).or(namespace.and_then(|namespace| namespace.mode)).or(self.mesh);
        PeerAuthentication {
            mode: mode.unwrap_or_default(),
            ports: selected.map(|selected| selected.ports.clone()).unwrap_or_default(),
        }
    }

    /// The objects that have no effect beside an older one for the mesh, the same namespace or the very same selector, to be
    /// reported.
    #[must_use]
    pub fn overruled(&self) -> &[Overruled] {
        &self.overruled
    }
}

impl Namespace {
    /// Adds an object with a selector, younger than all before.
    fn insert(&mut self, spec: &PeerAuthenticationSpec) {
        let selector = selector_of(spec).clone();
        let ports = spec.port_level_mtls.iter().filter_map(|(port, mtls)| Some((port.0, resolved(*mtls)?))).collect();
        if let Some((key, value)) = selector.iter().next_back() {
            let by_value = self.by_label.entry(key.clone()).or_default();
            by_value.entry(value.clone()).or_default().push(self.workloads.len());
        }
        self.workloads.push(Selected { selector, mode: spec.mtls.and_then(resolved), ports });
    }

    fn oldest_selecting(&self, labels: &BTreeMap<String, String>) -> Option<&Selected> {
        let candidates = labels.iter().filter_map(|(key, value)| self.by_label.get(key)?.get(value));
        let selects = |position: &&usize| {
            let selector = &self.workloads[**position].selector;
            selector.iter().all(|(key, value)| labels.get(key) == Some(value))
        };
        let oldest = candidates.filter_map(|positions| positions.iter().find(selects)).min()?;
        self.workloads.get(*oldest)
    }
}

fn selector_of(spec: &PeerAuthenticationSpec) -> &BTreeMap<String, String> {
    static NONE: BTreeMap<String, String> = BTreeMap::new();
    spec.selector.as_ref().map_or(&NONE, |selector| &selector.match_labels)
}

/// The mode that is asked for; none if it is left to the wider scope.
fn resolved(mtls: MutualTls) -> Option<Mode> {
    match mtls.mode {
        MutualTlsMode::Unset => None,
        MutualTlsMode::Disable => Some(Mode::Disable),
        MutualTlsMode::Permissive => Some(Mode::Permissive),
        MutualTlsMode::Strict => Some(Mode::Strict),
    }
}

#[cfg(test)]
mod tests;
