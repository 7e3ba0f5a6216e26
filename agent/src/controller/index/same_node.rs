//! How pods speak to others of their node: the pod's own label, its namespace's, the mesh's setting. A label of another value than the
//! known ones asks for encryption, lest a slip of the pen takes it away, and is told of once.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::{Index, ObjectName, PodRecord};
use crate::controller::source::{Kind, ObjectKey};
use crate::model::SameNode;
use crate::policy::Problem;

/// What labels say, beside those of pods.
#[derive(Debug, Default)]
pub(super) struct SameNodeLabels {
    namespaces: HashMap<Arc<str>, SameNode>,
    /// Values that nobody knows, and that have been told of.
    misread: BTreeMap<ObjectKey, String>,
}

/// What labels say of the way to other pods of the node, if anything.
pub(super) fn labelled(labels: &BTreeMap<String, String>) -> Option<SameNode> {
    labels.get(SameNode::LABEL).map(|word| word.parse().unwrap_or(SameNode::Tunnel))
}

impl Index {
    /// The way of a pod to others of its node: the narrowest that is set.
    pub(super) fn same_node(&self, name: &ObjectName, pod: &PodRecord) -> SameNode {
        let of_namespace = || self.same_node.namespaces.get(&name.namespace).copied();
        pod.same_node.or_else(of_namespace).unwrap_or(self.settings.same_node)
    }

    /// A namespace has these labels.
    pub(super) fn set_namespace_way(
        &mut self,
        key: &ObjectKey,
        labels: Option<&BTreeMap<String, String>>,
        origin: &str,
        warnings: &mut Vec<String>,
    ) {
        self.note_way(key, labels, origin, warnings);
        self.keep_way(&key.name, labels.and_then(labelled));
    }

    fn keep_way(&mut self, namespace: &str, way: Option<SameNode>) {
        let namespaces = &mut self.same_node.namespaces;
        let before = match way {
            Some(way) => namespaces.insert(namespace.into(), way),
            None => namespaces.remove(namespace),
        };
        if before != way {
            self.touch_namespace(Some(namespace.into()));
        }
    }

    /// Warns of a label's value that nobody knows.
    pub(super) fn note_way(
        &mut self,
        key: &ObjectKey,
        labels: Option<&BTreeMap<String, String>>,
        origin: &str,
        warnings: &mut Vec<String>,
    ) {
        let word = labels.and_then(|labels| labels.get(SameNode::LABEL)).filter(|word| word.parse::<SameNode>().is_err());
        let Some(word) = word else { return drop(self.same_node.misread.remove(key)) };
        if self.same_node.misread.insert(key.clone(), word.clone()).as_ref() != Some(word) {
            let problem = Problem {
                field: format!("metadata.labels[{}]", SameNode::LABEL),
                value: word.clone(),
                message: format!("is not a way between pods of one node: write {}", SameNode::NAMES.join(" or ")),
                effect: "connections within the node are encrypted, as `tunnel` says",
            };
            warnings.push(format!("{origin}: {key}: {problem}"));
        }
    }

    /// An object is gone.
    pub(super) fn forget_way(&mut self, key: &ObjectKey) {
        self.same_node.misread.remove(key);
        if key.kind == Kind::Namespace {
            self.keep_way(&key.name, None);
        }
    }
}
