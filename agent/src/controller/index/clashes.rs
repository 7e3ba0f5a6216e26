//! Pods that clash with each other or lack what they name: told once, and again when it comes back.

use std::collections::BTreeMap;

use super::pod::PodRecord;
use super::{Index, ObjectName};

impl Index {
    /// Warns of an enrolled pod on a node that there is no object of: no agent gets a certificate for it.
    pub(super) fn note_stray(&mut self, name: &ObjectName, warnings: &mut Vec<String>) {
        let known = |pod: &PodRecord| pod.node.is_empty() || self.nodes.contains_key(&*pod.node);
        let stray = self.pods.get(name).filter(|pod| self.enrolled(name, pod) && !known(pod));
        match stray {
            None => drop(self.strays.remove(name)),
            Some(pod) if self.strays.insert(name.clone()) => warnings.push(format!(
                "pod {name} is in the mesh, but there is no Node `{}`, which its spec.nodeName names: no agent can act for the pod; \
                 add the Node, or correct the name",
                pod.node
            )),
            Some(_) => {}
        }
    }

    /// Warns of pods with one address, once, and forgets conflicts that are over.
    pub(super) fn note_conflicts(&mut self, name: &ObjectName, warnings: &mut Vec<String>) {
        let mut winners = BTreeMap::new();
        for address in self.pods.get(name).into_iter().flat_map(PodRecord::claimed) {
            if let Some(owner) = self.owner(*address).filter(|owner| *owner != name) {
                winners.insert(owner.clone(), *address);
            }
        }
        self.conflicts.retain(|(loser, winner)| loser != name || winners.contains_key(winner));
        for (winner, address) in winners {
            if self.conflicts.insert((name.clone(), winner.clone())) {
                warnings.push(format!(
                    "pods {winner} and {name} both have the address {address}: {winner} is older and keeps it, {name} is not served; \
                     correct status.podIPs of one of them"
                ));
            }
        }
    }
}
